"""The writer that talktime's design replaces: ``python -m tests.bench.interval_writer``, told by lines of JSON.

This is how such a product is usually built, and what a reviewer may hold this file against:

- The server keeps a timer for each chat that runs. Every 15 seconds it fires, and writes those 15 seconds.
- When it fires it (1) selects the chat's time record, (2) selects the records of the pair, that is of this user with
  this advisor, for the free time that they share, (3) updates the record: 15 seconds more, (4) selects the chat,
  (5) updates it: its sum and when it was last charged, and (6) updates the user: so many credits less.
- Each of the six is a statement of its own, as an object-relational mapper sends it; nothing holds them together.

That is the way ``statements``, and the one that counts. Two others are measured for information:

- ``transaction``: one transaction around the six, so that they hold together, and wait for the disk once.
- ``unsafe``: the six without waiting for the disk, as passes commit. A pass may: what it writes is derived from what is
  stored durably, and is derived again if it is lost. An increment may not: what is lost of it is lost for good.

It is fair to it where it can be: timers are tasks of one event loop, not threads; the driver is the API's, with a pool
of as many connections as the API has, prepared statements, and one connection for all six; each statement finds its
rows by an index; rows are updated in place (fillfactor 70); a pair has one record; one user of five is in free time,
as in the population; and the durability is the server's own. Plain psycopg and 20 connections flatter it against any
object-relational mapper with its usual pool of 5 to 10. It writes three rows for each chat, a pass 2.2: account and
chat, and the allowance of one in five.

What it can do at most is seen when all timers fire at once. Each run goes on with other chats, in an order that has
nothing to do with that of the tables, and its time begins with the first write that is done, which does not count.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import psycopg
from sqlalchemy.engine import URL, make_url

from tests.bench.database import settle
from tests.bench.population import FREE_OF, shuffled

INTERVAL_S = 15
CONNECTIONS = 20  # as many as the API has
FIRST_AFTER_S = 1
FREE_S = 365 * 86_400
"""Of each pair: enough for whoever has not used it up to stay in free time, as in the population."""

_CENTS_PER_MINUTE = 150

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
_FREE_USED_S = f"CASE WHEN n %% {FREE_OF} = 0 THEN 0 ELSE {FREE_S} END"
FILL = (
    f"INSERT INTO interval_user SELECT n, 'user ' || n, 1000000000 {_EACH}",
    f"INSERT INTO interval_chat SELECT n, n, n %% 100, 'running', 0, 0, NULL {_EACH}",
    f"INSERT INTO interval_record SELECT n, n, n, n %% 100, clock_timestamp(), 0, {_FREE_USED_S} {_EACH}",
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


async def write_statements(connection: psycopg.AsyncConnection, record_id: int) -> None:
    """Write an interval with six statements, each of which commits by itself."""
    await write_interval(connection, record_id)


async def write_transaction(connection: psycopg.AsyncConnection, record_id: int) -> None:
    """Write an interval in one transaction."""
    async with connection.transaction():
        await write_interval(connection, record_id)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to write an interval, on connections with a setting of their own if need be."""

    write: Callable[[psycopg.AsyncConnection, int], Awaitable[None]]
    session: str = "RESET synchronous_commit"


WAYS: Mapping[str, Way] = {
    "statements": Way(write_statements),
    "transaction": Way(write_transaction),
    "unsafe": Way(write_statements, "SET synchronous_commit = off"),
}


@dataclass(slots=True)
class Writer:
    """Timers for chats, and a pool of connections that they share, until all have written or the time is over."""

    pool: asyncio.Queue[psycopg.AsyncConnection]
    way: Way
    chats: int
    us: int
    over: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    written_at: list[float] = field(default_factory=list, init=False)

    async def timer(self, record_id: int, due: float) -> None:
        """Write a chat's interval whenever it is due, until all is over."""
        loop = asyncio.get_running_loop()
        try:
            while not self.over.is_set():
                await asyncio.sleep(due - loop.time())
                await self._fire(record_id)
                due += INTERVAL_S
        except Exception:
            self.over.set()
            raise

    async def _fire(self, record_id: int) -> None:
        connection = await self.pool.get()
        try:
            if not self.over.is_set():
                await self.way.write(connection, record_id)
                self._count()
        finally:
            self.pool.put_nowait(connection)

    def _count(self) -> None:
        self.written_at.append(asyncio.get_running_loop().time())
        if len(self.written_at) >= self.chats or self.elapsed_us >= self.us:
            self.over.set()

    @property
    def elapsed_us(self) -> int:
        """Return how long it took from the first write that was done to the last."""
        return round((self.written_at[-1] - self.written_at[0]) * 1_000_000) if self.written_at else 0


async def write_interval(connection: psycopg.AsyncConnection, record_id: int) -> None:
    """Write that a chat ran for another interval, and take what it costs beyond the pair's free time."""
    record = await (await connection.execute(_SELECT_RECORD, [record_id])).fetchone()
    assert record is not None
    _, chat_id, user_id, advisor_id, duration_s, free_s = record
    pair = await (await connection.execute(_SELECT_PAIR, [user_id, advisor_id])).fetchall()
    free_now_s = max(0, min(INTERVAL_S, FREE_S - sum(row[2] for row in pair)))
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


async def write_all_at_once(
    pool: asyncio.Queue[psycopg.AsyncConnection], way: Way, records: Sequence[int], us: int
) -> dict[str, Any]:
    """Let the timers of records fire at the same moment, and see how many have written within the time."""
    loop = asyncio.get_running_loop()
    writer = Writer(pool, way, chats=len(records), us=us)
    connections = [await pool.get() for _ in range(CONNECTIONS)]
    for connection in connections:
        await connection.execute(way.session)
        pool.put_nowait(connection)
    waits = await (await connections[0].execute("SHOW synchronous_commit")).fetchone()
    due = loop.time() + FIRST_AFTER_S
    timers = [asyncio.create_task(writer.timer(record_id, due)) for record_id in records]
    await asyncio.sleep(due - loop.time())
    computed_before = time.process_time_ns()
    await writer.over.wait()
    for _ in connections:
        await pool.get()  # what is under way is finished, and counts
    for timer in timers:
        timer.cancel()
    for outcome in await asyncio.gather(*timers, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    for connection in connections:
        pool.put_nowait(connection)
    return {
        "chats": len(writer.written_at),
        "counted": len(writer.written_at) - 1,
        "timers": len(records),
        "synchronous_commit": waits[0] if waits else "",
        "elapsed_us": writer.elapsed_us,
        "writer_cpu_us": (time.process_time_ns() - computed_before) // 1000,
    }


async def _work() -> None:
    records: Iterator[int] = iter(())
    async with open_pool(make_url(os.environ["TALKTIME_DATABASE_URL"])) as pool:
        # One line at a time, with nothing else to do meanwhile.
        for line in sys.stdin:
            told = json.loads(line)
            if "chats" in told:
                records = cycle(shuffled(range(1, told["chats"] + 1)))
                answer = {"chats": told["chats"]}
            else:
                timers = list(islice(records, told["timers"]))
                answer = await write_all_at_once(pool, WAYS[told["way"]], timers, told["us"])
            print(json.dumps(answer), flush=True)


def prepare(connection: psycopg.Connection, chats: int) -> None:
    """Make the tables, with so many chats."""
    connection.execute(TABLES)
    for statement in FILL:
        connection.execute(statement, {"chats": chats})
    settle(connection, "interval_user", "interval_chat", "interval_record")


if __name__ == "__main__":
    asyncio.run(_work())
