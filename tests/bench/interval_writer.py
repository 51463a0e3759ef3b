"""The writer that talktime's design replaces: ``python -m tests.bench.interval_writer``, told by lines of JSON.

This is how such a product is usually built, and what a reviewer may hold this file against:

- The server keeps a timer for each chat that runs. Every 15 seconds it fires, and writes those 15 seconds.
- When it fires it (1) selects the chat's time record, (2) selects the records of the pair, that is of this user with
  this advisor, for the free time that they share, (3) updates the record: 15 seconds more, (4) selects the chat,
  (5) updates it: its sum and when it was last charged, and (6) updates the user: so many credits less.
- Each of the six is a statement of its own, as an object-relational mapper sends it; nothing holds them together.

It is fair to it where it can be: timers are tasks of one event loop, not threads; the driver is the API's, with a pool
of as many connections as the API has, prepared statements, and one connection for all six; each statement finds its
rows by an index; rows are updated in place (fillfactor 70); a pair has one record; and the durability is the server's
own. What it can do at most is seen when all timers fire at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy.engine import URL, make_url

INTERVAL_S = 15
CONNECTIONS = 20  # as many as the API has
FIRST_AFTER_S = 1
LOOK_AGAIN_S = 0.01

_CENTS_PER_MINUTE = 150
_FREE_S = 180

TABLES = """
DROP TABLE IF EXISTS interval_user, interval_chat, interval_record;
CREATE TABLE interval_user (user_id bigint PRIMARY KEY, name text NOT NULL, credits bigint NOT NULL)
    WITH (fillfactor = 70);
CREATE TABLE interval_chat (
    chat_id bigint PRIMARY KEY, user_id bigint NOT NULL, advisor_id bigint NOT NULL, status text NOT NULL,
    duration_s bigint NOT NULL, charged bigint NOT NULL, charged_at timestamptz
) WITH (fillfactor = 70);
CREATE TABLE interval_record (
    record_id bigint PRIMARY KEY, chat_id bigint NOT NULL, user_id bigint NOT NULL, advisor_id bigint NOT NULL,
    started_at timestamptz NOT NULL, duration_s bigint NOT NULL, free_s bigint NOT NULL
) WITH (fillfactor = 70);
CREATE INDEX ON interval_record (user_id, advisor_id);
CREATE INDEX ON interval_chat (user_id);
"""
_EACH = "FROM generate_series(1, %(chats)s) AS n"
FILL = (
    f"INSERT INTO interval_user SELECT n, 'user ' || n, 1000000000 {_EACH}",
    f"INSERT INTO interval_chat SELECT n, n, n %% 100, 'running', 0, 0, NULL {_EACH}",
    f"INSERT INTO interval_record SELECT n, n, n, n %% 100, clock_timestamp(), 0, 0 {_EACH}",
)

_SELECT_RECORD = (
    "SELECT record_id, chat_id, user_id, advisor_id, duration_s, free_s FROM interval_record WHERE record_id = %s"
)
_SELECT_PAIR = "SELECT record_id, duration_s, free_s FROM interval_record WHERE user_id = %s AND advisor_id = %s"
_UPDATE_RECORD = "UPDATE interval_record SET duration_s = %s, free_s = %s WHERE record_id = %s"
_SELECT_CHAT = "SELECT chat_id, status, duration_s, charged FROM interval_chat WHERE chat_id = %s"
_UPDATE_CHAT = (
    "UPDATE interval_chat SET duration_s = %s, charged = %s, charged_at = clock_timestamp() WHERE chat_id = %s"
)
_UPDATE_USER = "UPDATE interval_user SET credits = credits - %s WHERE user_id = %s"


@dataclass(slots=True)
class Writer:
    """Timers for chats, and a pool of connections that they share."""

    pool: asyncio.Queue[psycopg.AsyncConnection]
    written: int = 0
    last_written: float = 0.0
    is_over: bool = False

    async def timer(self, record_id: int, due: float) -> None:
        """Write a chat's interval whenever it is due, until all is over."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(due - loop.time())
            connection = await self.pool.get()
            try:
                if self.is_over:
                    return
                await write_interval(connection, record_id)
                self.written += 1
                self.last_written = loop.time()
            finally:
                self.pool.put_nowait(connection)
            due += INTERVAL_S


