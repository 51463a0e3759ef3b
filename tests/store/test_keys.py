"""How keys and sessions are written: alone, and so that two who write at once do not harm each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection

from talktime import keys
from talktime.store import keys as store
from talktime.store.database import Database
from tests.sql_rules import GLOBAL_TABLES, tables_written
from tests.support import until_blocked


@pytest.fixture
async def database(database_url: URL) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


async def test_each_change_is_a_transaction_that_writes_one_global_table(database: Database) -> None:
    written: list[set[str]] = [set()]

    def note(*arguments: object) -> None:
        written[-1] |= tables_written(str(arguments[2]))

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    event.listen(database.engine.sync_engine, "commit", lambda _: written.append(set()))
    await keys.new_key(database, "k")
    await keys.revoke_key(database, "k")
    token = await keys.open_session(database, b"d", seconds=60)
    await keys.close_session(database, token)

    assert [{"service_key"}, {"service_key"}, {"console_session"}, {"console_session"}] == [w for w in written if w]
    assert {"service_key", "console_session"} <= GLOBAL_TABLES


async def test_of_two_that_revoke_a_key_at_once_the_first_says_when(database: Database, database_url: URL) -> None:
    await keys.new_key(database, "k")
    held, go_on = asyncio.Event(), asyncio.Event()

    async def slow(connection: AsyncConnection) -> bool:
        first = await store.revoke_key(connection, "k", 1_000_000)
        held.set()
        await go_on.wait()
        return first

    first = asyncio.create_task(database.transaction(slow))
    await held.wait()
    second = asyncio.create_task(database.transaction(lambda connection: store.revoke_key(connection, "k", 2_000_000)))
    await until_blocked(database_url)
    go_on.set()

    assert (True, False) == (await first, await second)
    assert [1_000_000] == [key.revoked_at for key in await keys.list_keys(database)]


async def test_a_key_whose_making_is_rolled_back_is_not_there(database: Database) -> None:
    class Interrupted(Exception):
        pass

    async def work(connection: AsyncConnection) -> None:
        assert await store.insert_key(connection, "k", b"d", 1)
        assert not await store.insert_key(connection, "k", b"e", 1)
        raise Interrupted

    with pytest.raises(Interrupted):
        await database.transaction(work)

    assert {} == await keys.active_keys(database)
    await keys.new_key(database, "k")
