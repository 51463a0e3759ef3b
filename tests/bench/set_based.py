"""The row writes of a pass in set-based SQL alone: ``python -m tests.bench.set_based``, told by lines of JSON.

For each running chat one row of `account` and one of `chat`, and of those in free time one of `allowance`: the values
that a pass would write, computed before and given as arrays. As a pass does, each batch writes one bucket and does not
wait for the disk; there is one connection, and none of the locks and looks that make a pass safe.

``{"prepare": true}`` computes the values as of now, ``{"us": ...}`` writes them, again and again for so long.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
from sqlalchemy.engine import make_url

from reconciler.sweep import BATCH_ACCOUNTS

_LOOK = """
SELECT bucket, user_id, chat_id, advisor_id, balance + cost, granted_us > used_us,
       round(extract(epoch FROM %s - opened_at) * 1000000)::bigint
FROM chat JOIN account USING (bucket, user_id) JOIN allowance USING (bucket, user_id, advisor_id)
WHERE state = 'running'
ORDER BY bucket, user_id
"""
_ACCOUNTS = """
UPDATE account SET balance = new.balance, materialized_through = new.at
FROM unnest(%s::text[], %s::bigint[], %s::timestamptz[]) AS new (user_id, balance, at)
WHERE account.bucket = %s AND account.user_id = new.user_id
"""
_CHATS = """
UPDATE chat SET count_us = new.count_us, elapsed_us = new.elapsed_us, free_us = new.free_us, cost = new.cost
FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
    AS new (user_id, chat_id, count_us, elapsed_us, free_us, cost)
WHERE chat.bucket = %s AND chat.user_id = new.user_id AND chat.chat_id = new.chat_id
"""
_ALLOWANCES = """
UPDATE allowance SET used_us = new.used_us
FROM unnest(%s::text[], %s::text[], %s::bigint[]) AS new (user_id, advisor_id, used_us)
WHERE allowance.bucket = %s AND allowance.user_id = new.user_id AND allowance.advisor_id = new.advisor_id
"""


@dataclass(slots=True)
class Batch:
    """The new values of some running chats of one bucket, column by column."""

    bucket: int
    users: list[str] = field(default_factory=list)
    chats: list[str] = field(default_factory=list)
    balances: list[int] = field(default_factory=list)
    instants: list[datetime] = field(default_factory=list)
    counts_us: list[int] = field(default_factory=list)
    elapsed_us: list[int] = field(default_factory=list)
    free_us: list[int] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    free_users: list[str] = field(default_factory=list)
    free_advisors: list[str] = field(default_factory=list)
    used_us: list[int] = field(default_factory=list)


def batches_as_of_now(connection: psycopg.Connection) -> list[Batch]:
    """Compute what a pass would write now, for a population that has only had its open segments."""
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    rows = connection.execute(_LOOK, [row[0]]).fetchall()
    return [
        _batch(bucket, batch, row[0])
        for bucket, of_bucket in itertools.groupby(rows, key=lambda found: found[0])
        for batch in _in_batches(list(of_bucket))
    ]


def _in_batches(rows: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(rows), BATCH_ACCOUNTS):
        yield rows[first : first + BATCH_ACCOUNTS]


def _batch(bucket: int, rows: list[Any], at: datetime) -> Batch:
    batch = Batch(bucket)
    for _, user_id, chat_id, advisor_id, credited, is_free, elapsed_us in rows:
        # A micro-credit a microsecond.
        paid_us, free_us = (0, elapsed_us) if is_free else (elapsed_us, 0)
        batch.users.append(user_id)
        batch.chats.append(chat_id)
        batch.balances.append(credited - paid_us)
        batch.instants.append(at)
        batch.counts_us.append(paid_us)
        batch.elapsed_us.append(elapsed_us)
        batch.free_us.append(free_us)
        batch.costs.append(paid_us)
        if is_free:
            batch.free_users.append(user_id)
            batch.free_advisors.append(advisor_id)
            batch.used_us.append(free_us)
    return batch


def write(connection: psycopg.Connection, batch: Batch) -> None:
    """Write a batch, in a transaction of its own."""
    with connection.transaction():
        connection.execute(_ACCOUNTS, [batch.users, batch.balances, batch.instants, batch.bucket])
        totals = [batch.counts_us, batch.elapsed_us, batch.free_us, batch.costs]
        connection.execute(_CHATS, [batch.users, batch.chats, *totals, batch.bucket])
        if batch.free_users:
            connection.execute(_ALLOWANCES, [batch.free_users, batch.free_advisors, batch.used_us, batch.bucket])


def _write_for(connection: psycopg.Connection, batches: list[Batch], us: int) -> dict[str, Any]:
    chats = rounds = 0
    began = time.perf_counter_ns()
    computed_before = time.process_time_ns()
    elapsed_us = 0
    while not rounds or elapsed_us < us:
        for batch in batches:
            write(connection, batch)
            chats += len(batch.users)
        rounds += 1
        elapsed_us = (time.perf_counter_ns() - began) // 1000
    writer_cpu_us = (time.process_time_ns() - computed_before) // 1000
    return {"chats": chats, "elapsed_us": elapsed_us, "times_all": rounds, "writer_cpu_us": writer_cpu_us}


def main() -> int:
    """Write as the lines on the standard input say."""
    url = make_url(os.environ["TALKTIME_DATABASE_URL"]).set(drivername="postgresql")
    batches: list[Batch] = []
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True, prepare_threshold=0) as connection:
        connection.execute("SET synchronous_commit = off")
        for line in sys.stdin:
            told = json.loads(line)
            if "prepare" in told:
                batches = batches_as_of_now(connection)
                print(json.dumps({"batches": len(batches), "of_at_most": BATCH_ACCOUNTS}), flush=True)
            else:
                print(json.dumps(_write_for(connection, batches, told["us"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
