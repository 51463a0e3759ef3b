"""Distributing the tables on Citus: what can be known of it without a Citus cluster.

That is the list of tables, held against the tables; the refusal, on a real PostgreSQL; and the order in which the
statements are sent. On a cluster (tests/citus.py) all tests run on tables that were distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.engine import URL

from talktime import operations
from talktime.errors import SchemaError
from talktime.meter.reading import Reading, read
from talktime.meter.state import CreditKind, Scope
from talktime.store import database
from talktime.store.batches import ChatKey, Loaded, beat_many, load_many
from talktime.store.citus import (
    DISTRIBUTED,
    LOCAL,
    REFERENCE,
    distribute_missing,
    obstacle,
    remove_left_behind,
    require_cluster,
    statement_for,
)
from talktime.store.schema import upgrade
from talktime.store.tables import bucket_of, metadata
from tests.database import Clock, Databases, connect
from tests.driver import watched
from tests.program import NOWHERE, run, written
from tests.support import CREDIT, POLICY, S, open_service

REFUSAL = "cannot distribute the tables: the database has no extension citus; on every node: CREATE EXTENSION citus"

# --- the list ---------------------------------------------------------------------------------------------------------


def test_each_table_has_one_place() -> None:
    assert sorted(metadata.tables) == sorted((REFERENCE, *DISTRIBUTED, *LOCAL))


def test_what_has_a_bucket_is_distributed_and_nothing_else() -> None:
    assert {name for name, table in metadata.tables.items() if "bucket" in table.c} == set(DISTRIBUTED)


def test_parents_come_before_children_and_no_foreign_key_leads_elsewhere(database_url: URL) -> None:
    query = "SELECT confrelid::regclass::text, conrelid::regclass::text FROM pg_constraint WHERE contype = 'f'"
    with connect(database_url) as connection:
        keys = connection.execute(query).fetchall()
    assert {child for _, child in keys} == set(DISTRIBUTED[1:])
    for parent, child in keys:
        assert DISTRIBUTED.index(parent) < DISTRIBUTED.index(child)


def test_there_is_no_function_or_view_that_would_have_to_be_created_again(database_url: URL) -> None:
    query = """
        SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
            AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
        UNION ALL SELECT viewname FROM pg_views WHERE schemaname = 'public'
    """
    with connect(database_url) as connection:
        assert connection.execute(query).fetchall() == []


# --- the refusal ------------------------------------------------------------------------------------------------------


def test_another_server_is_refused_and_stays_as_it_was(empty_database_url: URL) -> None:
    done = run("migrate", "--citus", TALKTIME_DATABASE_URL=written(empty_database_url))
    assert (1, "", f"talktime: {REFUSAL}\n") == (done.returncode, done.stdout, done.stderr)
    with connect(empty_database_url) as connection:
        query = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert connection.execute(query).fetchone() == (0,)


def test_tables_are_distributed_once(databases: Databases, database_url: URL) -> None:
    # On a cluster the test's tables are distributed already; on any other server they cannot be.
    done = run("migrate", "--citus", TALKTIME_DATABASE_URL=written(database_url))
    if databases.on_citus:
        said = "the database has the newest schema\nits tables were distributed before\n"
        assert (0, said, "") == (done.returncode, done.stdout, done.stderr)
    else:
        assert (1, "", f"talktime: {REFUSAL}\n") == (done.returncode, done.stdout, done.stderr)


def test_a_server_that_is_away_is_not_called_unfit() -> None:
    done = run("migrate", "--citus", TALKTIME_DATABASE_URL=NOWHERE)
    assert (75, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert line.startswith("talktime: cannot distribute the tables: connection failed: ")


def test_no_embedded_database_is_started_for_it() -> None:
    done = run("migrate", "--citus")
    message = "talktime: TALKTIME_DATABASE_URL: must be set for --citus, to the coordinator of the cluster\n"
    assert (2, "", message) == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("version", "nodes", "reason"),
    [
        (None, 0, "no extension citus"),
        ("12.1-1", 2, "citus 12.1-1 is too old, 13.1 or newer"),
        ("13.0-1", 2, "citus 13.0-1 is too old"),
        ("9.5-3", 2, "citus 9.5-3 is too old"),
        ("13.1-1", 0, "no node of the cluster may hold shards"),
    ],
)
def test_the_reason_is_named(version: str | None, nodes: int, reason: str) -> None:
    assert reason in (obstacle(version, nodes) or "")


@pytest.mark.parametrize("version", ["13.1-1", "13.2-1", "14.0-1"])
def test_a_cluster_that_is_ready_is_accepted(version: str) -> None:
    assert obstacle(version, 1) is None


def test_the_check_reads_the_database(empty_database_url: URL) -> None:
    with pytest.raises(SchemaError, match="no extension citus"):
        require_cluster(empty_database_url)


# --- the order --------------------------------------------------------------------------------------------------------

# NOT Citus, and no proof of anything that Citus does: functions of its names, which note that they were called. With
# them PostgreSQL can say that the statements are SQL, and which were sent; on what is it that they act, and whether
# rows and keys go along, only a cluster can say.
_CALLS_NOTED = """
CREATE SCHEMA noted;
SET search_path = noted, public;
CREATE TABLE calls (number int GENERATED ALWAYS AS IDENTITY, call text);
CREATE TABLE pg_dist_partition (
    logicalrelid regclass, partmethod "char", repmodel "char", colocationid int, partkey text
);
CREATE FUNCTION column_to_column_name(regclass, text) RETURNS text STRICT LANGUAGE sql AS 'SELECT $2';
CREATE FUNCTION create_reference_table(regclass) RETURNS void LANGUAGE sql AS $$
    INSERT INTO calls (call) VALUES ('reference ' || $1);
    INSERT INTO pg_dist_partition VALUES ($1, 'n', 't', 1, NULL);
