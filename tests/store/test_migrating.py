"""Migrations while the services run: what they wait for, how long, and whom they keep waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from talktime.store.schema import upgrade
from tests.database import connect

PATIENCE_S = 30
LOCK_S = 5


@pytest.fixture
def migrate(tmp_path: Path, database_url: URL) -> Callable[[str], None]:
    """A function that migrates the database once more, by what the body of `upgrade` says."""
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", f"migrations:versions\n{tmp_path}")
    config.attributes["url"] = database_url
    head = ScriptDirectory.from_config(config).get_current_head()

    def run(body: str) -> None:
        (tmp_path / "9000_one_more.py").write_text(
            "from alembic import op\n"
            f"revision, down_revision, branch_labels, depends_on = '9000', {head!r}, None, None\n"
            f"def upgrade():\n    {body}\n"
        )
        command.upgrade(config, "head")

    return run


def version_of(url: URL) -> str:
    with connect(url) as connection:
        [(version,)] = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    return str(version)


def held_up(connection: psycopg.Connection) -> bool:
    """Whether any session of the database waits for a lock."""
    [(waiting,)] = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchall()
    return bool(waiting)


def test_a_migration_waits_for_another_one(database_url: URL) -> None:
    with ThreadPoolExecutor(1) as threads, connect(database_url) as other:
        other.execute("SELECT pg_advisory_lock(8317214)")
        done = threads.submit(upgrade, database_url)
        time.sleep(1)
        assert not done.done()
        other.execute("SELECT pg_advisory_unlock(8317214)")
        done.result(PATIENCE_S)


def test_a_migration_has_limits(migrate: Callable[[str], None], database_url: URL) -> None:
    names = "current_setting('lock_timeout'), current_setting('statement_timeout')"
    migrate(f'op.execute("CREATE TABLE limits AS SELECT ARRAY[{names}] AS found")')
    with connect(database_url) as connection:
        assert (["5s", "1min"],) == connection.execute("SELECT found FROM limits").fetchone()


def test_a_migration_that_does_not_get_its_table_gives_up_and_has_changed_nothing(
    migrate: Callable[[str], None], database_url: URL
) -> None:
    before = version_of(database_url)
    with connect(database_url) as reader, reader.transaction():
        reader.execute("SELECT FROM account")
        began = time.monotonic()
        with pytest.raises(OperationalError, match="lock timeout"):
            migrate("op.execute('CREATE TABLE first ()'); op.execute('ALTER TABLE account ADD COLUMN x int')")
        assert LOCK_S - 1 < time.monotonic() - began < PATIENCE_S
    assert before == version_of(database_url)
    with connect(database_url) as connection:
        assert (None,) == connection.execute("SELECT to_regclass('first')").fetchone()


def test_an_index_is_made_while_others_write(migrate: Callable[[str], None], database_url: URL) -> None:
    body = """
    with op.get_context().autocommit_block():
        op.execute("CREATE INDEX CONCURRENTLY ix_one_more ON advisor (rate)")
    """
    insert = "INSERT INTO advisor (advisor_id, rate, first_us, increment_us, free_us) VALUES (%s, 1, 0, 0, 0)"
    with ThreadPoolExecutor(1) as threads, connect(database_url) as writer, connect(database_url) as other:
        with writer.transaction():
            writer.execute(insert, ["a1"])
            done = threads.submit(migrate, body.strip())
            patient_until = time.monotonic() + PATIENCE_S
            while not held_up(other):
                assert not done.done(), done.result()
                assert time.monotonic() < patient_until
                time.sleep(0.02)
            # It waits for the one who writes already, and nobody waits for it.
            other.execute("SET lock_timeout = '100ms'")
            other.execute(insert, ["a2"])
        done.result(PATIENCE_S)
        query = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_one_more'::regclass"
        assert (True,) == other.execute(query).fetchone()
    assert "9000" == version_of(database_url)
