"""What tests of the database share: a service on it, and looks from outside."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from reconciler.audit import audit
from talktime.meter.state import Policy, RateCard, Scope, Tariff
from talktime.operations import Service
from talktime.store.database import Database
from tests.database import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.engine import URL

S = 1_000_000
CREDIT = 1_000_000
POLICY = Policy(Scope.ADVISOR, 15 * S, 300 * S)
FREE_OF_CHARGE = RateCard(Tariff(0), 0)
ONE_A_SECOND = RateCard(Tariff(60 * CREDIT), 0)


@asynccontextmanager
async def open_service(
    url: URL, *, policy: Policy = POLICY, card: RateCard = ONE_A_SECOND, low_us: int | None = None
) -> AsyncIterator[Service]:
    """Open a service on a database; its connections are closed at the end."""
    database = Database(url)
    try:
        yield Service(database, policy, card, low_us)
    finally:
        await database.close()


async def until_blocked(url: URL, count: int = 1) -> None:
    """Wait until so many of the database's sessions wait for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock' AND state = 'active'"
    )
    with connect(url) as connection:
        for _ in range(3000):  # where a program has to start first, on a busy machine, it takes a while
            row = connection.execute(query).fetchone()
            if row and row[0] >= count:
                return
            await asyncio.sleep(0.01)
    pytest.fail("nobody waits for a lock")


async def audit_lines(database: Database) -> list[str]:
    """Return what the audit finds."""
    lines: list[str] = []
    made = await audit(
        database,
        asyncio.Event(),
        report=lambda findings: lines.extend(findings.lines()),
        progress=lambda _done, _total: None,
    )
    assert made.finished
    return lines
