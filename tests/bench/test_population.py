"""What the benchmark writes into a database, by itself: users with chats and histories, and its two writers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from psycopg.errors import UndefinedColumn
from sqlalchemy.engine import URL, make_url

from reconciler.sweep import BATCHES_AT_ONCE, sweep
from talktime.store.database import Database
from tests.bench import interval_writer, set_based
from tests.bench.population import FREE_OF, Population, populate, user
from tests.bench.programs import BenchmarkFailed, Program, module, started
from tests.bench.service import url_environment
from tests.database import connect
from tests.support import audit_lines

USERS = 11

_SCHEMA = """
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
ORDER BY 1, 2, 3
"""


async def audited(url: URL) -> list[str]:
    database = Database(url)
    try:
        return await audit_lines(database)
    finally:
        await database.close()


async def passed(url: URL) -> int:
    database = Database(url)
    try:
        return (await sweep(database, asyncio.Event())).chats
    finally:
        await database.close()


def rows(url: URL, query: str) -> list[Any]:
    with connect(url) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize(("old_chats", "segments"), [(0, 1), (3, 4)], ids=["no history", "history"])
async def test_the_audit_finds_no_difference_in_a_population_before_and_after_a_pass(
    database_url: URL, old_chats: int, segments: int
) -> None:
    before = rows(database_url, _SCHEMA)
    populate(database_url, USERS, old_chats=old_chats, segments_each=segments)
    assert before == rows(database_url, _SCHEMA)
    assert [] == await audited(database_url)
    assert USERS == await passed(database_url)
    assert [] == await audited(database_url)


def test_a_population_has_the_chats_segments_and_charges_that_were_asked_for(database_url: URL) -> None:
    populate(database_url, USERS, old_chats=3, segments_each=4)
    states = dict(rows(database_url, "SELECT state, count(*) FROM chat GROUP BY state"))
    assert {"running": USERS, "ended": 3 * USERS} == states
    assert [(12 * USERS,)] == rows(database_url, "SELECT count(*) FROM segment")
    free = -(-USERS // FREE_OF)
    charges = rows(database_url, "SELECT count(*) FROM ledger_entry WHERE kind = 'charge'")
    assert [(12 * (USERS - free),)] == charges


def test_some_users_are_spread_evenly_and_none_is_named_twice() -> None:
    population = Population(make_url("postgresql://"), USERS)
    assert {user(0), user(3), user(7)} == set(population.some_users(3))
    everybody = [user(number) for number in range(USERS)]
    assert sorted(everybody) == sorted(population.some_users(1000))
    # In an order of their own, which is the same again.
    assert everybody != population.some_users(1000)
    assert population.some_users(1000) == population.some_users(1000)


@pytest.mark.parametrize("at_once", [1, BATCHES_AT_ONCE])
async def test_what_the_set_based_writer_writes_is_what_a_pass_would_write(database_url: URL, at_once: int) -> None:
    populate(database_url, USERS)
    async with set_based.open_connections(database_url) as connections:
        assert BATCHES_AT_ONCE == len(connections)
        batches = await set_based.batches_as_of_now(connections[0])
        assert USERS == await set_based.write(connections[:at_once], batches)
    # All rows of a pass, at the instant for which the values were computed: the audit derives each of them again.
    assert [(USERS,)] == rows(database_url, "SELECT count(*) FROM chat WHERE elapsed_us > 0 AND free_us + cost > 0")
    assert [(3,)] == rows(database_url, "SELECT count(*) FROM allowance WHERE used_us > 0")
    assert [(1, True)] == rows(
        database_url,
        "SELECT count(DISTINCT materialized_through), bool_and(materialized_through > due_at) FROM account",
    )
    assert [] == await audited(database_url)
    assert USERS == await passed(database_url)
    assert [] == await audited(database_url)


async def test_a_batch_that_cannot_be_written_fails_the_measurement(database_url: URL) -> None:
    populate(database_url, USERS)
    async with set_based.open_connections(database_url) as connections:
        batches = await set_based.batches_as_of_now(connections[0])
        with connect(database_url) as connection:
            connection.execute("ALTER TABLE chat RENAME COLUMN count_us TO counted_us")
        with pytest.raises(ExceptionGroup) as failed:
            await set_based.write(connections, batches)
    assert all(isinstance(error, UndefinedColumn) for error in failed.value.exceptions)


# --- the interval writer ----------------------------------------------------------------------------------------------


@contextmanager
def interval_writing(url: URL, folder: Path, chats: int) -> Iterator[Program]:
    """Run the writer as it is run: it is no part of the product, whose statements these tests hold to rules."""
    with connect(url) as connection:
        interval_writer.prepare(connection, chats)
    environment = url_environment(url)
    with started("writer", *module("tests.bench.interval_writer"), folder=folder, environment=environment) as program:
        yield program


@pytest.mark.parametrize("way", interval_writer.WAYS)
def test_an_interval_is_written_to_the_record_the_chat_and_the_user(
    database_url: URL, tmp_path: Path, way: str
) -> None:
    with interval_writing(database_url, tmp_path, 2) as writer:
        writer.ask(60, chats=1)
        with connect(database_url) as connection:
            connection.execute(
                "UPDATE interval_record SET free_s = %s WHERE record_id = 1", [interval_writer.FREE_S - 10]
            )
        for _ in range(2):
            assert 1 == writer.ask(60, way=way, timers=1, us=60_000_000)["chats"]
    # Of the free time ten seconds were left; the other five cost 12.5 cents, and a whole interval 37.5.
    assert [(30, interval_writer.FREE_S), (0, interval_writer.FREE_S)] == rows(
        database_url, "SELECT duration_s, free_s FROM interval_record ORDER BY record_id"
    )
    assert [(30, 12 + 37), (0, 0)] == rows(
        database_url, "SELECT duration_s, charged FROM interval_chat ORDER BY chat_id"
    )
    assert [(10**9 - 12 - 37,), (10**9,)] == rows(database_url, "SELECT credits FROM interval_user ORDER BY user_id")


def test_all_timers_that_fire_at_once_write_once_each(database_url: URL, tmp_path: Path) -> None:
    with interval_writing(database_url, tmp_path, 60) as writer:
        writer.ask(60, chats=60)
        made = writer.ask(60, way="statements", timers=60, us=60_000_000)
        # The first that was done is where the time begins.
        assert (60, 59) == (made["chats"], made["counted"])
        assert 0 < made["elapsed_us"] < 60_000_000
        assert [(60 * 15, 60)] == rows(
            database_url, "SELECT sum(duration_s), count(*) FILTER (WHERE duration_s = 15) FROM interval_record"
        )
        # And where the time is too short for all, those that were written are counted.
        made = writer.ask(60, way="statements", timers=60, us=0)
    assert [((60 + made["chats"]) * 15,)] == rows(database_url, "SELECT sum(duration_s) FROM interval_record")
    assert 1 <= made["chats"] <= interval_writer.CONNECTIONS
    free = f"SELECT count(*) FROM interval_record WHERE free_s < {interval_writer.FREE_S}"
    assert [(60 // FREE_OF,)] == rows(database_url, free)


def test_runs_go_on_with_other_chats_in_no_order(database_url: URL, tmp_path: Path) -> None:
    written = "SELECT record_id FROM interval_record WHERE duration_s > 0 ORDER BY record_id"
    with interval_writing(database_url, tmp_path, 60) as writer:
        writer.ask(60, chats=60)
        writer.ask(60, way="statements", timers=30, us=60_000_000)
        first = [record_id for (record_id,) in rows(database_url, written)]
        assert 30 == len(first)
        assert max(first) > 40
        writer.ask(60, way="statements", timers=30, us=60_000_000)
    assert 60 == len(rows(database_url, written))


def test_only_one_way_of_writing_does_not_wait_for_the_disk(database_url: URL, tmp_path: Path) -> None:
    with interval_writing(database_url, tmp_path, 1) as writer:
        writer.ask(60, chats=1)
        for _ in range(2):
            waiting = {
                way: writer.ask(60, way=way, timers=1, us=60_000_000)["synchronous_commit"]
                for way in interval_writer.WAYS
            }
            assert {"statements": "on", "transaction": "on", "unsafe": "off"} == waiting


@pytest.mark.parametrize(("way", "written_s"), [("statements", 15), ("transaction", 0)])
def test_an_interval_is_written_as_far_as_it_goes_unless_a_transaction_holds_it_together(
    database_url: URL, tmp_path: Path, way: str, written_s: int
) -> None:
    with interval_writing(database_url, tmp_path, 1) as writer:
        writer.ask(60, chats=1)
        with connect(database_url) as connection:
            connection.execute("DROP TABLE interval_user")
        with pytest.raises(BenchmarkFailed):
            writer.ask(60, way=way, timers=1, us=60_000_000)
    assert [(written_s,)] == rows(database_url, "SELECT duration_s FROM interval_record")


def test_a_timer_that_fails_fails_the_measurement(database_url: URL, tmp_path: Path) -> None:
    with interval_writing(database_url, tmp_path, 5) as writer:
        writer.ask(60, chats=5)
        with connect(database_url) as connection:
            connection.execute("DROP TABLE interval_user")
        with pytest.raises(BenchmarkFailed, match='relation "interval_user" does not exist'):
            writer.ask(60, way="statements", timers=5, us=60_000_000)
