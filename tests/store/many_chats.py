"""Many users' chats on one database: how they are made, beaten and looked at where batches of them are tested.

Their clocks are tiny: in microseconds, and meant for simulated time, which stands still unless it is moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg import sql
from sqlalchemy.engine import URL

from talktime import beats, operations
from talktime.errors import TalktimeError
from talktime.meter.reading import Reading
from talktime.meter.state import Policy, Scope
from talktime.operations import Service
from talktime.store.tables import bucket_of
from tests.database import Clock, connect

Keys: TypeAlias = Sequence[tuple[str, str]]

LEASE, ABANDON = 100, 10_000
TINY = Policy(Scope.ADVISOR, LEASE, ABANDON)
HANGS_AFTER_SECONDS = 60
"""A test that waits for so long waits for ever."""

_TABLES = ("account", "allowance", "chat", "segment", "ledger_entry")
_ROWS = "SELECT user_id, to_jsonb(chat) - 'bucket' - 'user_id' FROM chat WHERE user_id = ANY(%s) ORDER BY 1, chat_id"
_BEAT = "SELECT (extract(epoch FROM last_heartbeat_at) * 1000000)::bigint FROM chat WHERE user_id = %s AND chat_id = %s"
_COPY = sql.SQL(
    "INSERT INTO {table} SELECT made.* FROM {table} AS one, unnest(%s::int[], %s::text[]) AS new(bucket, user_id),"
    " jsonb_populate_record(one, to_jsonb(new)) AS made WHERE one.user_id = %s"
)


async def start(service: Service, user_id: str, chat_id: str = "c", advisor_id: str = "a") -> Reading:
    return await operations.start(service, user_id, chat_id, advisor_id=advisor_id, key=None)


def copy_user(url: URL, like: str, user_ids: Sequence[str]) -> None:
    """Give these users all that one has, as if each had done the same at the same instants."""
    buckets = [bucket_of(user_id) for user_id in user_ids]
    with connect(url) as connection:
        for table in _TABLES:
            connection.execute(_COPY.format(table=sql.Identifier(table)), [buckets, list(user_ids), like])


async def ten_running(service: Service, clock: Clock, url: URL) -> Keys:
    """Let ten users' chats run for half a lease."""
    await start(service, "u0")
    keys = [(f"u{n}", "c") for n in range(10)]
    copy_user(url, "u0", [user_id for user_id, _ in keys[1:]])
    clock.tick(LEASE // 2)
    return keys


def beat_ten(service: Service, keys: Keys) -> list[asyncio.Task[Any]]:
    """Beat each of ten chats: half of them one by one, the others in one request."""
    singly = [asyncio.create_task(operations.heartbeat(service, *key)) for key in keys[:5]]
    return [*singly, asyncio.create_task(beat_in_a_request(service, keys[5:]))]


async def beat_in_a_request(service: Service, keys: Keys) -> Sequence[beats.Beaten]:
    """Beat these chats in one request; what is told of the request as a whole is told of each."""
    try:
        return await beats.heartbeats(service, keys)
    except TalktimeError as error:
        return [error] * len(keys)


def ten_answers(found: Sequence[Any]) -> list[Any]:
    """Return what `beat_ten` found for each chat: its state, or why there is none."""
    return [*map(state_of, found[:-1]), *found[-1]]


def state_of(answer: Any) -> Any:  # noqa: ANN401 - what becomes of a heartbeat, alone or in a request
    """Return the state in a reading; what is none stays as it is."""
    return answer.state if isinstance(answer, Reading) else answer


# --- what is stored ---------------------------------------------------------------------------------------------------


def everything(url: URL) -> dict[str, list[Any]]:
    """Return all rows of all users."""
    with connect(url) as connection:
        return {
            table: [
                row
                for (row,) in connection.execute(
                    sql.SQL("SELECT to_jsonb(t) FROM {} t ORDER BY 1").format(sql.Identifier(table))
                )
            ]
            for table in _TABLES
        }


def chat_rows(url: URL, user_ids: Iterable[str]) -> dict[str, list[Any]]:
    """Return what is stored of the users' chats, but for whose they are."""
    found: dict[str, list[Any]] = {user_id: [] for user_id in user_ids}
    with connect(url) as connection:
        for user_id, row in connection.execute(_ROWS, [list(found)]):
            found[user_id].append(row)
    return found


def beat_at(url: URL, user_id: str, chat_id: str = "c") -> int:
    """Return the last heartbeat that is stored, as others see it, in microseconds."""
    with connect(url) as connection:
        row = connection.execute(_BEAT, [user_id, chat_id]).fetchone()
    assert row
    return int(row[0])


def beats_at(url: URL, keys: Keys) -> set[int]:
    """Return all last heartbeats of these chats."""
    return {beat_at(url, *key) for key in keys}


# --- what is in the way -----------------------------------------------------------------------------------------------


@contextmanager
def chat_locked(url: URL, user_id: str) -> Iterator[psycopg.Connection]:
    """Hold a user's chats locked, as a command would."""
    with connect(url) as holder, holder.transaction():
        holder.execute("SELECT FROM chat WHERE user_id = %s FOR NO KEY UPDATE", [user_id])
        yield holder


@contextmanager
def chats_shut(url: URL) -> Iterator[psycopg.Connection]:
    """Let nobody get at the chats, not even to read."""
    with connect(url) as holder, holder.transaction():
        holder.execute("LOCK TABLE chat IN ACCESS EXCLUSIVE MODE")
        yield holder


@contextmanager
def commits_held(url: URL) -> Iterator[psycopg.Connection]:
    """Hold back whatever commits a change of a chat: in the database, between the last statement and the end."""
    with connect(url) as holder:
        holder.execute(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
            " PERFORM set_config('lock_timeout', '0', true); PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
        )
        holder.execute(
            "CREATE CONSTRAINT TRIGGER hold AFTER UPDATE ON chat DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION hold()"
        )
        holder.execute("SELECT pg_advisory_lock(1)")
        yield holder


def end_sessions(connection: psycopg.Connection, condition: str = "true") -> list[bool]:
    """End the service's sessions, or those of them that fulfil the condition, and wait until they have ended."""
    return [
        ended
        for (ended,) in connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            f" WHERE datname = current_database() AND application_name = 'talktime' AND {condition}"
        ).fetchall()
    ]


@contextmanager
def undecodable(url: URL, user_id: str) -> Iterator[None]:
    """Let a user's running chats, of which it is not known whether they have credits, have stopped for no reason."""
    with connect(url) as connection:
        for name in ("ck_chat_stop_reason", "ck_chat_stopped_for_a_reason"):
            connection.execute(sql.SQL("ALTER TABLE chat DROP CONSTRAINT {}").format(sql.Identifier(name)))
        connection.execute("UPDATE chat SET stop_reason = 'vanity', exhausts_at = NULL WHERE user_id = %s", [user_id])
        yield
        connection.execute("UPDATE chat SET stop_reason = NULL WHERE user_id = %s", [user_id])
