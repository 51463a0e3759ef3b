"""Random histories over HTTP, on the real database, with the reconciler passing at random moments.

After each step every reading of every chat must be the reference's, to the microsecond and the micro-credit. The clock
is the tests' own and leases are microseconds long; the product does not know.

``TALKTIME_TEST_HISTORIES`` says how many histories to run (default 12); a failing one names itself, and
``uv run pytest tests/acceptance -k 'history-7-'`` runs it alone.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime.store.database import Database
from tests.api.server import serving
from tests.database import Clock
from tests.meter import reference
from tests.meter.histories import BLOCKS, CHATS, KINDS, RATES, SCOPES, Card, Settings, Step
from tests.meter.pair import HORIZON_US, apply_to_reference
from tests.meter.reference import BEYOND, Reference
from tests.support import audit_lines

USERS = ("ann", "bob")
STEPS = 60
LIKELY = ("start",) * 5 + ("heartbeat",) * 6 + ("credit",) * 3 + ("pass",) * 2 + ("pause", "stop", "card")
REFUSALS = {
    reference.UnknownChat: (404, "chat-not-found"),
    reference.WrongAdvisor: (409, "wrong-advisor"),
    reference.ChatNotActive: (409, "chat-not-active"),
    reference.InsufficientBalance: (409, "insufficient-balance"),
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _seconds(us: int) -> str:
    return f"{Decimal(us) / 1_000_000:f}"


def _credits(micro: int) -> str:
    return f"{Decimal(micro) / 1_000_000:.6f}"


def _us(timestamp: str | None) -> int | None:
    if timestamp is None:
        return None
    assert timestamp.endswith("Z")
    return (datetime.fromisoformat(timestamp) - EPOCH) // timedelta(microseconds=1)


def _micro(amount: str) -> int:
    whole, decimals = amount.split(".")
    assert len(decimals) == 6
    return int(whole + decimals)


@dataclass
class World:
    """Both sides: the service behind HTTP, and a reference for each user who has an account."""

    client: httpx.AsyncClient
    database: Database
    clock: Clock
    settings: Settings
    rng: random.Random
    cards: dict[str, Card] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)
    keys: int = 0

    async def put_card(self, advisor_id: str) -> None:
        card = Card(self.rng.choice(RATES), *self.rng.choice(BLOCKS), self.rng.choice((0, 1, 5, 13, 40)))
        body = (
            f'{{"credits_per_minute": "{_credits(card.rate)}", "free_seconds": {_seconds(card.free_us)},'
            f' "first_seconds": {_seconds(card.first_us)}, "increment_seconds": {_seconds(card.increment_us)}}}'
        )
        headers = {"Content-Type": "application/json"}
        answer = await self.client.put(f"/v1/advisors/{advisor_id}", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        self.cards[advisor_id] = card

    async def step(self) -> None:
        """Let something happen, on both sides."""
        rng = self.rng
        wait_us = rng.choice((0, 0, 1, 2, 3, 5, 8, 13, 30, 60, -4))
        self.clock.set(self.clock.now + wait_us)
        user_id, chat_id = rng.choice(USERS), rng.choice(sorted(CHATS))
        what = rng.choice(LIKELY)
        if what == "card":
            await self.put_card(CHATS[chat_id])
        elif what == "pass":
            await self.materialize()
        elif what == "credit":
            step = Step(0, what, kind=rng.choice(KINDS), amount=rng.choice((1, 2, 9, 30, 200)))
            self.keys += 1
            for _ in range(rng.choice((1, 1, 2))):  # repeated, it must have no further effect
                answer = await self.client.post(
                    f"/v1/users/{user_id}/credits",
                    json={"kind": step.kind, "amount": _credits(step.amount)},
                    headers={"Idempotency-Key": f"credit-{self.keys}"},
                )
            self.mirror(user_id, step, answer, 201)
        else:
            step = Step(0, what, chat_id=chat_id, key=rng.choice((None, "k1", "k2")) if what == "start" else None)
            answer = await self.client.post(
                f"/v1/users/{user_id}/chats/{chat_id}/{what}",
                json={"advisor_id": CHATS[chat_id]} if what == "start" else None,
                headers={} if step.key is None else {"Idempotency-Key": step.key},
            )
            self.mirror(user_id, step, answer, 200)

    def mirror(self, user_id: str, step: Step, answer: httpx.Response, success: int) -> None:
        now = self.clock.now
        before = self.references.get(user_id)
        target = Reference(now) if before is None else before.copy()
        refusal: Exception | None = None
        try:
            if step.what != "heartbeat" or not target.fast_heartbeat(now, step.chat_id):
                apply_to_reference(target, step, now, self.settings, self.cards)
        except tuple(REFUSALS) as error:
            refusal = error
        if refusal is not None:
            assert REFUSALS[type(refusal)] == (answer.status_code, answer.json()["code"]), answer.text
            if isinstance(refusal, reference.ChatNotActive):
                assert before is not None
                _compare(answer.json()["reading"], before.reading(now, step.chat_id, horizon_us=HORIZON_US))
            return
        assert success == answer.status_code, answer.text
        self.references[user_id] = target
        if step.what != "credit":
            _compare(answer.json(), target.reading(now, step.chat_id, horizon_us=HORIZON_US))

    async def materialize(self) -> None:
        await asyncio.gather(*(sweep(self.database, asyncio.Event()) for _ in range(self.rng.choice((1, 1, 2)))))
        for user_id, target in self.references.items():
            account = (await self.client.get(f"/v1/users/{user_id}/account")).json()
            through = _us(account["materialized_through"])
            assert through is not None
            target.advance(max(through, target.at))

    async def compare(self) -> None:
        now = self.clock.now
        for user_id, target in self.references.items():
            answers = await asyncio.gather(
                *(self.client.get(f"/v1/users/{user_id}/chats/{chat_id}") for chat_id in target.chats)
            )
            for chat_id, answer in zip(target.chats, answers, strict=True):
                assert 200 == answer.status_code, answer.text
                _compare(answer.json(), target.reading(now, chat_id, horizon_us=HORIZON_US))

    async def compare_receipts(self) -> None:
        now = self.clock.now
        for user_id, target in self.references.items():
            view = target.copy()
            view.advance(max(now, view.at))
            for chat_id in view.chats:
                page = (await self.client.get(f"/v1/users/{user_id}/chats/{chat_id}/segments?limit=200")).json()
                closed = [item for item in page["items"] if item["ended_at"] is not None]
                expected = [
                    (s.started_at, s.ended_at, s.reason, s.free_us, s.paid_us, s.cost)
                    for s in view.segments
                    if s.chat_id == chat_id
                ]
                assert expected == [
                    (
                        _us(item["started_at"]),
                        _us(item["ended_at"]),
                        item["stop_reason"],
                        item["free_us"],
                        item["paid_us"],
                        _micro(item["cost"]),
                    )
                    for item in closed
                ]


def _compare(shown: dict[str, Any], expected: dict[str, object]) -> None:
    tariff = expected["tariff"]
    assert isinstance(tariff, reference.Tariff)
    as_of = _us(shown["as_of"])
    assert as_of is not None
    figures = {
        **{name: shown[name] for name in ("state", "accruing", "revision", "stop_reason")},
        **{name: shown[name] for name in ("elapsed_us", "free_used_us", "free_left_us", "count_us")},
        **{name: _micro(shown[name]) for name in ("credits_used", "balance")},
        **{
            name: _us(shown[name])
            for name in ("accrues_until", "paid_from", "free_until", "exhausts_at", "started_at", "stopped_at")
        },
        "as_of": as_of,
        "tariff": reference.Tariff(
            _micro(shown["tariff"]["credits_per_minute"]),
            int(Decimal(str(shown["tariff"]["first_seconds"])) * 1_000_000),
            int(Decimal(str(shown["tariff"]["increment_seconds"])) * 1_000_000),
        ),
    }
    for name, value in expected.items():
        if value is BEYOND:
            assert figures[name] is None or figures[name] > as_of + HORIZON_US, name
            figures[name] = value
    assert expected == figures


@pytest.mark.parametrize(
    "seed", [pytest.param(n, id=f"history-{n}-") for n in range(int(os.environ.get("TALKTIME_TEST_HISTORIES", "12")))]
)
async def test_every_reading_of_a_random_history_is_the_references(database_url: URL, clock: Clock, seed: int) -> None:
    rng = random.Random(seed)
    settings = Settings(rng.choice(SCOPES), lease_us := rng.choice((2, 4, 20, 50)), lease_us + rng.choice((1, 10, 60)))
    async with serving(
        database_url,
        TALKTIME_EXCLUSIVE=settings.scope,
        TALKTIME_LEASE_SECONDS=_seconds(settings.lease_us),
        TALKTIME_HEARTBEAT_SECONDS=_seconds(1),
        TALKTIME_ABANDON_AFTER_SECONDS=_seconds(settings.abandon_after_us),
    ) as client:
        database = Database(database_url, pool_size=8)
        world = World(client, database, clock, settings, rng)
        try:
            for advisor_id in sorted(set(CHATS.values())):
                await world.put_card(advisor_id)
            for _ in range(STEPS):
                await world.step()
                await world.compare()
            await world.compare_receipts()
            assert not await audit_lines(database)
            await world.materialize()
            await world.compare()
            await world.compare_receipts()
            assert not await audit_lines(database)
        finally:
            await database.close()
