"""Service keys and console sessions, on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.engine import URL

from talktime.errors import DatabaseUnavailable, InvalidKeyName, KeyNameTaken, KeyNotFound
from talktime.keys import (
    ServiceKey,
    active_keys,
    close_session,
    digest_of,
    find_session,
    list_keys,
    new_key,
    open_session,
    revoke_key,
)
from talktime.store.database import Database
from tests.database import Clock, connect
from tests.support import S


@pytest.fixture
async def database(clock: Clock, database_url: URL) -> AsyncIterator[Database]:
    """The test's database, on simulated time."""
    database = Database(database_url)
    yield database
    await database.close()


def rows(url: URL, table: str) -> list[str]:
    with connect(url) as connection:
        return [row for (row,) in connection.execute(f"SELECT t::text FROM {table} t ORDER BY 1".encode())]


# --- service keys -----------------------------------------------------------------------------------------------------


async def test_a_new_key_is_in_force_under_its_name(database: Database) -> None:
    key = await new_key(database, "gateway")

    assert key.startswith("tt_")
    assert 46 == len(key)
    assert {digest_of(key): "gateway"} == await active_keys(database)


async def test_only_the_digest_of_a_key_is_stored(database: Database, database_url: URL) -> None:
    key = await new_key(database, "gateway")
    [row] = rows(database_url, "service_key")

    assert key[3:] not in row
    assert digest_of(key).hex() in row


async def test_keys_are_listed_from_the_oldest_on_with_their_instants(database: Database, clock: Clock) -> None:
    begin = clock.now
    await new_key(database, "z")
    clock.tick(1 * S)
    await new_key(database, "a")
    clock.tick(1 * S)
    await revoke_key(database, "z")

    assert [ServiceKey("z", begin, begin + 2 * S), ServiceKey("a", begin + 1 * S, None)] == await list_keys(database)


async def test_a_revoked_key_is_not_in_force(database: Database) -> None:
    gone, stays = await new_key(database, "gone"), await new_key(database, "stays")
    await revoke_key(database, "gone")

    assert {digest_of(stays): "stays"} == await active_keys(database)
    assert gone != stays


async def test_revoking_again_keeps_the_first_instant(database: Database, clock: Clock) -> None:
    await new_key(database, "k")
    revoked_at = clock.now
    await revoke_key(database, "k")
    clock.tick(5 * S)
    await revoke_key(database, "k")

    assert [revoked_at] == [key.revoked_at for key in await list_keys(database)]


async def test_a_key_that_is_not_there_cannot_be_revoked(database: Database) -> None:
    with pytest.raises(KeyNotFound, match="'k'"):
        await revoke_key(database, "k")


@pytest.mark.parametrize("revoked", [True, False])
async def test_a_name_is_given_once_and_for_ever(database: Database, *, revoked: bool) -> None:
    first = await new_key(database, "k")
    if revoked:
        await revoke_key(database, "k")
    with pytest.raises(KeyNameTaken, match="'k'"):
        await new_key(database, "k")

    assert ({} if revoked else {digest_of(first): "k"}) == await active_keys(database)


async def test_of_many_that_want_one_name_at_once_one_gets_it(database: Database) -> None:
    made = await asyncio.gather(*(new_key(database, "k") for _ in range(10)), return_exceptions=True)
    [key] = [key for key in made if isinstance(key, str)]

    assert 9 == sum(isinstance(error, KeyNameTaken) for error in made)
    assert {digest_of(key): "k"} == await active_keys(database)


@pytest.mark.parametrize("name", ["a", "x" * 64, "Az09-_.:@+=~|", "...", "Environment"])
async def test_names_are_ids(database: Database, name: str) -> None:
    await new_key(database, name)

    assert [name] == [key.name for key in await list_keys(database)]


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "é", "a\n", "\0", ".", "..", "environment"])
async def test_what_is_no_name_is_refused(database: Database, name: str) -> None:
    with pytest.raises(InvalidKeyName):
        await new_key(database, name)

    assert [] == await list_keys(database)


async def test_a_database_that_is_away_is_told_as_such() -> None:
    database = Database("postgresql+psycopg://nobody:nothing@127.0.0.1:1/nowhere")
    try:
        with pytest.raises(DatabaseUnavailable):
            await new_key(database, "k")
        with pytest.raises(DatabaseUnavailable):
            await active_keys(database)
    finally:
        await database.close()


# --- console sessions -------------------------------------------------------------------------------------------------


async def test_a_session_leads_to_the_key_that_opened_it_until_it_expires(database: Database, clock: Clock) -> None:
    token = await open_session(database, b"a key", seconds=60)
    clock.tick(60 * S - 1)
    assert b"a key" == await find_session(database, token)
    clock.tick(1)
    assert await find_session(database, token) is None


async def test_a_session_is_stored_by_its_digest_alone(database: Database, database_url: URL) -> None:
    token = await open_session(database, b"a key", seconds=60)
    [row] = rows(database_url, "console_session")

    assert token not in row
    assert digest_of(token).hex() in row


async def test_a_closed_session_is_over_and_the_others_go_on(database: Database) -> None:
    closed, other = [await open_session(database, b"a key", seconds=60) for _ in range(2)]
    await close_session(database, closed)
    await close_session(database, closed)

    assert [None, b"a key"] == [await find_session(database, token) for token in (closed, other)]


async def test_a_new_session_sweeps_out_the_expired_ones(database: Database, database_url: URL, clock: Clock) -> None:
    for seconds in (10, 20, 30):
        await open_session(database, b"a key", seconds=seconds)
    clock.tick(20 * S)
    await open_session(database, b"a key", seconds=1)

    assert 2 == len(rows(database_url, "console_session"))


@pytest.mark.parametrize("token", ["", "x", "é", "\ud800", "\0", "' OR true --"])
async def test_an_unknown_token_is_no_session(database: Database, token: str) -> None:
    await open_session(database, b"a key", seconds=60)

    assert await find_session(database, token) is None
