"""Sessions whose process falls silent in a transaction: PostgreSQL ends them, and their locks with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import insert, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection

from talktime.store import database
from talktime.store.accounts import lock, lock_or_create, save
from talktime.store.database import Database
from talktime.store.sending import driver_of, send
from talktime.store.statements import LOCK_ACCOUNT
from talktime.store.tables import advisor, bucket_of
from tests.database import connect
from tests.program import PATIENCE_S

Silence = Callable[[AsyncConnection], Awaitable[None]]

USER = "u1"
THAT_ACCOUNT = {"in_bucket": bucket_of(USER), "of_user": USER}


async def after_locking(connection: AsyncConnection) -> None:
    await lock(connection, USER)


async def after_writing(connection: AsyncConnection) -> None:
    locked = await lock(connection, USER)
    assert locked
    stored, now = locked
    await save(connection, [(stored, stored.account._replace(at=now))])


async def after_a_statement_with_many_rows(connection: AsyncConnection) -> None:
    await lock(connection, USER)
    figures = {"rate": 0, "first_us": 0, "increment_us": 0, "free_us": 0}
    await connection.execute(insert(advisor), [{"advisor_id": f"a{n}", **figures} for n in range(3)])


async def with_a_statement_half_sent(connection: AsyncConnection) -> None:
    """Send all of a statement but the Sync behind it, which PostgreSQL waits for."""
    await lock(connection, USER)
    driver = await driver_of(connection)
    async with driver.pipeline():
        await send(driver, LOCK_ACCOUNT, THAT_ACCOUNT)
        await asyncio.sleep(PATIENCE_S)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PostgreSQL lose patience soon, and the process never."""
    monkeypatch.setattr(database, "TRANSACTION_SECONDS_MAX", 2 * PATIENCE_S)


def limit(monkeypatch: pytest.MonkeyPatch, *, idle: str, transaction: str) -> None:
    monkeypatch.setattr(database, "_SESSION", database._SESSION.replace("'20s'", f"'{idle}'"))
    monkeypatch.setattr(
        database, "_LIMIT_TRANSACTIONS", database._LIMIT_TRANSACTIONS.replace("'30s'", f"'{transaction}'")
    )


@asynccontextmanager
async def silent(url: URL, silence: Silence) -> AsyncIterator[int]:
    """Yield the backend of a session that does so much of a transaction, and then nothing for a long time."""
    made = Database(url)
    pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work(connection: AsyncConnection) -> None:
        pid.set_result(await connection.scalar(text("SELECT pg_backend_pid()")))
        await silence(connection)
        await asyncio.sleep(PATIENCE_S)

    try:
        await made.transaction(lambda connection: lock_or_create(connection, USER))
        task = asyncio.create_task(made.transaction(work))
        try:
            yield await pid
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    finally:
        await made.close()


async def until_ended(url: URL, pid: int) -> None:
    with connect(url) as connection:
        async with asyncio.timeout(PATIENCE_S):
            while connection.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall():  # noqa: ASYNC110 - PostgreSQL has no event for it
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("silence", [after_locking, after_writing, after_a_statement_with_many_rows])
async def test_a_session_that_idles_in_a_transaction_is_ended_whatever_it_sent_last(
    database_url: URL, monkeypatch: pytest.MonkeyPatch, silence: Silence
) -> None:
    limit(monkeypatch, idle="300ms", transaction="0")
    async with silent(database_url, silence) as pid:
        await until_ended(database_url, pid)


async def test_a_session_that_is_waited_for_in_the_middle_of_a_statement_is_ended_where_postgresql_can(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, idle="300ms", transaction="600ms")
    with connect(database_url) as connection:
        can = connection.info.server_version >= 170000
    async with silent(database_url, with_a_statement_half_sent) as pid:
        if can:
            await until_ended(database_url, pid)
        else:
            await asyncio.sleep(1)
            with connect(database_url) as connection:
                [(state,)] = connection.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall()
            assert state == "active"


async def test_a_patient_snapshot_has_all_the_time_it_takes(database_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, idle="0", transaction="300ms")
    made = Database(database_url)
    try:
        sleep = text("SELECT pg_sleep(1)")
        await made.snapshot(lambda connection: connection.execute(sleep), patient=True)
    finally:
        await made.close()
