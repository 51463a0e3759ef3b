"""Old databases, made up by chance from a seed, with all the oddities that such have."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from psycopg import sql

from tests.database import connect

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.engine import URL

USUAL = """
CREATE TABLE "user" (id text, credits numeric);
CREATE TABLE chat (id text, user_id text, advisor_id text, duration double precision);
CREATE TABLE conversation_time_record (
    id text, user_id text, advisor_id text, chat_id text, duration double precision, credits_used numeric,
    free_time_used double precision, total_free_time_allocation double precision, is_active boolean,
    "timestamp" timestamptz, last_heartbeat_time timestamptz
);
"""
CAMEL_CASE = """
CREATE SCHEMA product;
CREATE TABLE product."Users" ("id" integer, "credits" integer, "email" text NOT NULL DEFAULT '-');
CREATE TABLE product."Chats" ("id" integer, "userId" integer, "advisorId" integer, "duration" integer);
CREATE TABLE product."conversationTimeRecord" (
    "id" serial, "userId" integer, "advisorId" integer, "chatId" integer, "duration" integer, "creditsUsed" integer,
    "freeTimeUsed" integer, "totalFreeTimeAllocation" integer, "isActive" integer, "timestamp" timestamp,
    "lastHeartbeatTime" timestamp
);
"""
"""The same tables as another product has them: numbers for ids, whole seconds, times without a zone."""


class Row(NamedTuple):
    """A row: of which table, and its values."""

    table: str
    values: tuple[object, ...]


FILLED_AT = datetime(2026, 1, 1, tzinfo=UTC)
_BEAT_NOW = """
UPDATE conversation_time_record SET last_heartbeat_time = clock_timestamp() - interval '1 second'
WHERE is_active AND right(id, 1) = '7'
"""
_RECORD = sql.SQL("COPY conversation_time_record FROM STDIN")
_TABLES = {"user": sql.SQL('COPY "user" FROM STDIN'), "chat": sql.SQL("COPY chat FROM STDIN"), "record": _RECORD}


def fill(url: URL, records: int, *, seed: int = 0) -> None:
    """Make the usual old tables, with about so many time records."""
    with connect(url) as connection:
        connection.execute(USUAL)
        _copy(connection, [*_odd_database(random.Random(seed), records)])
        beat(url)


def beat(url: URL) -> None:
    """Let some of the active records have had a heartbeat a second ago."""
    with connect(url) as connection:
        connection.execute(_BEAT_NOW)


def _copy(connection: psycopg.Connection, rows: list[Row]) -> None:
    for table, copying in _TABLES.items():
        with connection.cursor().copy(copying) as copy:
            for row in rows:
                if row.table == table:
                    copy.write_row(row.values)


def _odd_database(chance: random.Random, records: int) -> Iterator[Row]:
    made = user = 0
    while made < records:
        user += 1
        user_id = f"user-{user:07d}"
        for row in _user(chance, user_id):
            made += row.table == "record"
            yield row
    yield Row("record", ("r-nobody", None, "a1", "c1", 12.5, 1, 0, 180, True, None, None))
    yield Row("chat", ("c-nobody", None, "a1", 7))
    yield Row("user", (None, 5))
    yield Row("user", ("not an id!", 5))
    yield Row("record", ("r-bad", "not an id!", "a1", "c1", 5, 1, 2, 180, False, None, None))
    yield Row("user", ("twice", 5))
    yield Row("user", ("twice", 6))


def _user(chance: random.Random, user_id: str) -> Iterator[Row]:
    if chance.random() > 0.01:
        yield Row("user", (user_id, _odd(chance, f"{chance.uniform(0, 500):.6f}", negative="-3.5")))
    for pair in range(chance.choice([1, 1, 1, 2, 3])):
        advisor_id = f"advisor-{chance.randrange(200)}-{pair}"
        if chance.random() < 0.4:  # one record, moved from chat to chat
            yield from _moved(chance, user_id, advisor_id)
        else:
            for number in range(chance.choice([1, 1, 2, 5])):
                yield from _chat(chance, user_id, advisor_id, f"{advisor_id}.{number}")


def _moved(chance: random.Random, user_id: str, advisor_id: str) -> Iterator[Row]:
    chats = chance.randrange(1, 4)
    for number in range(chats - 1):
        yield Row("chat", (f"{advisor_id}.{number}", user_id, advisor_id, _odd(chance, chance.randrange(4000))))
    record = _record(chance, user_id, advisor_id, f"{advisor_id}.{chats - 1}")
    yield Row("chat", (record.values[3], user_id, advisor_id, record.values[4]))
    yield record


def _chat(chance: random.Random, user_id: str, advisor_id: str, chat_id: str) -> Iterator[Row]:
    kind = chance.random()
    record = _record(chance, user_id, advisor_id, chat_id)
    if kind > 0.02:  # else a record without its chat
        other = "another" if kind < 0.03 else advisor_id
        yield Row("chat", (chat_id, user_id, other, 77 if kind < 0.04 else record.values[4]))
    if kind < 0.96:  # else a chat without its record
        yield record
    if kind > 0.99:
        yield _record(chance, user_id, advisor_id, chat_id)  # twice, or once more


def _record(chance: random.Random, user_id: str, advisor_id: str, chat_id: str | None) -> Row:
    duration = _odd(chance, chance.choice([15 * chance.randrange(300), round(chance.uniform(0, 4000), 3)]))
    age = chance.choice([3, 60, 1000, 90_000, 40_000_000])
    return Row(
        "record",
        (
            f"r{chance.randrange(10**12)}",
            user_id,
            None if chance.random() < 0.003 else advisor_id,
            None if chance.random() < 0.003 else chat_id,
            duration,
            _odd(chance, f"{chance.uniform(0, 60):.4f}", negative="-1"),
            _odd(chance, chance.choice([0, 45, 180, 195])),
            _odd(chance, 180),
            None if chance.random() < 0.01 else chance.random() < 0.3,
            _ago(chance, age + 500),
            _ago(chance, age),
        ),
    )


def _odd(chance: random.Random, usual: object, *, negative: object = -20) -> object:
    kind = chance.random()
    if kind < 0.01:
        return None
    if kind < 0.015:
        return negative
    return "NaN" if kind < 0.017 else usual


def _ago(chance: random.Random, seconds: int) -> str | None:
    # Those that are to be recent are made so once all rows are there.
    return None if chance.random() < 0.02 else (FILLED_AT - timedelta(seconds=seconds + chance.random())).isoformat()