$$;
CREATE FUNCTION create_distributed_table(regclass, text, colocate_with text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO calls (call) VALUES (concat_ws(' ', 'distributed', $1, 'by', $2, 'with', $3,
        current_setting('citus.multi_shard_modify_mode'),
        current_setting('citus.enable_local_reference_table_foreign_keys')));
    INSERT INTO pg_dist_partition VALUES ($1, 'h', 's', 2, $2);
    EXECUTE 'REVOKE UPDATE ON ' || $1 || ' FROM talktime_app'; -- in case that shards begin without them
END $$;
CREATE FUNCTION truncate_local_data_after_distributing_table(regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO calls (call) VALUES ('truncated ' || $1);
    EXECUTE 'TRUNCATE ' || $1 || ' CASCADE';
END $$;
"""


@pytest.fixture
def noting(empty_database_url: URL) -> Iterator[Connection]:
    """A connection on which calls are noted, to a migrated database."""
    upgrade(empty_database_url)
    with connect(empty_database_url) as connection:
        connection.execute(_CALLS_NOTED)
    there = empty_database_url.set(drivername="postgresql+psycopg")
    engine = create_engine(there, poolclass=pool.NullPool, connect_args={"options": "-c search_path=noted,public"})
    with engine.connect() as connection:
        yield connection


def calls(connection: Connection) -> list[str]:
    return list(connection.execute(text("SELECT call FROM calls ORDER BY number")).scalars())


def test_statements_are_sent_in_the_order_of_the_list_and_not_twice(noting: Connection) -> None:
    assert [REFERENCE, *DISTRIBUTED] == distribute_missing(noting)
    sent = [
        "reference advisor",
        "distributed account by bucket with none sequential off",
        "distributed allowance by bucket with account sequential off",
        "distributed chat by bucket with account sequential off",
        "distributed segment by bucket with account sequential off",
        "distributed ledger_entry by bucket with account sequential off",
        "distributed opening_account by bucket with account sequential off",
        "distributed opening_allowance by bucket with account sequential off",
        "distributed opening_chat by bucket with account sequential off",
        "distributed event by bucket with account sequential off",
    ]
    assert sent == calls(noting)
    assert [] == distribute_missing(noting)
    assert sent == calls(noting)


def test_privileges_on_columns_are_granted_once_the_tables_are_distributed(noting: Connection) -> None:
    query = text("""
        SELECT table_name, column_name, privilege_type FROM information_schema.column_privileges
        WHERE grantee = 'talktime_app' AND table_name <> 'alembic_version' ORDER BY 1, 2, 3
    """)
    before = noting.execute(query).all()
    assert ("chat", "revision", "UPDATE") in before
    assert ("chat", "started_at", "UPDATE") not in before
    distribute_missing(noting)
    assert before == noting.execute(query).all()


def test_a_table_that_came_later_joins_the_others(noting: Connection) -> None:
    distribute_missing(noting)
    noting.execute(text("DELETE FROM pg_dist_partition WHERE logicalrelid = 'segment'::regclass"))
    assert ["segment"] == distribute_missing(noting)
    assert "distributed segment by bucket with account sequential off" == calls(noting)[-1]


def test_a_table_that_citus_only_knows_of_is_distributed(noting: Connection) -> None:
    noting.execute(text("INSERT INTO pg_dist_partition VALUES ('account', 'n', 's', 0, NULL)"))
    assert [REFERENCE, *DISTRIBUTED] == distribute_missing(noting)


@pytest.mark.parametrize(
    ("otherwise", "name"),
    [
        ("('advisor', 'h', 's', 2, 'advisor_id')", "advisor"),
        ("('account', 'h', 's', 2, 'user_id')", "account"),
        ("('account', 'n', 't', 1, NULL)", "account"),
        ("('chat', 'h', 's', 2, 'bucket')", "chat"),  # without its parent
        ("('account', 'h', 's', 2, 'bucket'), ('chat', 'h', 's', 3, 'bucket')", "chat"),  # beside its parent
    ],
)
def test_what_is_distributed_in_another_way_is_left_alone(noting: Connection, otherwise: str, name: str) -> None:
    noting.execute(text(f"INSERT INTO pg_dist_partition VALUES {otherwise}"))
    with pytest.raises(SchemaError, match=f": {name} is distributed already, but in another way"):
        distribute_missing(noting)
    assert [] == calls(noting)


def test_rows_that_were_left_behind_are_removed_once(noting: Connection, empty_database_url: URL) -> None:
    remove_left_behind(noting)
    noting.commit()
    assert [] == calls(noting)
    noting.commit()
    with connect(empty_database_url) as rows:
        rows.execute("INSERT INTO advisor VALUES ('a', 0, 0, 0, 0)")
        rows.execute("INSERT INTO account VALUES (1, 'u', 0, now(), 1, NULL)")
        rows.execute("INSERT INTO allowance VALUES (1, 'u', 'a', 0, 0)")
    for _ in range(2):
        remove_left_behind(noting)
        noting.commit()
        assert ["truncated advisor", "truncated account"] == calls(noting)
    for name in (REFERENCE, *DISTRIBUTED):
        assert 0 == noting.scalar(text(f"SELECT pg_relation_size('{name}')"))


def test_the_statements_name_no_schema_so_that_they_find_the_tables_where_the_migrations_made_them() -> None:
    for name in (REFERENCE, *DISTRIBUTED):
        assert f"('{name}'" in statement_for(name)


async def test_a_batch_goes_bucket_by_bucket_and_answers_the_same(
    database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [("ann", "c1"), ("bob", "c1"), ("ann", "c2"), ("eve", "c1"), ("ann", "none"), ("nobody", "c1")]
    async with open_service(database_url, policy=POLICY._replace(scope=Scope.NONE)) as service:
        for user_id, chat_id in keys[:4]:
            await operations.credit(service, user_id, kind=CreditKind.GRANT, amount=99 * CREDIT, memo="", key=chat_id)
            await operations.start(service, user_id, chat_id, advisor_id=f"a-{chat_id}", key=None)
        await operations.pause(service, "bob", "c1")
        clock.tick(S)
        at_once = await service.batch(service.database.line(), load_many, keys)
    monkeypatch.setattr(database, "_ON_CITUS", "SELECT true")
    sent: list[Any] = []
    async with open_service(database_url) as service:
        line = service.database.line()
        with watched(lambda _, __, parameters: sent.append(parameters)):
            by_bucket = await service.batch(line, load_many, keys)
            clock.tick(S)
            beaten = await service.batch(line, beat_many, keys)
        beats_at = {reading.as_of for reading in _readings(beaten)}
    assert [*at_once] == [key for key in keys if key in by_bucket] == keys[:5]
    assert _readings(at_once) == _readings(by_bucket)
    assert {("ann", "c1"), ("ann", "c2"), ("eve", "c1")} == set(beaten)
    assert {clock.now} == beats_at
    assert {bucket_of(user_id) for user_id, _ in keys} == {parameters["in_bucket"] for parameters in sent if parameters}


def _readings(found: Mapping[ChatKey, Loaded]) -> list[Reading]:
    return [
        read(loaded.account, chat_id, loaded.now)
        for (_, chat_id), loaded in sorted(found.items())
        if chat_id in loaded.account.chats
    ]
