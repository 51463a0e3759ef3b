"""What the hot statements cost in blocks, whatever the history: looked at as PostgreSQL really ran them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from reconciler.sweep import sweep
from talktime import operations
from talktime.meter.state import CreditKind
from talktime.store import outbox
from talktime.store.tables import bucket_of
from tests.database import connect
from tests.driver import Parameters, watched
from tests.sql_rules import USER_TABLES
from tests.support import CREDIT, ONE_A_SECOND, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from talktime.operations import Service

OLD = "old"
"""A user with a long past, in a database of users with a short one."""
OTHERS = 3_000
CHATS = 10_000

BLOCKS_MAX = 30
"""Of a statement on one user: a few index pages for each of a few tables."""
PAGE_BLOCKS_MAX = 200
"""Of a page of 50 rows, each of which may be apart from the others and have an allowance that is too."""

# Rows, not commands: a minute's worth of SQL instead of an hour's of starts. The past lies in the order in which it
# happened, so a page of it is not together on the disk.
_HISTORY = """
INSERT INTO account SELECT %(bucket)s, %(old)s, 10000000, now(), 50000, NULL;
INSERT INTO allowance SELECT %(bucket)s, %(old)s, 'a' || n, 0, 0 FROM generate_series(0, 99) n;
INSERT INTO chat SELECT %(bucket)s, %(old)s, 'c' || n, 'a' || n %% 100, 'ended', 1000000, 0, 0, 15000000, 300000000, t,
    t, 2, NULL, t + interval '9s', 'ended', NULL, 0, 9000000, 9000000, 0, 150000
    FROM generate_series(1, %(chats)s) n, LATERAL (SELECT timestamptz '2026-01-01Z' + n * interval '1min') AS at(t);
INSERT INTO segment SELECT bucket, user_id, chat_id, started_at + n * interval '4s', started_at + n * interval '4s'
    + interval '3s', advisor_id, 'paused', rate, first_us, increment_us, 0, 0, 3000000, 50000
    FROM chat, generate_series(0, 2) n;
INSERT INTO ledger_entry SELECT bucket, user_id, row_number() OVER (ORDER BY started_at), 'charge', -50000, 1000000,
    ended_at, ended_at, '', NULL, NULL, chat_id, started_at FROM segment;
