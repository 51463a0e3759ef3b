"""Users with a running chat each, and with old chats if wanted: what commands and passes would have left, by the rows.

Written set-based, without the constraints and the indexes, which are made again at the end and so checked. The audit
finds no difference in it. Rates are one micro-credit a microsecond, so costs and paid times are the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psycopg
from psycopg import sql
from sqlalchemy.engine import URL

from talktime.store.tables import bucket_of
from tests.bench.database import settle
from tests.database import connect

T = TypeVar("T")

RATE = 60_000_000
"""Micro-credits per minute."""
LEASE_S = 86_400
"""Long enough that no clock stops while something is measured."""
ABANDON_AFTER_S = 2 * LEASE_S
CHAT = "chat"
FREE_OF = 5
"""One user of so many is in free time; the others pay."""

_SEED = 1
_ADVISORS = 100
_PURCHASE = 10**14
_GRANTED_US = 365 * 86_400 * 10**6
_SEGMENT_S = 60
_STEP_S = 120  # from the beginning of an old segment to that of the next one
_COPIED_AT_ONCE = 20_000
_TABLES = ["account", "allowance", "chat", "segment", "ledger_entry"]

# How many old segments a user has, and when one of them began: the last of them a step before now.
_OLD = "(%(chats)s::int * %(segments)s::int)"
_BEGAN = f"(%(now)s - ({_OLD} - {{}} + 1) * %(step)s * interval '1 s')"

# In the order in which users came, as live tables are: each bucket's rows lie all over the table.
_FILL = {
    "accounts": f"""
        INSERT INTO account (bucket, user_id, balance, materialized_through, next_entry, due_at)
        SELECT bucket, user_id,
               %(purchase)s::bigint - CASE WHEN is_free THEN 0 ELSE {_OLD} * %(segment_us)s::bigint END,
               %(now)s, 2 + CASE WHEN is_free THEN 0 ELSE {_OLD} END, %(now)s
        FROM bench_user ORDER BY number""",
    "allowances": f"""
        INSERT INTO allowance (bucket, user_id, advisor_id, granted_us, used_us)
        SELECT bucket, user_id, advisor_id, CASE WHEN is_free THEN %(granted_us)s::bigint ELSE 0 END,
               CASE WHEN is_free THEN {_OLD} * %(segment_us)s::bigint ELSE 0 END
        FROM bench_user ORDER BY number""",
    "purchases": f"""
        INSERT INTO ledger_entry (bucket, user_id, number, kind, amount, balance_after, happened_at, recorded_at, memo,
                                  idempotency_key, request_hash)
        SELECT bucket, user_id, 1, 'purchase', %(purchase)s, %(purchase)s, {_BEGAN.format(0)}, {_BEGAN.format(0)},
               'bench', 'bench', %(hash)s
        FROM bench_user ORDER BY number""",
    "old chats": f"""
        INSERT INTO chat (bucket, user_id, chat_id, advisor_id, state, rate, first_us, increment_us, lease_us,
                          abandon_after_us, last_heartbeat_at, started_at, revision, stopped_at, stop_reason,
                          opened_count_us, count_us, elapsed_us, free_us, cost)
        SELECT bucket, user_id, 'old-' || old, advisor_id, 'ended', %(rate)s, 0, 0, %(lease_us)s, %(abandon_us)s,
               {_BEGAN.format("(old * %(segments)s)")}, {_BEGAN.format("((old - 1) * %(segments)s + 1)")},
               2 * %(segments)s, {_BEGAN.format("(old * %(segments)s)")} + %(segment)s * interval '1 s', 'ended',
               0, CASE WHEN is_free THEN 0 ELSE total_us END, total_us, CASE WHEN is_free THEN total_us ELSE 0 END,
               CASE WHEN is_free THEN 0 ELSE total_us END
        FROM (SELECT * FROM bench_user ORDER BY number) AS ordered, generate_series(1, %(chats)s) AS old,
             LATERAL (SELECT %(segments)s * %(segment_us)s::bigint AS total_us) AS sums""",
    "running chats": f"""
        INSERT INTO chat (bucket, user_id, chat_id, advisor_id, state, rate, first_us, increment_us, lease_us,
                          abandon_after_us, last_heartbeat_at, started_at, revision, opened_at,
                          opened_count_us, count_us, elapsed_us, free_us, cost, exhausts_at)
        SELECT bucket, user_id, %(chat)s, advisor_id, 'running', %(rate)s, 0, 0, %(lease_us)s, %(abandon_us)s,
               %(now)s, %(now)s, 1, %(now)s, 0, 0, 0, 0, 0,
               -- A microsecond costs a micro-credit, and first there is what is left of the free time.
               %(now)s + (%(purchase)s + CASE WHEN is_free THEN %(granted_us)s ELSE 0 END
                         - {_OLD} * %(segment_us)s::bigint)
                         * interval '1 us'
        FROM bench_user ORDER BY number""",
    "segments": f"""
        INSERT INTO segment (bucket, user_id, chat_id, started_at, ended_at, advisor_id, reason, rate, first_us,
                             increment_us, count_us, free_us, paid_us, cost)
        SELECT bucket, user_id, 'old-' || old, began_at, began_at + %(segment)s * interval '1 s', advisor_id,
               CASE WHEN part = %(segments)s THEN 'ended' ELSE 'paused' END, %(rate)s, 0, 0,
               CASE WHEN is_free THEN 0 ELSE (part - 1) * %(segment_us)s::bigint END,
               CASE WHEN is_free THEN %(segment_us)s ELSE 0 END, CASE WHEN is_free THEN 0 ELSE %(segment_us)s END,
               CASE WHEN is_free THEN 0 ELSE %(segment_us)s END
        FROM (SELECT * FROM bench_user ORDER BY number) AS ordered, generate_series(1, %(chats)s) AS old,
             generate_series(1, %(segments)s) AS part,
             LATERAL (SELECT {_BEGAN.format("((old - 1) * %(segments)s + part)")} AS began_at) AS instants""",
    "charges": f"""
        INSERT INTO ledger_entry (bucket, user_id, number, kind, amount, balance_after, happened_at, recorded_at, memo,
                                  chat_id, segment_started_at)
        SELECT bucket, user_id, 1 + nth, 'charge', -%(segment_us)s,
               %(purchase)s::bigint - nth * %(segment_us)s::bigint, ended_at, ended_at, '',
               'old-' || (1 + (nth - 1) / %(segments)s), began_at
        FROM (SELECT * FROM bench_user WHERE NOT is_free ORDER BY number) AS ordered,
             generate_series(1, {_OLD}) AS nth,
             LATERAL (SELECT {_BEGAN.format("nth")} AS began_at) AS begins,
             LATERAL (SELECT began_at + %(segment)s * interval '1 s' AS ended_at) AS ends""",
}
_OF_OLD_CHATS = ("old chats", "segments", "charges")


@dataclass(frozen=True, slots=True)
class Population:
    """A database with users, each with a running chat."""

    url: URL
    users: int

    def some_users(self, most: int) -> list[str]:
        """Return so many users, or all, spread evenly, and shuffled: they do not come in the order of the tables."""
        wanted = min(most, self.users)
        return shuffled([user(number * self.users // wanted) for number in range(wanted)])


def shuffled(values: Sequence[T]) -> list[T]:
    """Return values in an order without any order, which is the same in every run."""
    return random.Random(_SEED).sample(values, len(values))


def user(number: int) -> str:
    """Return the id of a user."""
    return f"user-{number}"


def is_free(number: int) -> bool:
    """Tell whether a user is in free time."""
    return number % FREE_OF == 0


def populate(url: URL, users: int, *, old_chats: int = 0, segments_each: int = 1) -> Population:
    """Fill an empty, migrated database."""
    with connect(url) as connection:
        with connection.transaction(), _without_indexes(connection):
            connection.execute("SET LOCAL synchronous_commit = off")
            connection.execute("SET LOCAL maintenance_work_mem = '512MB'")
            _copy_users(connection, users)
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            assert row is not None
            values = {
                "now": row[0],
                "chats": old_chats,
                "segments": segments_each,
                "segment": _SEGMENT_S,
                "segment_us": _SEGMENT_S * 10**6,
                "step": _STEP_S,
                "rate": RATE,
                "lease_us": LEASE_S * 10**6,
                "abandon_us": ABANDON_AFTER_S * 10**6,
                "granted_us": _GRANTED_US,
                "purchase": _PURCHASE,
                "hash": hashlib.sha256(f"purchase\n{_PURCHASE}\nbench".encode()).digest(),
                "chat": CHAT,
            }
            for name, statement in _FILL.items():
                if old_chats or name not in _OF_OLD_CHATS:
                    connection.execute(statement, values)
            connection.execute("DROP TABLE bench_user")
        settle(connection)
    return Population(url, users)


def _copy_users(connection: psycopg.Connection, users: int) -> None:
    connection.execute(
        'CREATE TEMPORARY TABLE bench_user (number bigint, bucket smallint, user_id text COLLATE "C",'
        ' advisor_id text COLLATE "C", is_free boolean)'
    )
    with connection.cursor() as cursor, cursor.copy("COPY bench_user FROM STDIN") as copy:
        for first in range(0, users, _COPIED_AT_ONCE):
            numbers = range(first, min(first + _COPIED_AT_ONCE, users))
            copy.write(
                "".join(
                    f"{number}\t{bucket_of(user(number))}\t{user(number)}\tadvisor-{number % _ADVISORS}"
                    f"\t{is_free(number)}\n"
                    for number in numbers
                )
            )
    connection.execute("ANALYZE bench_user")


@contextlib.contextmanager
def _without_indexes(connection: psycopg.Connection) -> Iterator[None]:
    """Take away indexes, keys and foreign keys of users' tables, and make them again when the block ends."""
    constraints = connection.execute(
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE contype IN ('p', 'u', 'f') AND (conrelid = ANY(%s::regclass[]) OR confrelid = ANY(%s::regclass[]))"
        " ORDER BY contype = 'f', conrelid, conname",
        [_TABLES, _TABLES],
    ).fetchall()
    indexes = connection.execute(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid = ANY(%s::regclass[]) AND NOT EXISTS"
        " (SELECT FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u'))",
        [_TABLES],
    ).fetchall()
    # Foreign keys go first and come back last: they stand on the others.
    for table, name, _ in reversed(constraints):
        connection.execute(sql.SQL(f"ALTER TABLE {table} DROP CONSTRAINT {{}}").format(sql.Identifier(name)))
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    yield
    for table, name, definition in constraints:
        connection.execute(
            sql.SQL(f"ALTER TABLE {table} ADD CONSTRAINT {{}} {definition}").format(sql.Identifier(name))
        )
    for _, definition in indexes:
        connection.execute(definition)
