"""The SQL rules: that the scan sees what breaks them, and that the schema and all use cases keep them.

Beyond this file, every statement that any test makes the product send is scanned (tests/conftest.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from sqlalchemy import CompoundSelect, Select, Update
from sqlalchemy.engine import URL

from reconciler.sweep import sweep_and_record
from talktime import keys, operating, operations
from talktime.errors import ChatNotActive
from talktime.meter.state import ChatState, CreditKind
from talktime.store import outbox, statements
from talktime.store.tables import bucket_of, metadata
from tests.database import Clock, connect
from tests.driver import Parameters, watched
from tests.sql_rules import (
    DIALECT,
    GLOBAL_TABLES,
    OPERATORS_STATEMENTS,
    USER_TABLES,
    RuleBroken,
    check,
    tables_written,
)
from tests.support import CREDIT, FREE_OF_CHARGE, audit_lines, open_service

CLOCK = str(statements.CLOCK.compile(dialect=DIALECT))
NAMED = {
    name: value
    for name, value in vars(statements).items()
    if isinstance(value, Select | CompoundSelect | Update) and not name.startswith("_")
} | {name: value.statement for name, value in vars(statements).items() if isinstance(value, statements.UpdateOfMany)}


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
        # What an outer join keeps is all there is of it, whatever its condition says.
        ("SELECT * FROM account a LEFT JOIN chat c ON a.bucket = $1 AND c.bucket = $1", "no bucket = .n for a"),
        ("SELECT * FROM account a RIGHT JOIN chat c ON a.bucket = $1 AND c.bucket = $1", "no bucket = .n for c"),
        ("SELECT * FROM account a FULL JOIN chat c ON a.bucket = $1 AND c.bucket = $1", "no bucket = .n for a"),
        ("SELECT account.bucket, count(*) FROM account JOIN chat ON true GROUP BY account.bucket", "no bucket"),
        ("TRUNCATE allowance", "TRUNCATE"),
        ("LOCK TABLE account", "LOCK"),
        ("COPY segment TO STDOUT", "COPY"),
        ("SELECT * FROM chat, service_key WHERE chat.bucket = $1", "stays on the coordinator"),
        ("UPDATE chat SET last_heartbeat_at = clock_timestamp() WHERE bucket = $1", "clock_timestamp"),
        ("UPDATE chat SET last_heartbeat_at = CURRENT_TIMESTAMP WHERE bucket = $1", "clock"),
        ("UPDATE chat SET start_key = uuid_generate_v4() WHERE bucket = $1", "uuid_generate_v4"),
        ("DELETE FROM chat WHERE bucket = $1 AND cost < random()", "random"),
        ("INSERT INTO account (bucket, next_entry) VALUES ($1, nextval('n'))", "nextval"),
        ("INSERT INTO account (bucket) VALUES ($1) RETURNING statement_timestamp()", "statement_timestamp"),
        ("UPDATE chat SET cost = 1 WHERE bucket = $1 AND last_heartbeat_at + interval '1s' < $2", "arithmetic"),
        ("UPDATE chat SET cost = 1 WHERE bucket = $1 AND interval '1s' + last_heartbeat_at < $2", "arithmetic"),
        ("UPDATE chat SET cost = 1 WHERE bucket = $1 AND last_heartbeat_at::timestamptz - $2 < $3", "arithmetic"),
        ("UPDATE chat SET bucket = $2 WHERE bucket = $1", "UPDATE of the bucket"),
        ("INSERT INTO account (bucket) VALUES ($1) ON CONFLICT (bucket) DO UPDATE SET bucket = 1", "UPDATE of the"),
        ("INSERT INTO account (user_id) VALUES ($1)", "without the bucket"),
        ("INSERT INTO account (bucket, user_id) SELECT $1, $2", "VALUES"),
        ("INSERT INTO account (bucket) VALUES ($1) ON CONFLICT (bucket) DO UPDATE SET due_at = now()", "now"),
        ("WITH x AS (DELETE FROM chat WHERE bucket = $1 RETURNING *) SELECT * FROM x", "modifying CTE"),
        ("WITH x AS (MERGE INTO account USING chat ON true WHEN MATCHED THEN DELETE) SELECT 1", "modifying CTE"),
        ("SELECT * FROM account JOIN chat ON chat.bucket = $1 WHERE account.bucket = $1 FOR UPDATE", "locking"),
        ("MERGE INTO account USING chat ON true WHEN MATCHED THEN DELETE", "MERGE"),
        ("LISTEN changes", "LISTEN"),
        ("NOTIFY changes", "NOTIFY"),
        ("SELECT pg_notify('changes', $1)", "pg_notify"),
        ("SELECT pg_try_advisory_lock(1)", "pg_try_advisory_lock"),
        # A batch takes its buckets from an unnest that carries them, and from nothing else; it reads, or renews leases.
        ("SELECT 1 FROM unnest($1) AS new(user_id) JOIN chat ON chat.bucket = new.bucket", "no bucket"),
        ("SELECT 1 FROM other AS new(bucket) JOIN chat ON chat.bucket = new.bucket", "no bucket"),
        ("UPDATE chat SET cost = 0 FROM unnest($1) AS new(bucket) WHERE chat.bucket = new.bucket", "no bucket"),
        ("DELETE FROM chat USING unnest($1) AS new(bucket) WHERE chat.bucket = new.bucket", "no bucket"),
    ],
)
def test_the_scan_sees_a_broken_rule(broken: str, rule: str) -> None:
    with pytest.raises(RuleBroken, match=rule):
        check(broken)


@pytest.mark.parametrize(
    "kept",
    [
        "SELECT * FROM account a LEFT JOIN chat c ON c.bucket = $1 AND c.user_id = a.user_id WHERE a.bucket = $1",
        "SELECT * FROM account a RIGHT JOIN chat c ON a.bucket = $1 WHERE c.bucket = $1",
        "SELECT * FROM account a JOIN chat c ON c.bucket = $1 AND a.bucket = $1",
        "SELECT account.bucket, count(*) FROM account GROUP BY account.bucket",
        "UPDATE chat SET last_heartbeat_at = greatest(last_heartbeat_at, $2) WHERE bucket = $1 AND $3 - opened_at < $4",
        "UPDATE chat SET cost = new.cost FROM unnest($2) AS new(cost) WHERE chat.bucket = $1",
        "SELECT * FROM unnest($1, $2) AS new(bucket, user_id) JOIN chat ON chat.bucket = new.bucket FOR UPDATE OF chat",
        "UPDATE chat SET last_heartbeat_at = $2 FROM unnest($1) AS new(bucket) WHERE chat.bucket = new.bucket",
        "SELECT pg_advisory_xact_lock(8317214)",
        "SELECT pg_try_advisory_lock(8317214)",
        "DELETE FROM console_session WHERE expires_at < $1",
    ],
)
def test_the_scan_lets_pass_what_keeps_the_rules(kept: str) -> None:
    check(kept)


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


class Sent:
    """The statements sent, and for each transaction the buckets and the tables that it wrote.

    `by_the_clock_alone` are the tables written in transactions that read the clock without any row.
    """

    def __init__(self) -> None:
        self.statements: set[str] = set()
        self.transactions: list[tuple[set[int], set[str]]] = []
        self.by_the_clock_alone: set[str] = set()
        self._written: dict[object, tuple[set[int], set[str]]] = {}
        self._with_clock: set[object] = set()

    def send(self, connection: object, statement: str, parameters: Parameters) -> None:
        self.statements.add(statement)
        if statement == CLOCK:
            self._with_clock.add(connection)
        written = tables_written(statement)
        if not written:
            return
        buckets, tables = self._written.setdefault(connection, (set(), set()))
        rows = parameters if isinstance(parameters, list) else [parameters or {}]
        # A bucket, or the literal of an array of them.
        values = [str(value) for row in rows for name, value in row.items() if "bucket" in name]
        buckets |= {int(bucket) for value in values for bucket in value.strip("{}").split(",")}
        tables |= written

    def end(self, connection: object) -> None:
        self.transactions.append(self._written.pop(connection, (set(), set())))
        if connection in self._with_clock:
            self._with_clock.remove(connection)
            self.by_the_clock_alone |= self.transactions[-1][1]


@contextmanager
def recorded() -> Iterator[Sent]:
    sent = Sent()
    with watched(sent.send, sent.end):
        yield sent


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
    await operating.record_audit(service.database, took_us=1, accounts=3, differing=0, differences=0)
    await _look_as_operators_do(service)
    await _tell(service)
    await _use_keys(service)


async def _look_as_operators_do(service: operations.Service) -> None:
    await operating.running_now(service.database, limit=1)
    await operating.last_hour(service.database, operating.KeptHour())
    await operating.find_users(service.database, "u", limit=1)
    await operating.lag(service.database)
    for dead in (True, False):
        await operating.late_events(service.database, dead=dead, limit=1)
    await operating.last_passes(service.database, limit=1)
    await operating.from_outside(service.database)


async def _tell(service: operations.Service) -> None:
    """Have events delivered and not delivered, and retried."""
    _, now = await service.database.transaction(outbox.load_due_events)
    for user_id in ("u", "v"):
        bucket = bucket_of(user_id)
        claim = partial(outbox.claim_events, bucket=bucket, before=now, limit=1, lease_us=0)
        [event] = await service.database.transaction(claim)
        undelivered = [outbox.Undelivered(event, None, "x")]
        settle = partial(outbox.settle_events, bucket=bucket, delivered=(), undelivered=undelivered)
        await service.database.transaction(settle)
        assert 1 == await operating.retry_events(service.database, user_id, None)
        settle = partial(outbox.settle_events, bucket=bucket, delivered=[event], undelivered=())
        await service.database.transaction(settle)
    assert 0 == await operating.retry_events(service.database, "nobody", 1)


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
        async with open_service(database_url, low_us=1) as service:
            await _use_everything(service)
    for statement in sent.statements:
        check(statement)
    named = {name for name in metadata.tables if any(f" {name}" in statement for statement in sent.statements)}
    assert set(metadata.tables) == named


async def test_one_transaction_writes_one_bucket_and_global_tables_are_written_alone(database_url: URL) -> None:
    with recorded() as sent:
        async with open_service(database_url, low_us=1) as service:
            await _use_everything(service)
    written = [(buckets, tables) for buckets, tables in sent.transactions if tables]
    assert {bucket_of(user_id) for user_id in "uvw"} == set().union(*(buckets for buckets, _ in written))
    for buckets, tables in written:
        if tables & GLOBAL_TABLES:
            assert 1 == len(tables)
        else:
            assert 1 == len(buckets)


async def test_the_instant_that_is_written_with_a_users_rows_was_read_with_a_users_row(database_url: URL) -> None:
    # So it is the clock of the machine that has the rows, and the same for all who write there.
    with recorded() as sent:
        async with open_service(database_url, low_us=1) as service:
            await _use_everything(service)
    assert CLOCK in sent.statements
    assert {"service_key"} <= sent.by_the_clock_alone
    assert set() == sent.by_the_clock_alone & USER_TABLES


@pytest.mark.parametrize("name", NAMED)
def test_a_named_statement_keeps_the_rules_whoever_sends_it(name: str) -> None:
    check(str(NAMED[name].compile(dialect=DIALECT)))


def test_the_schema_keeps_the_rules(database_url: URL) -> None:
    with connect(database_url) as connection:
        constraints = connection.execute(
            "SELECT relname, conname, contype, (SELECT attname FROM pg_attribute WHERE attrelid = conrelid"
            " AND attnum = conkey[1]), (SELECT attname FROM pg_attribute WHERE attrelid = confrelid"
            " AND attnum = confkey[1]), confdeltype, confupdtype"
            " FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid"
            " WHERE contype <> 'n' AND relname = ANY(%s)",
            [list(metadata.tables)],
        ).fetchall()
        leading = connection.execute(
            "SELECT relname, attname, atttypid::regtype::text, attnotnull FROM pg_attribute"
            " JOIN pg_class ON pg_class.oid = attrelid WHERE attnum = 1 AND relname = ANY(%s)"
            " AND relkind = 'r'",
            [sorted(USER_TABLES)],
        ).fetchall()
        unique = connection.execute(
            "SELECT indexrelid::regclass::text, attname FROM pg_index JOIN pg_class ON pg_class.oid = indrelid"
            " JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] WHERE indisunique AND relname = ANY(%s)",
            [sorted(USER_TABLES)],
        ).fetchall()
        rules = connection.execute("SELECT rulename FROM pg_rules WHERE schemaname = 'public'").fetchall()
        defaults = connection.execute(
            "SELECT adrelid::regclass, pg_get_expr(adbin, adrelid) FROM pg_attrdef"
        ).fetchall()
        triggers = connection.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal").fetchall()
        sequences = connection.execute("SELECT oid::regclass FROM pg_class WHERE relkind = 'S'").fetchall()
        identities = connection.execute("SELECT attname FROM pg_attribute WHERE attidentity <> ''").fetchall()
    assert ([], [], [], [], []) == (defaults, triggers, sequences, identities, rules)
    assert [(name, "bucket", "smallint", True) for name in sorted(USER_TABLES)] == sorted(leading)
    assert {"bucket"} == {first for _, first in unique}
    declared = {constraint.name for table in metadata.tables.values() for constraint in table.constraints}
    assert declared == {name for _, name, *_ in constraints}
    for table, name, kind, first_column, referred_column, on_delete, on_update in constraints:
        assert kind in ("c", "p", "u", "f"), name
        if table in USER_TABLES and kind != "c":
            assert "bucket" == first_column, name
        if kind == "f":
            assert table in USER_TABLES, name
            assert ("bucket", "a", "a") == (referred_column, on_delete, on_update), name


def test_the_clock_of_tests_is_the_only_one(database_url: URL, clock: Clock) -> None:
    with connect(database_url) as connection:
        row = connection.execute("SELECT extract(epoch FROM clock_timestamp()) * 1000000").fetchone()
    assert row is not None
    assert clock.now == int(row[0])
