"""How rows that are written all the time stay in place: ``uv run python -m tests.bench.updates [--chats 20000]``.

Every 15 seconds a running chat's row is written four times, by three heartbeats and a pass, and its account's row once.
PostgreSQL does that in place (HOT) as long as there is room in the row's page, and makes the room itself as soon as
nobody can still see the old versions. For several fillfactors, and once more while a snapshot is held, as a long dump
or report holds one, this makes some such rounds and prints what `pg_stat_user_tables` says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from pathlib import Path

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import URL

from reconciler.sweep import BATCHES_AT_ONCE, sweep
from talktime.beats import ITEMS_AT_ONCE
from talktime.store.batches import beat_many
from talktime.store.database import Database
from tests.bench.database import Server, running_server
from tests.bench.population import CHAT, populate
from tests.database import connect

TABLES = ("account", "allowance", "chat")
FILLFACTORS = ((100, 100), (90, 90), (80, 70), (60, 50))
"""Of accounts and allowances, and of chats. The third is talktime's own."""
BEATS_A_PASS = 3
STATISTICS_ARRIVE_S = 1.5  # a session tells what it did no more than once a second

_LOOK = """
SELECT n_tup_hot_upd::float / greatest(n_tup_upd, 1), n_dead_tup, pg_table_size(relid), pg_indexes_size(relid)
FROM pg_stat_user_tables WHERE relname = %s
"""


def measure(server: Server, chats: int, rounds: int, fillfactors: tuple[int, int], *, held: bool) -> list[list[str]]:
    """Make some rounds on tables with these fillfactors; return a line for each table."""
    with server.database() as url, connect(url) as connection:
        for table in TABLES:
            factor = fillfactors[1] if table == "chat" else fillfactors[0]
            connection.execute(
                sql.SQL("ALTER TABLE {} SET (fillfactor = {})").format(sql.Identifier(table), sql.Literal(factor))
            )
        populate(url, chats)
        before = [_look(connection, table) for table in TABLES]
        with contextlib.ExitStack() as stack:
            if held:
                holder = stack.enter_context(connect(url))
                holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                holder.execute("SELECT FROM advisor")
            asyncio.run(_rounds(url, chats, rounds))
            after = [_look(connection, table) for table in TABLES]
    return [
        [
            f"{fillfactors[1] if table == 'chat' else fillfactors[0]}",
            "held" if held else "",
            table,
            f"{now[0]:.1%}",
            f"{now[1] / chats:.1%}",
            f"{now[2] / then[2]:.2f}",
            f"{now[3] / then[3]:.2f}",
        ]
        for table, then, now in zip(TABLES, before, after, strict=True)
    ]


def _look(connection: psycopg.Connection, table: str) -> tuple[float, int, int, int]:
    time.sleep(STATISTICS_ARRIVE_S)
    row = connection.execute(_LOOK, [table]).fetchone()
    assert row is not None
    return row[0], row[1], row[2], row[3]


async def _rounds(url: URL, chats: int, rounds: int) -> None:
    database = Database(url, pool_size=BATCHES_AT_ONCE)
    line = database.line()
    keys = [(f"user-{number}", CHAT) for number in range(chats)]
    order = random.Random(0)
    try:
        for _ in range(rounds):
            for _ in range(BEATS_A_PASS):
                order.shuffle(keys)
                for first in range(0, chats, ITEMS_AT_ONCE):
                    batch = keys[first : first + ITEMS_AT_ONCE]
                    await line.run(lambda driver, batch=batch: beat_many(driver, batch))  # type: ignore[misc]
            await sweep(database, asyncio.Event())
    finally:
        await database.close()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=20_000, help="running, one per user (default: 20,000)")
    parser.add_argument("--rounds", type=int, default=4, help="three heartbeats and a pass each (default: 4)")
    options = parser.parse_args()
    columns = ("fillfactor", "snapshot", "table", "in place", "dead rows", "table grew to", "indexes grew to")
    table = Table(*columns)
    with (
        tempfile.TemporaryDirectory(prefix="talktime-bench-") as folder,
        running_server(Path(folder) / "home") as server,
    ):
        for held, factors in itertools.product((False, True), FILLFACTORS):
            for line in measure(server, options.chats, options.rounds, factors, held=held):
                table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    main()
