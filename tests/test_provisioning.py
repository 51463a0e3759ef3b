"""The test databases themselves: clones are separate, and simulated time reaches whoever asks for the time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy.engine import URL

from tests.database import SIMULATED_START_US, Clock, Databases, connect

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR_US = 3_600_000_000


def time_of(connection: psycopg.Connection) -> int:
    """What unqualified SQL takes for the time, in microseconds since the epoch."""
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    assert row
    shown: datetime = row[0]
    return (shown - EPOCH) // timedelta(microseconds=1)


def test_a_clone_has_the_tables_and_the_next_one_has_nothing_of_its_rows(databases: Databases) -> None:
    first, second = databases.create(), databases.create()
    with connect(first) as connection:
        connection.execute("CREATE TABLE scratch ()")
        assert connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone() == (True,)
    with connect(second) as connection:
        assert connection.execute("SELECT to_regclass('scratch')").fetchone() == (None,)
    databases.drop(first)
    databases.drop(second)


def test_an_empty_database_has_no_table(empty_database_url: URL) -> None:
    with connect(empty_database_url) as connection:
        query = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert connection.execute(query).fetchone() == (0,)


def test_a_database_in_use_can_be_dropped(databases: Databases) -> None:
    url = databases.create()
    with connect(url) as connection:
        databases.drop(url)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_the_template_takes_no_connections(databases: Databases) -> None:
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        connect(databases.server.set(database=databases.template))


def test_two_runs_on_one_server_do_not_meet(databases: Databases) -> None:
    other = Databases(databases.server, databases.admin)
    mine, theirs = databases.create(), other.create(empty=True)
    other.drop_all()
    with connect(mine) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        connect(theirs)
    databases.drop(mine)


def test_time_is_real_without_the_clock(database_url: URL) -> None:
    with connect(database_url) as connection:
        assert time_of(connection) < time_of(connection)


def test_new_connections_see_simulated_time(clock: Clock, database_url: URL) -> None:
    with connect(database_url) as connection:
        assert [time_of(connection), time_of(connection)] == [SIMULATED_START_US] * 2
        assert clock.now == SIMULATED_START_US


def test_a_moved_clock_is_seen_at_once_by_open_transactions(clock: Clock, database_url: URL) -> None:
    with connect(database_url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with connection.transaction():
            assert time_of(connection) == SIMULATED_START_US
            clock.tick(HOUR_US + 1)
            assert time_of(connection) == SIMULATED_START_US + HOUR_US + 1


@pytest.mark.parametrize("us", [0, 1, 1_767_225_600_123_457, 7_258_118_399_999_999])
def test_the_clock_is_exact_to_the_microsecond(us: int, clock: Clock, database_url: URL) -> None:
    clock.set(us)
    with connect(database_url) as connection:
        assert time_of(connection) == us
    assert clock.now == us


def test_the_clock_can_step_back(clock: Clock, database_url: URL) -> None:
    with connect(database_url) as connection:
        clock.tick(-HOUR_US)
        assert time_of(connection) == SIMULATED_START_US - HOUR_US


async def test_asynchronous_connections_see_simulated_time_too(clock: Clock, database_url: URL) -> None:
    text = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    async with await psycopg.AsyncConnection.connect(text) as connection:
        clock.set(HOUR_US)
        row = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
        assert row == (EPOCH + timedelta(hours=1),)
