"""The migrations, as Alembic sees them."""

from __future__ import annotations

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL

from talktime.store.schema import upgrade
from tests.database import connect


@pytest.fixture
def alembic(pytestconfig: pytest.Config) -> Config:
    """Alembic's settings as pyproject.toml has them for its command."""
    return Config(toml_file=pytestconfig.rootpath / "pyproject.toml")


def columns(url: URL) -> list[tuple[object, ...]]:
    """Every column of every table and index, in order."""
    query = """
        SELECT relname, relkind, attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
        FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped
        LEFT JOIN pg_attrdef ON adrelid = pg_class.oid AND adnum = attnum
        WHERE relnamespace = 'public'::regnamespace
        ORDER BY relname, attnum
    """
    with connect(url) as connection:
        return connection.execute(query).fetchall()


def test_there_is_one_head(alembic: Config) -> None:
    assert len(ScriptDirectory.from_config(alembic).get_heads()) == 1


def test_the_migrated_database_is_what_the_tables_say(alembic: Config, database_url: URL) -> None:
    alembic.attributes["url"] = database_url
    command.check(alembic)


def test_migrating_again_changes_nothing(database_url: URL) -> None:
    before = columns(database_url)
    upgrade(database_url)
    assert columns(database_url) == before


def test_down_and_up_again_leads_to_the_same_tables(alembic: Config, database_url: URL) -> None:
    before = columns(database_url)
    alembic.attributes["url"] = database_url
    command.downgrade(alembic, "base")
    assert {name for name, *_ in columns(database_url)} <= {"alembic_version", "alembic_version_pkc"}
    upgrade(database_url)
    assert columns(database_url) == before
