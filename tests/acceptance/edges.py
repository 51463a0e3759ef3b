"""A story over HTTP on simulated time, told in microseconds since its begin and in decimal strings.

`told` ends each story with what must hold after any: the audit finds nothing, a pass changes nothing that is read, a
second one nothing that is stored, and ledger, receipts and readings agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from httpx import AsyncClient, Response
from psycopg import sql
from sqlalchemy.engine import URL

from reconciler.sweep import Pass, sweep
from talktime.store.database import Database
from tests.api.requests import Json, problem_of
from tests.api.server import json_of, serving
from tests.database import Clock
from tests.support import S, audit_lines

LEASE_US = 10 * S
ABANDON_US = 100 * S
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMES = {
    *("as_of", "server_time", "started_at", "stopped_at", "ended_at", "accrues_until", "paid_from", "free_until"),
    *("exhausts_at", "materialized_through", "happened_at", "recorded_at", "segment_started_at"),
}
# What passes by itself, or says how much is written down.
PASSING = ("as_of", "server_time", "materialized_through")
USER_TABLES = ("account", "allowance", "chat", "segment", "ledger_entry")


def without(shown: Json, *names: str) -> Json:
    assert set(names) <= set(shown)
    return {name: value for name, value in shown.items() if name not in names}


def in_seconds(us: int) -> str:
    return f"{Decimal(us) / S:f}"


def micro(amount: str) -> int:
    return int(Decimal(amount) * 1_000_000)


@dataclass
class Story:
    """One service, seen from outside. Every instant is in microseconds since `begin`."""

    client: AsyncClient
    database: Database
    clock: Clock
    begin: int
    credits_sent: list[str] = field(default_factory=list)

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, us: int) -> None:
        self.clock.set(self.begin + us)

    def shown(self, of: Json, *names: str) -> tuple[Json, ...]:
        """Return these figures of an answer, instants in microseconds since the begin."""
        return tuple(self._since(of[name]) if name in TIMES else of[name] for name in names)

    def _since(self, timestamp: str | None) -> int | None:
        if timestamp is None:
            return None
        assert timestamp.endswith("Z")
        assert len("2026-01-01T00:00:00.000000Z") == len(timestamp)
        return (datetime.fromisoformat(timestamp) - EPOCH) // timedelta(microseconds=1) - self.begin

    # --- what a service does ------------------------------------------------------------------------------------------

    async def card(
        self, rate: str, advisor_id: str = "a1", *, free_us: int = 0, first_us: int = 0, increment_us: int = 0
    ) -> None:
        # As text, because a float is not what a tariff is made of.
        body = (
            f'{{"credits_per_minute": "{rate}", "free_seconds": {in_seconds(free_us)},'
            f' "first_seconds": {in_seconds(first_us)}, "increment_seconds": {in_seconds(increment_us)}}}'
        )
        headers = {"Content-Type": "application/json"}
        json_of(await self.client.put(f"/v1/advisors/{advisor_id}", content=body, headers=headers))

    async def credit(
        self, amount: str, *, kind: str = "purchase", user_id: str = "u1", key: str | None = None
    ) -> Response:
        self.credits_sent.append(key or f"order-{len(self.credits_sent)}")
        return await self.client.post(
            f"/v1/users/{user_id}/credits",
            json={"kind": kind, "amount": amount},
            headers={"Idempotency-Key": self.credits_sent[-1]},
        )

    async def buy(self, amount: str, *, user_id: str = "u1") -> Json:
        return json_of(await self.credit(amount, user_id=user_id), 201)

    async def send(
        self, what: str, chat_id: str = "c1", *, user_id: str = "u1", advisor_id: str = "a1", key: str | None = None
    ) -> Response:
        return await self.client.post(
            f"/v1/users/{user_id}/chats/{chat_id}/{what}",
            json={"advisor_id": advisor_id} if what == "start" else None,
            headers={} if key is None else {"Idempotency-Key": key},
        )

    async def start(
        self, chat_id: str = "c1", *, user_id: str = "u1", advisor_id: str = "a1", key: str | None = None
    ) -> Json:
        return json_of(await self.send("start", chat_id, user_id=user_id, advisor_id=advisor_id, key=key))

    async def beat(self, chat_id: str = "c1", *, user_id: str = "u1") -> Json:
        return json_of(await self.send("heartbeat", chat_id, user_id=user_id))

    async def pause(self, chat_id: str = "c1", *, user_id: str = "u1") -> Json:
        return json_of(await self.send("pause", chat_id, user_id=user_id))

    async def stop(self, chat_id: str = "c1", *, user_id: str = "u1") -> Json:
        return json_of(await self.send("stop", chat_id, user_id=user_id))

    async def refused(self, what: str, status: int, code: str, chat_id: str = "c1", *, user_id: str = "u1") -> Json:
        return problem_of(await self.send(what, chat_id, user_id=user_id), status, code)

    async def beat_from(self, us: int, until_us: int, every_us: int, *chat_ids: str) -> None:
        """Beat at `us` and so on, before `until_us`."""
        for now in range(us, until_us, every_us):
            self.at(now)
            for chat_id in chat_ids or ("c1",):
                await self.beat(chat_id)

    # --- what is read -------------------------------------------------------------------------------------------------

    async def read(self, chat_id: str = "c1", *names: str, user_id: str = "u1") -> tuple[Json, ...]:
        """Return these figures of a chat's reading."""
        return self.shown(await self.reading(chat_id, user_id=user_id), *names)

    async def reading(self, chat_id: str = "c1", *, user_id: str = "u1") -> Json:
        return json_of(await self.client.get(f"/v1/users/{user_id}/chats/{chat_id}"))

    async def account(self, *, user_id: str = "u1") -> Json:
        return json_of(await self.client.get(f"/v1/users/{user_id}/account"))

    async def items(self, path: str, limit: int = 200, **filters: str) -> list[Json]:
        """Turn all pages of a list."""
        found: list[Json] = []
        query: dict[str, str | int] = {"limit": limit, **filters}
        while True:
            page = json_of(await self.client.get(path, params=query))
            found += page["items"]
            if page["next"] is None:
                return found
            query["cursor"] = page["next"]

    async def receipt(self, chat_id: str = "c1", *, user_id: str = "u1") -> list[Json]:
        return await self.items(f"/v1/users/{user_id}/chats/{chat_id}/segments")

    async def segments(self, chat_id: str = "c1", *, user_id: str = "u1") -> list[tuple[Json, ...]]:
        """Return each segment of a chat: from, to, why it ended, free and paid time, cost."""
        names = ("started_at", "ended_at", "stop_reason", "free_us", "paid_us", "cost")
        return [self.shown(item, *names) for item in await self.receipt(chat_id, user_id=user_id)]

    async def ledger(self, *, user_id: str = "u1") -> list[Json]:
        return await self.items(f"/v1/users/{user_id}/ledger")

    async def amounts(self, *, user_id: str = "u1") -> list[str]:
        """Return the amounts of the ledger as far as it is written, oldest first."""
        return [entry["amount"] for entry in reversed(await self.ledger(user_id=user_id))]

    async def everything(self) -> Json:
        """Read all that is computed, of all users; not how much of it is written down."""
        shown: Json = {}
        for user_id in self.users():
            account = await self.account(user_id=user_id)
            chats = await self.items(f"/v1/users/{user_id}/chats")
            shown[user_id] = (
                without({**account, "running": len(account["running"])}, "materialized_through"),
                [without(chat, "materialized_through") for chat in chats],
                [await self.receipt(chat["chat_id"], user_id=user_id) for chat in chats],
            )
        return shown

    # --- what is stored -----------------------------------------------------------------------------------------------

    def users(self) -> list[str]:
        return [user for (user,) in self.clock.connection.execute("SELECT user_id FROM account ORDER BY 1").fetchall()]

    def stored(self) -> dict[str, list[str]]:
        """Return all rows of all users."""
        return {
            table: [
                row
                for (row,) in self.clock.connection.execute(
                    sql.SQL("SELECT t::text FROM {} t ORDER BY 1").format(sql.Identifier(table))
                )
            ]
            for table in USER_TABLES
        }

    def stored_state(self, chat_id: str = "c1", *, user_id: str = "u1") -> str:
        """Return a chat's state as it is written down."""
        query = "SELECT state FROM chat WHERE user_id = %s AND chat_id = %s"
        row = self.clock.connection.execute(query, [user_id, chat_id]).fetchone()
        assert row
        return str(row[0])

    async def materialize(self) -> Pass:
        return await sweep(self.database, asyncio.Event())

    async def audit(self) -> list[str]:
        return await audit_lines(self.database)

    async def settle(self) -> None:
        """Check what must hold at the end of any story."""
        assert [] == await self.audit()
        before = await self.everything()
        assert 0 == (await self.materialize()).failed
        assert before == await self.everything()
        assert [] == await self.audit()
        written = self.stored()
        assert 0 == (await self.materialize()).failed
        assert written == self.stored()
        for user_id in self.users():
            await self._check_sums(user_id)

    async def _check_sums(self, user_id: str) -> None:
        """After a pass: one charge for each closed segment that cost something; all sums agree."""
        account, ledger = await self.account(user_id=user_id), (await self.ledger(user_id=user_id))[::-1]
        assert list(range(1, len(ledger) + 1)) == [entry["number"] for entry in ledger]
        balance = 0
        for entry in ledger:
            balance += micro(entry["amount"])
            assert balance == micro(entry["balance_after"])
        assert micro(account["balance"]) == balance - micro(account["accrued"])
        charges = []
        for chat in await self.items(f"/v1/users/{user_id}/chats"):
            receipt = await self.receipt(chat["chat_id"], user_id=user_id)
            assert chat["elapsed_us"] == sum(item["free_us"] + item["paid_us"] for item in receipt)
            assert chat["free_used_us"] == sum(item["free_us"] for item in receipt)
            assert micro(chat["credits_used"]) == sum(micro(item["cost"]) for item in receipt)
            charges += [
                (item["ended_at"], chat["chat_id"], item["started_at"], -micro(item["cost"]))
                for item in receipt
                if item["ended_at"] and micro(item["cost"])
            ]
        names = ("happened_at", "chat_id", "segment_started_at")
        written = [(*(e[name] for name in names), micro(e["amount"])) for e in ledger if e["kind"] == "charge"]
        assert sorted(charges) == sorted(written)


