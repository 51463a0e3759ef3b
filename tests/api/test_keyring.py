"""The service keys in memory: never older than five seconds, and no more questions to the database than need be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest
from sqlalchemy import event
from sqlalchemy.engine import URL

from talktime.api.keyring import KeyRing
from talktime.errors import DatabaseUnavailable
from talktime.keys import active_keys, digest_of, new_key, revoke_key
from talktime.store.database import Database
from tests.api.conftest import CLOSED_PORT

KEY = "the-key-of-the-environment"


class Ring:
    """A key ring on a database, with seconds that pass as the test says, and a count of the questions."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.seconds = 1_000.0
        self.asked = 0
        self.ring = KeyRing(KEY, self._load, ticks=lambda: self.seconds)

    async def _load(self) -> Mapping[bytes, str]:
        self.asked += 1
        return await active_keys(self.database)

    async def name(self, key: str) -> str | None:
        return await self.ring.find(digest_of(key))


@pytest.fixture
async def ring(database_url: URL) -> AsyncIterator[Ring]:
    database = Database(database_url)
    yield Ring(database)
    await database.close()


@pytest.fixture
async def lonely() -> AsyncIterator[Ring]:
    """A ring whose database is away."""
    database = Database(CLOSED_PORT)
    yield Ring(database)
    await database.close()


async def test_the_key_of_the_environment_needs_no_database(lonely: Ring) -> None:
    assert "environment" == await lonely.name(KEY)
    assert 0 == lonely.asked


async def test_without_a_key_of_the_environment_there_is_none(ring: Ring) -> None:
    without = KeyRing(None, ring._load)

    assert not without.is_environment(digest_of(""))
    assert await without.find(digest_of(KEY)) is None


async def test_a_key_of_the_database_is_asked_for_once_in_five_seconds(ring: Ring) -> None:
    key = await new_key(ring.database, "gateway")
    for seconds in (0, 4.9, 0.1, 4.9, 0.1):
        ring.seconds += seconds
        assert "gateway" == await ring.name(key)
    assert 3 == ring.asked


async def test_a_revoked_key_is_refused_within_five_seconds(ring: Ring) -> None:
    key = await new_key(ring.database, "gateway")
    await ring.name(key)
    await revoke_key(ring.database, "gateway")
    ring.seconds += 4.999
    assert "gateway" == await ring.name(key)
    ring.seconds += 0.001
    assert await ring.name(key) is None


async def test_a_new_key_is_known_at_once(ring: Ring) -> None:
    first = await new_key(ring.database, "first")
    assert "first" == await ring.name(first)
    second = await new_key(ring.database, "second")

    assert "second" == await ring.name(second)
    assert 2 == ring.asked


async def test_keys_that_are_not_known_ask_the_database_once_a_second(ring: Ring) -> None:
    for number in range(100):
        assert await ring.name(f"tt_{number}") is None
    assert 1 == ring.asked
    ring.seconds += 1
    for number in range(100):
        assert await ring.name(f"tt_{number}") is None
    assert 2 == ring.asked


async def test_many_at_once_ask_one_question(ring: Ring) -> None:
    key = await new_key(ring.database, "gateway")
    queries = 0

    def count(*_: object) -> None:
        nonlocal queries
        queries += 1

    event.listen(ring.database.engine.sync_engine, "before_cursor_execute", count)
    wanted = [key if number % 2 else f"tt_{number}" for number in range(50)]
    names = await asyncio.gather(*map(ring.name, wanted))

    assert ["gateway" if number % 2 else None for number in range(50)] == names
    assert (1, 1) == (ring.asked, queries)


async def test_a_database_that_is_away_is_told_and_not_asked_by_everybody(lonely: Ring) -> None:
    refused = await asyncio.gather(*(lonely.name(f"tt_{n}") for n in range(50)), return_exceptions=True)

    assert {DatabaseUnavailable} == {type(error) for error in refused}
    assert 1 == lonely.asked
    lonely.seconds += 1
    with pytest.raises(DatabaseUnavailable):
        await lonely.name("tt_x")
    assert 2 == lonely.asked


async def test_what_is_known_stays_known_for_five_seconds_without_the_database(ring: Ring, lonely: Ring) -> None:
    key = await new_key(ring.database, "gateway")
    await ring.name(key)
    ring.database, there = lonely.database, ring.database
    ring.seconds += 4.9
    assert "gateway" == await ring.name(key)
    with pytest.raises(DatabaseUnavailable):
        await ring.name("tt_unknown")
    assert "gateway" == await ring.name(key)
    ring.seconds += 0.1
    with pytest.raises(DatabaseUnavailable):
        await ring.name(key)

    ring.database = there
    ring.seconds += 1
    assert "gateway" == await ring.name(key)


async def test_one_who_goes_away_while_asking_leaves_the_question_to_the_next(ring: Ring) -> None:
    key = await new_key(ring.database, "gateway")
    first = asyncio.create_task(ring.name(key))
    second = asyncio.create_task(ring.name(key))
    await asyncio.sleep(0)
    first.cancel()

    assert "gateway" == await second
    with pytest.raises(asyncio.CancelledError):
        await first
