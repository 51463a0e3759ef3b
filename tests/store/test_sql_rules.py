"""The SQL rules: that the scan sees what breaks them, and that the schema and all use cases keep them.

Beyond this file, every statement that any test makes the product send is scanned (tests/conftest.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import psycopg
import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL

from reconciler.sweep import sweep_and_record
from talktime import keys, operating, operations
from talktime.errors import ChatNotActive
from talktime.meter.state import ChatState, CreditKind
from talktime.store.tables import bucket_of, metadata
from tests.database import Clock, connect
from tests.sql_rules import GLOBAL_TABLES, OPERATORS_STATEMENTS, USER_TABLES, RuleBroken, check, tables_written
from tests.support import CREDIT, FREE_OF_CHARGE, audit_lines, open_service


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("SELECT * FROM chat WHERE user_id = $1", "no bucket"),
        ("SELECT * FROM chat WHERE bucket = $1 OR user_id = $2", "no bucket"),
        ("SELECT * FROM chat, account a WHERE chat.bucket = $1 AND a.bucket = chat.bucket", "no bucket = .n for a"),
        (
            "SELECT * FROM account a LEFT JOIN chat c ON c.user_id = a.user_id WHERE a.bucket = $1",
            "no bucket = .n for c",
        ),
        ("SELECT 1 FROM account WHERE bucket = $1 AND EXISTS (SELECT 1 FROM chat WHERE chat_id = $2)", "no bucket"),
        ("UPDATE chat SET cost = 0 WHERE chat_id = $1", "no bucket"),
        ("DELETE FROM chat WHERE chat_id = $1", "no bucket"),
        ("UPDATE chat SET last_heartbeat_at = clock_timestamp() WHERE bucket = $1", "clock_timestamp"),
        ("UPDATE chat SET last_heartbeat_at = CURRENT_TIMESTAMP WHERE bucket = $1", "clock"),
        ("UPDATE chat SET cost = 1 WHERE bucket = $1 AND last_heartbeat_at + interval '1s' < $2", "arithmetic"),
        ("UPDATE chat SET bucket = $2 WHERE bucket = $1", "UPDATE of the bucket"),
        ("INSERT INTO account (user_id) VALUES ($1)", "without the bucket"),
        ("INSERT INTO account (bucket, user_id) SELECT $1, $2", "VALUES"),
        ("INSERT INTO account (bucket) VALUES ($1) ON CONFLICT (bucket) DO UPDATE SET due_at = now()", "now"),
        ("WITH x AS (DELETE FROM chat WHERE bucket = $1 RETURNING *) SELECT * FROM x", "modifying CTE"),
        ("SELECT * FROM account JOIN chat ON chat.bucket = $1 WHERE account.bucket = $1 FOR UPDATE", "locking"),
        ("MERGE INTO account USING chat ON true WHEN MATCHED THEN DELETE", "MERGE"),
    ],
)
def test_the_scan_sees_a_broken_rule(broken: str, rule: str) -> None:
    with pytest.raises(RuleBroken, match=rule):
        check(broken)


@pytest.mark.parametrize("statement", OPERATORS_STATEMENTS)
def test_an_operators_statement_passes_to_the_letter_and_no_other_way(statement: str) -> None:
    check(statement)
    others = (
        statement + " ",  # the same, and yet it is not listed: so without the list it would break a rule
        statement.replace("WHERE ", "WHERE true AND ", 1),
        statement.replace("SELECT ", "SELECT 1, ", 1),
        f"SELECT * FROM ({statement}) AS found",
    )
    for other in others:
        with pytest.raises(RuleBroken, match="no bucket"):
            check(other)
    with pytest.raises(RuleBroken, match="no bucket"):
        check(statement + " FOR UPDATE")


async def test_every_listed_statement_is_sent_by_what_operators_look_at(database_url: URL) -> None:
    with recorded() as looking:
        async with open_service(database_url) as service:
            await _look_as_operators_do(service)
    assert set(OPERATORS_STATEMENTS) <= looking.statements
    assert len(OPERATORS_STATEMENTS) == len(set(OPERATORS_STATEMENTS))
    assert not [statement for statement in OPERATORS_STATEMENTS if not statement.startswith("SELECT")]


Parameters: TypeAlias = dict[str, Any] | list[dict[str, Any]]


class Sent:
    """The statements sent, and for each transaction the buckets and the tables that it wrote."""

    def __init__(self) -> None:
        self.statements: set[str] = set()
        self.transactions: list[tuple[set[int], set[str]]] = []

    def execute(
        self, connection: Connection, _cursor: object, statement: str, parameters: Parameters, *_: object
    ) -> None:
        self.statements.add(statement)
        written = tables_written(statement)
        if not written:
            return
        buckets, tables = connection.info.setdefault("written", (set(), set()))
        rows = parameters if isinstance(parameters, list) else [parameters]
        buckets |= {value for row in rows for name, value in row.items() if "bucket" in name}
        tables |= written

    def end(self, connection: Connection) -> None:
        self.transactions.append(connection.info.pop("written", (set(), set())))


@contextmanager
def recorded() -> Iterator[Sent]:
    sent = Sent()
    hooks = (("before_cursor_execute", sent.execute), ("commit", sent.end), ("rollback", sent.end))
    for name, hook in hooks:
        event.listen(Engine, name, hook)
    try:
        yield sent
    finally:
        for name, hook in hooks:
            event.remove(Engine, name, hook)


async def _use_everything(service: operations.Service) -> None:
    await operations.ready(service)
    await operations.put_advisor(service, "a", FREE_OF_CHARGE)
    await operations.get_advisor(service, "a")
    for user_id in ("u", "v", "w"):
        await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
        for chat_id, advisor_id in (("c1", "a"), ("c2", "a"), ("c3", "b")):
            await operations.start(service, user_id, chat_id, advisor_id=advisor_id, key="s")
            await operations.heartbeat(service, user_id, chat_id)
        await asyncio.sleep(0.001)
        await operations.pause(service, user_id, "c3")
        await operations.heartbeat(service, user_id, "c3")
    await sweep_and_record(service.database, asyncio.Event())
    for user_id in ("u", "v", "w"):
        await operations.stop(service, user_id, "c3")
        with pytest.raises(ChatNotActive):
            await operations.heartbeat(service, user_id, "c3")
        await operations.read_chat(service, user_id, "c1")
        await operations.read_account(service, user_id)
        await operations.read_ledger(service, user_id, before=99, limit=1)
        page, after = await operations.read_chats(service, user_id, state=None, after=None, limit=1)
        await operations.read_chats(service, user_id, state=page[0].state, after=after, limit=1)
        _, place = await operations.read_segments(service, user_id, "c1", after=None, limit=1)
        await operations.read_segments(service, user_id, "c1", after=place or 0, limit=1)
    await operations.read_chats(service, "u", state=ChatState.RUNNING, after=None, limit=10)
    assert not await audit_lines(service.database)
    await _look_as_operators_do(service)
    await _use_keys(service)


async def _look_as_operators_do(service: operations.Service) -> None:
    await operating.running_now(service.database, limit=1)
    await operating.last_hour(service.database, operating.KeptHour())
    await operating.find_users(service.database, "u", limit=1)
    await operating.lag(service.database)
    await operating.last_passes(service.database, limit=1)


async def _use_keys(service: operations.Service) -> None:
    digest = keys.digest_of(await keys.new_key(service.database, "k"))
    session = await keys.open_session(service.database, digest, seconds=1)
    assert digest == await keys.find_session(service.database, session)
    await keys.close_session(service.database, session)
    await keys.revoke_key(service.database, "k")
    assert {} == await keys.active_keys(service.database)
    assert ["k"] == [key.name for key in await keys.list_keys(service.database)]


async def test_all_use_cases_keep_the_rules(database_url: URL) -> None:
    with recorded() as sent:
        async with open_service(database_url) as service:
            await _use_everything(service)
    for statement in sent.statements:
        check(statement)
    named = {name for name in metadata.tables if any(f" {name}" in statement for statement in sent.statements)}
    assert set(metadata.tables) == named


async def test_one_transaction_writes_one_bucket_and_global_tables_are_written_alone(database_url: URL) -> None:
    with recorded() as sent:
        async with open_service(database_url) as service:
            await _use_everything(service)
    written = [(buckets, tables) for buckets, tables in sent.transactions if tables]
    assert {bucket_of(user_id) for user_id in "uvw"} == set().union(*(buckets for buckets, _ in written))
    for buckets, tables in written:
        if tables & GLOBAL_TABLES:
            assert 1 == len(tables)
        else:
            assert 1 == len(buckets)


def test_the_schema_keeps_the_rules(database_url: URL) -> None:
    with connect(database_url) as connection:
        constraints = connection.execute(
            "SELECT relname, conname, contype, (SELECT attname FROM pg_attribute WHERE attrelid = conrelid"
            " AND attnum = conkey[1]), confdeltype FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid"
            " WHERE contype <> 'n' AND relname = ANY(%s)",
            [list(metadata.tables)],
        ).fetchall()
        defaults = connection.execute(
            "SELECT adrelid::regclass, pg_get_expr(adbin, adrelid) FROM pg_attrdef"
        ).fetchall()
        triggers = connection.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal").fetchall()
        sequences = connection.execute("SELECT oid::regclass FROM pg_class WHERE relkind = 'S'").fetchall()
        identities = connection.execute("SELECT attname FROM pg_attribute WHERE attidentity <> ''").fetchall()
    assert ([], [], [], []) == (defaults, triggers, sequences, identities)
    declared = {constraint.name for table in metadata.tables.values() for constraint in table.constraints}
    assert declared == {name for _, name, *_ in constraints}
    for table, name, kind, first_column, on_delete in constraints:
        if table in USER_TABLES and kind in ("p", "u", "f"):
            assert "bucket" == first_column, name
        assert "n" != on_delete, name


async def test_hot_statements_use_their_indexes(database_url: URL) -> None:
    """A user with a long past costs no more to read or to lock than a new one."""
    plans: dict[str, str] = {}
    with recorded() as sent:
        async with open_service(database_url, card=FREE_OF_CHARGE) as service:
            await _use_everything(service)
    with connect(database_url) as connection:
        connection.execute(
            "INSERT INTO chat SELECT bucket, user_id, 'old' || n, advisor_id, 'ended', rate, first_us, increment_us,"
            " lease_us, abandon_after_us, last_heartbeat_at, started_at - n * interval '1s', 1, NULL, started_at,"
            " 'ended', NULL, 0, 0, 0, 0, 0 FROM chat, generate_series(1, 5000) n WHERE chat_id = 'c1'"
        )
        connection.execute("ANALYZE")
        connection.execute("SET plan_cache_mode = force_generic_plan")
        for number, statement in enumerate(
            sorted(s for s in sent.statements if s.startswith("SELECT") and "FROM chat" in s)
        ):
            plans[statement] = _generic_plan(connection, number, statement)
    locking = {statement: plan for statement, plan in plans.items() if "FOR NO KEY UPDATE" in statement}
    reading = {statement: plan for statement, plan in plans.items() if "FROM account" in statement}
    assert (3, 2) == (len(locking), len(reading))
    for statement, plan in (locking | reading).items():
        # Only the few live chats are looked at, and the one that is named by its key.
        assert "ix_chat_live" in plan, f"{statement}\n{plan}"
    for statement, plan in plans.items():
        assert "Seq Scan on chat" not in plan, f"{statement}\n{plan}"


def _generic_plan(connection: psycopg.Connection, number: int, statement: str) -> str:
    names: list[str] = []

    def numbered(match: re.Match[str]) -> str:
        name = match[1]
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    text = re.sub(r"%\((\w+)\)s", numbered, statement).replace("%%", "%")
    connection.execute(f"PREPARE p{number} AS {text}")
    row = connection.execute(
        f"EXPLAIN EXECUTE p{number}" + (f"({', '.join(['NULL'] * len(names))})" if names else "")
    ).fetchall()
    return "\n".join(line for (line,) in row)


def test_the_clock_of_tests_is_the_only_one(database_url: URL, clock: Clock) -> None:
    with connect(database_url) as connection:
        row = connection.execute("SELECT extract(epoch FROM clock_timestamp()) * 1000000").fetchone()
    assert row is not None
    assert clock.now == int(row[0])
