"""The role that the application works as: what it may, in the database's own words, and who may take it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.engine import URL, make_url

from reconciler.sweep import sweep_and_record
from talktime import operations
from talktime.errors import DatabaseUnavailable, SchemaError
from talktime.legacy.tables import TABLES as OLD_TABLES
from talktime.meter.state import CreditKind
from talktime.store.database import APPLICATION_ROLE, Database
from talktime.store.embedded import embedded_postgres
from talktime.store.schema import upgrade
from talktime.store.tables import metadata
from tests.database import connect
from tests.support import CREDIT, audit_lines, open_service

ADDED_TO = {"SELECT", "INSERT"}
# What a row was made with for good; all else of the table can be updated.
FIXED = {
    "account": {"bucket", "user_id"},
    "advisor": {"advisor_id"},
    "allowance": {"bucket", "user_id", "advisor_id", "granted_us"},
    "chat": {"bucket", "user_id", "chat_id", "advisor_id", "started_at"},
    "event": {"bucket", "user_id", "number", "event_id", "type", "occurred_at", "recorded_at", "payload"},
    "service_key": {"name", "digest", "created_at"},
}
DELETED_FROM = {"console_session", "event", "reconciler_audit", "reconciler_pass"}


@pytest.fixture
def alembic(pytestconfig: pytest.Config) -> Config:
    return Config(toml_file=pytestconfig.rootpath / "pyproject.toml")


@pytest.fixture
def login(database_url: URL) -> Iterator[URL]:
    """A login without any privilege of its own."""
    name = f"talktime_test_{secrets.token_hex(4)}"
    with connect(database_url) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'test'").format(sql.Identifier(name)))
        yield database_url.set(username=name, password="test")
        admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


async def test_all_that_the_role_may_is_what_the_application_does(database_url: URL) -> None:
    tables = "SELECT table_name, privilege_type FROM information_schema.table_privileges WHERE grantee = %s"
    columns = """
        SELECT table_name, column_name FROM information_schema.column_privileges
        WHERE grantee = %s AND privilege_type = 'UPDATE'
    """
    with connect(database_url) as admin:
        may = set(admin.execute(tables, [APPLICATION_ROLE]).fetchall())
        may_update = set(admin.execute(columns, [APPLICATION_ROLE]).fetchall())
        owned = admin.execute("SELECT count(*) FROM pg_class WHERE relowner = %s::regrole", [APPLICATION_ROLE])
        assert owned.fetchone() == (0,)
    on_tables = {
        (name, privilege)
        for name in metadata.tables
        for privilege in (ADDED_TO | {"DELETE"} if name in DELETED_FROM else ADDED_TO)
    }
    assert may == on_tables | {(usual, "SELECT") for usual, _ in OLD_TABLES.values()}  # the views with the old names
    assert may_update == {
        (name, column.name)
        for name, fixed in FIXED.items()
        for column in metadata.tables[name].c
        if column.name not in fixed
    }


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_entry SET amount = amount * 2",
        "DELETE FROM ledger_entry",
        "TRUNCATE ledger_entry",
        "UPDATE segment SET cost = 0",
        "DELETE FROM segment",
        "DELETE FROM account",
        "DELETE FROM chat",
        "UPDATE chat SET advisor_id = 'a2'",
        "UPDATE allowance SET granted_us = 1",
        "DROP TABLE segment",
        "ALTER TABLE ledger_entry DISABLE TRIGGER ALL",
        "CREATE TABLE public.mine ()",
        "CREATE RULE lost AS ON INSERT TO ledger_entry DO INSTEAD NOTHING",
    ],
)
def test_history_cannot_be_rewritten(database_url: URL, statement: str) -> None:
    with connect(database_url) as connection:
        connection.execute(f"SET ROLE {APPLICATION_ROLE}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


async def _whoami(url: URL) -> str:
    database = Database(url)
    try:
        return str(await database.read(lambda connection: connection.scalar(text("SELECT current_user"))))
    finally:
        await database.close()


async def test_the_application_takes_the_role_though_its_login_may_do_more(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    assert await _whoami(database_url) == APPLICATION_ROLE
    assert caplog.messages == []


async def test_a_login_that_may_only_take_the_role_serves_and_passes(database_url: URL, login: URL) -> None:
    with connect(database_url) as admin:
        admin.execute(f"GRANT {APPLICATION_ROLE} TO {login.username} WITH INHERIT FALSE")
    async with open_service(login) as service:
        await operations.credit(service, "u1", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k1")
        await operations.start(service, "u1", "c1", advisor_id="a1", key=None)
        await sweep_and_record(service.database, asyncio.Event())
        assert (await operations.stop(service, "u1", "c1")).state == "ended"
        assert await audit_lines(service.database) == []


async def test_a_login_that_may_not_take_the_role_says_so_once(
    database_url: URL, login: URL, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(database_url) as admin:
        admin.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {login.username}")
    async with open_service(login) as service:
        await asyncio.gather(*(operations.start(service, f"u{n}", "c1", advisor_id="a1", key=None) for n in range(3)))
    [said] = caplog.messages
    assert f"it may not take the role {APPLICATION_ROLE}" in said


async def test_a_database_that_is_behind_others_of_its_server_is_served_as_before(
    database_url: URL, alembic: Config, caplog: pytest.LogCaptureFixture
) -> None:
    # The role is there, made for another database of the server; its privileges here are not.
    with connect(database_url) as admin:
        admin.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {APPLICATION_ROLE}")
    async with open_service(database_url) as service:
        await operations.start(service, "u1", "c1", advisor_id="a1", key=None)
        await operations.ready(service)
    assert "`talktime migrate`" in caplog.text
    alembic.attributes["url"] = database_url
    command.downgrade(alembic, "0002")
    upgrade(database_url)
    assert await _whoami(database_url) == APPLICATION_ROLE


async def test_a_database_that_was_never_migrated_says_so(empty_database_url: URL) -> None:
    async with open_service(empty_database_url) as service:
        with pytest.raises(DatabaseUnavailable, match="talktime migrate"):
            await operations.ready(service)


async def test_a_login_that_may_do_nothing_here_is_told_so_and_not_ready(login: URL) -> None:
    async with open_service(login) as service:
        with pytest.raises(DatabaseUnavailable, match="does not allow this login"):
            await operations.start(service, "u1", "c1", advisor_id="a1", key=None)
        with pytest.raises(DatabaseUnavailable, match="may write to"):
            await operations.ready(service)


async def test_tables_in_the_logins_own_schema_stay_in_sight(empty_database_url: URL) -> None:
    name = f"talktime_test_{secrets.token_hex(4)}"
    with connect(empty_database_url) as admin:
        admin.execute(sql.SQL("CREATE ROLE {0} LOGIN PASSWORD 'test' CREATEROLE").format(sql.Identifier(name)))
        admin.execute(sql.SQL("CREATE SCHEMA {0} AUTHORIZATION {0}").format(sql.Identifier(name)))
        admin.execute(f"GRANT {APPLICATION_ROLE} TO {name}")
        url = empty_database_url.set(username=name, password="test")
        try:
            with pytest.raises(SchemaError, match=rf"CREATE SCHEMA talktime_legacy AUTHORIZATION {name}$"):
                upgrade(url)
            admin.execute(sql.SQL("CREATE SCHEMA talktime_legacy AUTHORIZATION {}").format(sql.Identifier(name)))
            upgrade(url)
            assert await _whoami(url) == APPLICATION_ROLE
            async with open_service(url) as service:
                await operations.start(service, "u1", "c1", advisor_id="a1", key=None)
                await operations.ready(service)
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(name)))


def test_who_may_not_make_the_role_is_told_who_may(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path / "home") as address:
        url = make_url(address)
        with connect(url) as admin:
            admin.execute("CREATE ROLE owner LOGIN; CREATE ROLE maker LOGIN CREATEROLE")
            for name in ("owner", "maker"):
                admin.execute(f"CREATE DATABASE {name} OWNER {name}")
        own = url.set(username="owner", database="owner")
        with pytest.raises(SchemaError, match=r"CREATE ROLE talktime_app NOLOGIN; GRANT talktime_app TO owner$"):
            upgrade(own)
        made = url.set(username="maker", database="maker")
        upgrade(made)
        assert asyncio.run(_whoami(made)) == APPLICATION_ROLE
        with connect(url) as admin:
            admin.execute("GRANT talktime_app TO owner")
        upgrade(own)
        assert asyncio.run(_whoami(own)) == APPLICATION_ROLE