async def write_interval(connection: psycopg.AsyncConnection, record_id: int) -> None:
    """Write that a chat ran for another interval, and take what it costs beyond the pair's free time."""
    record = await (await connection.execute(_SELECT_RECORD, [record_id])).fetchone()
    assert record is not None
    _, chat_id, user_id, advisor_id, duration_s, free_s = record
    pair = await (await connection.execute(_SELECT_PAIR, [user_id, advisor_id])).fetchall()
    free_now_s = max(0, min(INTERVAL_S, _FREE_S - sum(row[2] for row in pair)))
    await connection.execute(_UPDATE_RECORD, [duration_s + INTERVAL_S, free_s + free_now_s, record_id])
    chat = await (await connection.execute(_SELECT_CHAT, [chat_id])).fetchone()
    assert chat is not None
    cost = _CENTS_PER_MINUTE * (INTERVAL_S - free_now_s) // 60
    await connection.execute(_UPDATE_CHAT, [chat[2] + INTERVAL_S, chat[3] + cost, chat_id])
    await connection.execute(_UPDATE_USER, [cost, user_id])


@asynccontextmanager
async def open_pool(url: URL) -> AsyncIterator[asyncio.Queue[psycopg.AsyncConnection]]:
    target = url.set(drivername="postgresql").render_as_string(hide_password=False)
    pool: asyncio.Queue[psycopg.AsyncConnection] = asyncio.Queue()
    made = []
    try:
        for _ in range(CONNECTIONS):
            connection = await psycopg.AsyncConnection.connect(target, autocommit=True, prepare_threshold=0)
            made.append(connection)
            pool.put_nowait(connection)
        yield pool
    finally:
        for connection in made:
            await connection.close()


async def write_all_at_once(pool: asyncio.Queue[psycopg.AsyncConnection], chats: int, us: int) -> dict[str, Any]:
    """Let the timers of so many chats fire at the same moment, and see how many have written within the time."""
    loop = asyncio.get_running_loop()
    writer = Writer(pool)
    due = loop.time() + FIRST_AFTER_S
    timers = [asyncio.create_task(writer.timer(record_id, due)) for record_id in range(1, chats + 1)]
    await asyncio.sleep(due - loop.time())
    due = max(due, loop.time())  # so many timers take a while to be set
    computed_before = time.process_time_ns()
    while loop.time() < due + us / 1_000_000 and writer.written < chats:
        await asyncio.sleep(LOOK_AGAIN_S)
        if any(timer.done() for timer in timers[:CONNECTIONS]):
            break  # it failed, for otherwise it would go on; the others do too
    writer.is_over = True
    held = [await pool.get() for _ in range(CONNECTIONS)]  # what is under way is finished, and counts
    for timer in timers:
        timer.cancel()
    for outcome in await asyncio.gather(*timers, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    for connection in held:
        pool.put_nowait(connection)
    return {
        "chats": writer.written,
        "timers": chats,
        "elapsed_us": round((writer.last_written - due) * 1_000_000),
        "writer_cpu_us": (time.process_time_ns() - computed_before) // 1000,
    }


async def _work() -> None:
    async with open_pool(make_url(os.environ["TALKTIME_DATABASE_URL"])) as pool:
        # One line at a time, with nothing else to do meanwhile.
        for line in sys.stdin:
            told = json.loads(line)
            print(json.dumps(await write_all_at_once(pool, told["timers"], told["us"])), flush=True)


def prepare(connection: psycopg.Connection, chats: int) -> None:
    """Make the tables, with so many chats."""
    connection.execute(TABLES)
    for statement in FILL:
        connection.execute(statement, {"chats": chats})
    connection.execute("VACUUM (FREEZE, ANALYZE) interval_user, interval_chat, interval_record")


if __name__ == "__main__":
    asyncio.run(_work())
