"""Passes are recorded for operators, whether they are made once or repeat; and are passes all the same if not."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

import pytest

from reconciler.__main__ import _run as run_reconciler
from reconciler.sweep import repeat, sweep
from talktime import operating, operations
from talktime.meter.state import CreditKind
from talktime.store.database import Database
from tests.database import Clock, connect
from tests.support import CREDIT, S, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from talktime.operations import Service

AUDIT = argparse.Namespace(audit=True, json=False)
ONE_PASS = argparse.Namespace(audit=False, every=None, duration=None)


async def _start_chats(service: Service, users: int) -> None:
    for number in range(users):
        await operations.credit(service, f"u{number}", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
        await operations.start(service, f"u{number}", "c", advisor_id="a", key=None)


async def test_one_pass_is_recorded_with_what_it_did(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service:
        await _start_chats(service, 3)
        clock.tick(7 * S)
        assert 0 == await run_reconciler(ONE_PASS, Database(database_url), asyncio.Event())
        [made], _ = await operating.last_passes(service.database, limit=9)
    assert (clock.now, 7 * S, 3, 3, 0) == (made.began_at, made.lag_us, made.accounts, made.chats, made.failed)
    assert 0 < made.took_us < 60 * S


async def test_every_pass_of_a_repeating_reconciler_is_recorded(database_url: URL) -> None:
    async with open_service(database_url) as service:
        await repeat(service.database, asyncio.Event(), every_s=0.05, for_s=0.2)
        passes, _ = await operating.last_passes(service.database, limit=9)
    assert 4 == len(passes)
    assert passes == sorted(passes, key=lambda made: made.began_at, reverse=True)
    assert 4 == len({made.pass_id for made in passes})


async def test_a_pass_is_not_less_done_for_not_being_recorded(database_url: URL) -> None:
    with connect(database_url) as connection:
        connection.execute("DROP TABLE reconciler_pass")
    async with open_service(database_url) as service:
        await _start_chats(service, 2)
        assert 0 == await run_reconciler(ONE_PASS, Database(database_url), asyncio.Event())
        made = await repeat(service.database, asyncio.Event(), every_s=0.05, for_s=0.05)
    assert (2, 0) == (made.accounts, made.failed)


async def test_an_audit_is_recorded_with_what_it_found(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service:
        assert (await operating.from_outside(service.database)).last_audit is None
        await _start_chats(service, 3)
        assert 0 == await run_reconciler(AUDIT, Database(database_url), asyncio.Event())
        clean = (await operating.from_outside(service.database)).last_audit
        with connect(database_url) as connection:
            connection.execute("UPDATE account SET balance = balance + 1 WHERE user_id <> 'u0'")
        clock.tick(S)
        assert 1 == await run_reconciler(AUDIT, Database(database_url), asyncio.Event())
        found = (await operating.from_outside(service.database)).last_audit
    assert clean is not None
    assert found is not None
    assert (clock.now - S, 3, 0, 0) == (clean.ended_at, clean.accounts, clean.differing, clean.differences)
    assert (clock.now, 3, 2, 2) == (found.ended_at, found.accounts, found.differing, found.differences)
    assert 0 < found.took_us < 60 * S


async def test_an_audit_that_was_stopped_is_none(database_url: URL) -> None:
    stop = asyncio.Event()
    stop.set()
    async with open_service(database_url) as service:
        await _start_chats(service, 1)
        assert 1 == await run_reconciler(AUDIT, Database(database_url), stop)
        assert (await operating.from_outside(service.database)).last_audit is None


async def test_an_audit_of_what_cannot_be_written_is_an_audit_all_the_same(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(database_url) as connection:
        connection.execute("REVOKE INSERT ON reconciler_audit FROM talktime_app")
    assert 0 == await run_reconciler(AUDIT, Database(database_url), asyncio.Event())
    assert "the audit could not be recorded: the database does not allow" in caplog.text


async def test_a_sweep_alone_records_nothing(database_url: URL) -> None:
    async with open_service(database_url) as service:
        await sweep(service.database, asyncio.Event())
        assert [] == (await operating.last_passes(service.database, limit=9))[0]