"""


@pytest.fixture
def history_url(database_url: URL) -> URL:
    with connect(database_url) as connection:
        client = psycopg.ClientCursor(connection)
        client.execute(_HISTORY, {"bucket": bucket_of(OLD), "old": OLD, "chats": CHATS})
        users = [f"u{n}" for n in range(OTHERS)]
        buckets = [bucket_of(user_id) for user_id in users]
        connection.execute(
            "INSERT INTO account SELECT bucket, user_id, 10000000, now(), 1, now() FROM unnest(%s::int[], %s::text[])"
            " AS new(bucket, user_id)",
            [buckets, users],
        )
        connection.execute(
            "INSERT INTO allowance SELECT bucket, user_id, 'a1', 0, 0 FROM account WHERE user_id <> %s", [OLD]
        )
        connection.execute(
            "INSERT INTO chat SELECT bucket, user_id, 'c', 'a1', 'running', 1000000, 0, 0, 3600000000, 7200000000,"
            " due_at, due_at, 1, NULL, NULL, NULL, due_at, 0, 0, 0, 0, 0 FROM account WHERE user_id <> %s",
            [OLD],
        )
        connection.execute("VACUUM ANALYZE")
    return database_url


async def _use(service: Service) -> None:
    """Do what is done all the time, for the user with the long past."""
    await operations.start(service, OLD, "c7", advisor_id="a7", key=None)
    await operations.start(service, OLD, "new", advisor_id="a8", key=None)
    for _ in range(2):
        await operations.heartbeat(service, OLD, "new")
        await operations.read_chat(service, OLD, "new")
    await operations.read_chat(service, OLD, "c9")
    await operations.heartbeat(service, OLD, "new")
    await operations.read_account(service, OLD)
    await operations.read_ledger(service, OLD, before=None, limit=50)
    await operations.read_ledger(service, OLD, before=15_000, limit=50)
    page, _ = await operations.read_chats(service, OLD, state=None, after=None, limit=50)
    long_ago = page[-1].started_at - CHATS // 2 * 60_000_000, "c"
    assert 50 == len((await operations.read_chats(service, OLD, state=None, after=long_ago, limit=50))[0])
    await operations.read_segments(service, OLD, "c7", after=None, limit=50)
    await operations.credit(service, OLD, kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
    await operations.pause(service, OLD, "new")
    await operations.stop(service, OLD, "new")


async def test_a_long_past_costs_no_statement_more_blocks(history_url: URL) -> None:
    sent: list[tuple[str, Parameters]] = []
    async with open_service(history_url, card=ONE_A_SECOND) as service:
        with watched(lambda _, statement, parameters: sent.append((statement, parameters))):
            await _use(service)
    hot = {statement: parameters for statement, parameters in sent if not statement.startswith("INSERT")}
    assert len(hot) > 15
    with connect(history_url) as connection:
        for mode in ("force_custom_plan", "force_generic_plan"):
            connection.execute(f"SET plan_cache_mode = {mode}")
            for statement, parameters in hot.items():
                plan = _explained(connection, statement, parameters)
                told = f"{mode}: {statement}\n{parameters}\n{plan}"
                assert _blocks(plan) <= (PAGE_BLOCKS_MAX if " LIMIT " in statement else BLOCKS_MAX), told
                assert not _seq_scans(plan), told


async def test_a_pass_costs_blocks_for_what_is_due_and_none_for_the_past(history_url: URL) -> None:
    async with open_service(history_url, card=ONE_A_SECOND) as service:
        await operations.start(service, OLD, "c7", advisor_id="a7", key=None)
        sent: list[tuple[str, Parameters]] = []
        with watched(lambda _, statement, parameters: sent.append((statement, parameters))):
            made = await sweep(service.database, asyncio.Event())
    assert OTHERS + 1 == made.accounts
    in_bucket = [
        (statement, parameters)
        for statement, parameters in sent
        if isinstance(parameters, dict) and parameters.get("in_bucket") == bucket_of(OLD)
    ]
    assert len(in_bucket) >= 5
    due = 1 + sum(bucket_of(f"u{n}") == bucket_of(OLD) for n in range(OTHERS))
    with connect(history_url) as connection:
        for mode in ("force_custom_plan", "force_generic_plan"):
            connection.execute(f"SET plan_cache_mode = {mode}")
            for statement, parameters in in_bucket:
                plan = _explained(connection, statement, parameters)
                assert _blocks(plan) <= BLOCKS_MAX * due, f"{mode}: {statement}\n{plan}"
                assert not _seq_scans(plan), f"{mode}: {statement}\n{plan}"


async def test_to_claim_events_costs_blocks_for_those_of_the_bucket_that_wait(history_url: URL) -> None:
    with connect(history_url) as connection:
        connection.execute(
            "INSERT INTO event SELECT bucket, user_id, n, n::text, 'chat.started', t, t, '{}', 'dead', 20, NULL, 'x'"
            " FROM account, generate_series(1, 50000) n, now() AS at(t) WHERE user_id = %s",
            [OLD],
        )
        connection.execute(
            "INSERT INTO event SELECT bucket, user_id, n, n::text, 'chat.started', t, t, '{}', 'pending', 0, t, NULL"
            " FROM account, generate_series(50001, 50003) n, now() AS at(t)"
        )
        connection.execute("VACUUM ANALYZE")
    bucket = bucket_of(OLD)
    sent: list[tuple[str, Parameters]] = []
    async with open_service(history_url) as service:
        with watched(lambda _, statement, parameters: sent.append((statement, parameters))):
            buckets, now = await service.database.transaction(outbox.load_due_events)
            claim = partial(outbox.claim_events, bucket=bucket, before=now, limit=10, lease_us=0)
            claimed = await service.database.transaction(claim)
            settle = partial(
                outbox.settle_events,
                bucket=bucket,
                delivered=claimed[:1],
                undelivered=[outbox.Undelivered(event, now, "x") for event in claimed[1:]],
            )
            await service.database.transaction(settle)
    assert bucket in buckets
    users = 1 + sum(bucket_of(f"u{n}") == bucket for n in range(OTHERS))
    assert sorted({(event.user_id, 50001) for event in claimed}) == sorted((e.user_id, e.number) for e in claimed)
    assert users == len(claimed)
    of_events = [(statement, parameters) for statement, parameters in sent if " event" in statement]
    assert 6 == len(of_events)
    with connect(history_url) as connection:
        for mode in ("force_custom_plan", "force_generic_plan"):
            connection.execute(f"SET plan_cache_mode = {mode}")
            for statement, parameters in of_events:
                plan = _explained(connection, statement, parameters)
                told = f"{mode}: {statement}\n{plan}"
                if "count(" not in statement:  # which is over all buckets
                    assert _blocks(plan) <= BLOCKS_MAX * users, told
                assert not _seq_scans(plan), told


async def test_beats_and_passes_over_running_chats_are_hot_updates(history_url: URL) -> None:
    """The row stays on its page, and no index is touched."""
    async with open_service(history_url, card=ONE_A_SECOND) as service:
        before = _updates(history_url)
        for _ in range(3):
            await asyncio.gather(*(operations.heartbeat(service, f"u{n}", "c") for n in range(300)))
            await sweep(service.database, asyncio.Event())
    after = _updates(history_url)
    for table, least in (("account", 3 * OTHERS), ("chat", 3 * OTHERS + 900)):
        updates, hot = (now - then for now, then in zip(after[table], before[table], strict=True))
        assert least <= updates
        assert hot >= 0.95 * updates, (table, updates, hot)


def _updates(url: URL) -> dict[str, tuple[int, int]]:
    with connect(url) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        rows = connection.execute("SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables").fetchall()
    return {name: (updates, hot) for name, updates, hot in rows}


def _explained(connection: psycopg.Connection, statement: str, parameters: Parameters) -> dict[str, Any]:
    """Run a statement as the product sent it, for its plan, and take back what it wrote."""
    connection.execute("BEGIN")
    try:
        row = connection.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}", parameters, prepare=True
        ).fetchone()
    finally:
        connection.execute("ROLLBACK")
    assert row is not None
    plan: dict[str, Any] = row[0][0]["Plan"]
    return plan


def _blocks(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


def _seq_scans(plan: dict[str, Any]) -> list[str]:
    found = [plan["Relation Name"]] if plan["Node Type"] == "Seq Scan" and plan["Relation Name"] in USER_TABLES else []
    return found + [name for child in plan.get("Plans", ()) for name in _seq_scans(child)]