@asynccontextmanager
async def opened(
    url: URL,
    clock: Clock,
    *,
    lease_us: int = LEASE_US,
    abandon_us: int = ABANDON_US,
    scope: str = "advisor",
    begin: int | None = None,
) -> AsyncIterator[Story]:
    """Open a service with these settings; the story may go on in another one."""
    variables = {
        "TALKTIME_LEASE_SECONDS": in_seconds(lease_us),
        "TALKTIME_HEARTBEAT_SECONDS": in_seconds(max(1, lease_us // 4)),
        "TALKTIME_ABANDON_AFTER_SECONDS": in_seconds(abandon_us),
        "TALKTIME_EXCLUSIVE": scope,
    }
    async with serving(url, **variables) as client:
        database = Database(url, pool_size=8)
        try:
            yield Story(client, database, clock, clock.now if begin is None else begin)
        finally:
            await database.close()


@asynccontextmanager
async def told(
    url: URL, clock: Clock, *, lease_us: int = LEASE_US, abandon_us: int = ABANDON_US, scope: str = "advisor"
) -> AsyncIterator[Story]:
    """Tell a whole story, and check in the end what must hold after any."""
    async with opened(url, clock, lease_us=lease_us, abandon_us=abandon_us, scope=scope) as story:
        yield story
        await story.settle()
