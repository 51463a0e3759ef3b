"""An account that has seen it all, built by use cases on a simulated clock; kept, so that it can be tampered with."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from reconciler.audit import audit
from reconciler.sweep import sweep
from talktime import operations
from talktime.meter.state import ChatState, CreditKind, RateCard, Scope, Tariff
from talktime.store.database import Database
from tests.database import Clock, connect
from tests.support import CREDIT, POLICY, S, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from reconciler.differences import Findings
    from talktime.operations import Service

TABLES = (
    *("account", "allowance", "chat", "segment", "ledger_entry"),
    *("opening_account", "opening_allowance", "opening_chat"),
    "event",
)
BLOCKS = RateCard(Tariff(60 * CREDIT, 5 * S, 5 * S), 10 * S)
EXACT = RateCard(Tariff(60 * CREDIT), 0)
FREE = RateCard(Tariff(60 * CREDIT), 100 * S)


async def build(url: URL, clock: Clock) -> None:
    """Let two users live, `u` in every way and `v` plainly; nothing differs at the end."""
    async with open_service(url) as service:
        for advisor_id, card in (("blocks", BLOCKS), ("exact", EXACT), ("free", FREE)):
            await operations.put_advisor(service, advisor_id, card)
        for user_id in "uv":
            await _credit(service, user_id, CreditKind.PURCHASE, 200 * CREDIT)
        await operations.start(service, "v", "plain", advisor_id="exact", key=None)
        await _live(service, clock)
        assert {
            "abandoned": ChatState.ABANDONED,
            "ended": ChatState.ENDED,
            "exhausted": ChatState.EXHAUSTED,
            "free": ChatState.PAUSED,
            "lapsed": ChatState.LAPSED,
            "left": ChatState.PAUSED,
            "refused": ChatState.EXHAUSTED,
            "running": ChatState.RUNNING,
            "senior": ChatState.ENDED,
        } == {
            reading.chat_id: reading.state
            for reading in (await operations.read_chats(service, "u", state=None, after=None, limit=20))[0]
        }


async def _live(service: Service, clock: Clock) -> None:
    clock.tick(S)
    await operations.start(service, "u", "abandoned", advisor_id="blocks", key="k")
    clock.tick(4 * S)
    # In parallel, so that the last free seconds are shared.
    await operations.start(
        replace(service, policy=POLICY._replace(scope=Scope.NONE)), "u", "senior", advisor_id="blocks", key=None
    )
    clock.tick(6 * S)
    await operations.heartbeat(service, "u", "abandoned")
    await operations.heartbeat(service, "u", "senior")
    await operations.pause(service, "u", "abandoned")
    clock.tick(7 * S)
    await operations.start(service, "u", "ended", advisor_id="blocks", key=None)  # switches away from senior
    await sweep(service.database, asyncio.Event())
    clock.tick(20 * S)  # lapses after 15
    await operations.heartbeat(service, "u", "ended")  # and goes on
    clock.tick(3 * S)
    await operations.stop(service, "u", "ended")
    await operations.stop(service, "u", "senior")
    await operations.start(service, "u", "exhausted", advisor_id="exact", key=None)
    clock.tick(5 * S)
    balance = (await operations.read_account(service, "u")).balance
    await _credit(service, "u", CreditKind.CORRECTION, balance - 3 * CREDIT)
    clock.tick(5 * S)  # exhausted after 3
    await operations.start(service, "u", "refused", advisor_id="exact", key=None)
    await operations.start(service, "u", "free", advisor_id="free", key=None)
    clock.tick(9 * S)
    await operations.pause(service, "u", "free")
    await _credit(service, "u", CreditKind.GRANT, 500 * CREDIT)
    clock.tick(250 * S)
    for chat_id in ("exhausted", "refused", "free"):
        await operations.pause(service, "u", chat_id)  # a sign of life
    clock.tick(60 * S)
    await operations.start(service, "u", "left", advisor_id="exact", key=None)
    clock.tick(4 * S)
    await operations.pause(service, "u", "left")
    clock.tick(4 * S)
    await operations.start(service, "u", "left", advisor_id="exact", key=None)
    clock.tick(4 * S)
    await operations.pause(service, "u", "left")
    await operations.start(service, "u", "lapsed", advisor_id="exact", key=None)
    clock.tick(20 * S)
    await operations.start(service, "u", "running", advisor_id="blocks", key=None)
    await _credit(service, "u", CreditKind.REFUND, 7 * CREDIT)
    clock.tick(6 * S)
    await operations.heartbeat(service, "u", "running")
    clock.tick(2 * S)
    await sweep(service.database, asyncio.Event())


async def _credit(service: Service, user_id: str, kind: CreditKind, amount: int) -> None:
    await operations.credit(service, user_id, kind=kind, amount=amount, memo="a memo", key=f"{kind}-{amount}")


def keep(url: URL) -> None:
    """Keep a copy of all rows, to go back to."""
    with connect(url) as connection:
        for table in TABLES:
            connection.execute(f"CREATE TABLE kept_{table} AS TABLE {table}")


def restore(url: URL) -> None:
    """Go back to the rows that were kept."""
    with connect(url) as connection, connection.transaction():
        connection.execute(f"TRUNCATE {', '.join(TABLES)}")
        for table in TABLES:
            connection.execute(f"INSERT INTO {table} TABLE kept_{table}")


async def found_in(url: URL, *, batch_accounts: int = 200) -> list[Findings]:
    """Return what an audit finds."""
    database = Database(url)
    found: list[Findings] = []
    try:
        await audit(
            database,
            asyncio.Event(),
            report=found.append,
            progress=lambda _done, _total: None,
            batch_accounts=batch_accounts,
        )
    finally:
        await database.close()
    return found
