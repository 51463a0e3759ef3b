"""The row writes of a pass in set-based SQL alone: ``python -m tests.bench.set_based``, told by lines of JSON.

For each running chat one row of `account` and one of `chat`, and of those in free time one of `allowance`: the values
that a pass would write, computed before and given as arrays, whose text is made before, too. As a pass does, each batch
writes one bucket in a transaction, does not wait for the disk, and shares the database with as many others at once. It
has none of the locks and looks that make a pass safe: a batch is sent in one go, and answered in one.

``{"prepare": true}`` computes the values as of now, ``{"us": ..., "connections": ...}`` writes them, again and again
for so long.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from sqlalchemy.engine import URL, make_url

from reconciler.sweep import BATCH_ACCOUNTS, BATCHES_AT_ONCE
from talktime.store.statements import array_literal

_CLOCK = "SELECT clock_timestamp()"
_LOOK = """
SELECT bucket, user_id, chat_id, advisor_id, balance + cost, granted_us > used_us,
       round(extract(epoch FROM %s - opened_at) * 1000000)::bigint
FROM chat JOIN account USING (bucket, user_id) JOIN allowance USING (bucket, user_id, advisor_id)
WHERE state = 'running'
ORDER BY bucket, user_id
"""
_ACCOUNTS = """
UPDATE account SET balance = new.balance, materialized_through = %s
FROM unnest(%s::text::text[], %s::text::bigint[]) AS new (user_id, balance)
WHERE account.bucket = %s AND account.user_id = new.user_id
"""
_CHATS = """
UPDATE chat SET count_us = new.count_us, elapsed_us = new.elapsed_us, free_us = new.free_us, cost = new.cost
FROM unnest(%s::text::text[], %s::text::text[], %s::text::bigint[], %s::text::bigint[], %s::text::bigint[],
            %s::text::bigint[]) AS new (user_id, chat_id, count_us, elapsed_us, free_us, cost)
WHERE chat.bucket = %s AND chat.user_id = new.user_id AND chat.chat_id = new.chat_id
"""
_ALLOWANCES = """
UPDATE allowance SET used_us = new.used_us
FROM unnest(%s::text::text[], %s::text::text[], %s::text::bigint[]) AS new (user_id, advisor_id, used_us)
WHERE allowance.bucket = %s AND allowance.user_id = new.user_id AND allowance.advisor_id = new.advisor_id
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """The new values of so many running chats of one bucket: what is given to the statements, as it is sent."""

    chats: int
    statements: Sequence[tuple[str, Sequence[object]]]


async def batches_as_of_now(connection: psycopg.AsyncConnection) -> list[Batch]:
    """Compute what a pass would write now, for a population that has only had its open segments."""
    row = await (await connection.execute(_CLOCK)).fetchone()
    assert row is not None
    rows = await (await connection.execute(_LOOK, [row[0]])).fetchall()
    return [
        _batch(bucket, batch, row[0])
        for bucket, of_bucket in itertools.groupby(rows, key=lambda found: found[0])
        for batch in _in_batches(list(of_bucket))
    ]


def _in_batches(rows: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(rows), BATCH_ACCOUNTS):
        yield rows[first : first + BATCH_ACCOUNTS]


def _batch(bucket: int, rows: list[Any], at: datetime) -> Batch:
    accounts, chats, allowances = [], [], []
    for _, user_id, chat_id, advisor_id, credited, is_free, elapsed_us in rows:
        # A micro-credit a microsecond.
        paid_us, free_us = (0, elapsed_us) if is_free else (elapsed_us, 0)
        accounts.append((user_id, credited - paid_us))
        chats.append((user_id, chat_id, paid_us, elapsed_us, free_us, paid_us))
        if is_free:
            allowances.append((user_id, advisor_id, free_us))
    statements = [(_ACCOUNTS, [at, *_literals(accounts), bucket]), (_CHATS, [*_literals(chats), bucket])]
    if allowances:
        statements.append((_ALLOWANCES, [*_literals(allowances), bucket]))
    return Batch(len(rows), statements)


def _literals(rows: list[Any]) -> list[str]:
    return [array_literal(column) for column in zip(*rows, strict=True)]


async def write(connections: Sequence[psycopg.AsyncConnection], batches: Sequence[Batch]) -> int:
    """Write batches, each connection the next one as soon as it is done with one; return of how many chats."""
    waiting = iter(batches)

    async def work(connection: psycopg.AsyncConnection) -> int:
        chats = 0
        for batch in waiting:
            await _write_one(connection, batch)
            chats += batch.chats
        return chats

    async with asyncio.TaskGroup() as workers:
        working = [workers.create_task(work(connection)) for connection in connections]
    return sum(task.result() for task in working)


async def _write_one(connection: psycopg.AsyncConnection, batch: Batch) -> None:
    async with connection.pipeline():
        await connection.execute("BEGIN")
        for statement, values in batch.statements:
            await connection.execute(statement, values)
        await connection.execute("COMMIT")


async def _write_for(
    connections: Sequence[psycopg.AsyncConnection], batches: Sequence[Batch], us: int
) -> dict[str, Any]:
    chats = rounds = 0
    began = time.perf_counter_ns()
    computed_before = time.process_time_ns()
    elapsed_us = 0
    while not rounds or elapsed_us < us:
        chats += await write(connections, batches)
        rounds += 1
        elapsed_us = (time.perf_counter_ns() - began) // 1000
    writer_cpu_us = (time.process_time_ns() - computed_before) // 1000
    return {"chats": chats, "elapsed_us": elapsed_us, "times_all": rounds, "writer_cpu_us": writer_cpu_us}


@contextlib.asynccontextmanager
async def open_connections(url: URL) -> AsyncIterator[list[psycopg.AsyncConnection]]:
    """Connect as often as a pass does. No commit waits for the disk."""
    target = url.set(drivername="postgresql").render_as_string(hide_password=False)
    async with contextlib.AsyncExitStack() as stack:
        connections = []
        for _ in range(BATCHES_AT_ONCE):
            made = await psycopg.AsyncConnection.connect(target, autocommit=True, prepare_threshold=0)
            connections.append(await stack.enter_async_context(made))
            await made.execute("SET synchronous_commit = off")
        yield connections


async def _work() -> None:
    batches: list[Batch] = []
    async with open_connections(make_url(os.environ["TALKTIME_DATABASE_URL"])) as connections:
        # One line at a time, with nothing else to do meanwhile.
        for line in sys.stdin:
            told = json.loads(line)
            if "prepare" in told:
                batches = await batches_as_of_now(connections[0])
                answer: dict[str, Any] = {"batches": len(batches), "of_at_most": BATCH_ACCOUNTS}
            else:
                answer = await _write_for(connections[: told["connections"]], batches, told["us"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_work())
