"""Benchmarks: ``uv run python -m tests.bench``. Prints a table; ratios of one run mean more than seconds.

Uses the PostgreSQL of TALKTIME_DATABASE_URL, in a database of its own that is dropped again, else an embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import URL, make_url

from reconciler.sweep import sweep
from talktime.store.database import Database, provide_database
from talktime.store.schema import upgrade
from talktime.store.tables import bucket_of
from tests.database import connect

DATABASE = "talktime_bench"


def main() -> int:
    """Measure passes over open chats."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--chats", type=int, default=10_000, help="open chats, one per user (default: 10,000)")
    parser.add_argument("--passes", type=int, default=5, help="counted passes, after one that is not (default: 5)")
    parser.add_argument("--measure-pass", type=str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_pass:
        return asyncio.run(_measure(make_url(options.measure_pass), options.passes))
    given = os.environ.get("TALKTIME_DATABASE_URL")
    rows = []
    with (
        tempfile.TemporaryDirectory() as home,
        provide_database(make_url(given).set(drivername="postgresql+psycopg") if given else None, Path(home)) as server,
    ):
        for chats in (options.chats // 10, options.chats):
            with connect(server) as connection:
                connection.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
                connection.execute(f"CREATE DATABASE {DATABASE}")
            url = server.set(database=DATABASE)
            upgrade(url)
            _fill(url, chats)
            rows.append((chats, *_measured_apart(url, options.passes)))
            with connect(server) as connection:
                connection.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")
    table = Table(
        "open chats", "pass, median s", "fastest s", "chats per s", "peak memory MB", title="A pass, one process"
    )
    for chats, seconds, memory_mb in rows:
        median = sorted(seconds)[len(seconds) // 2]
        table.add_row(
            f"{chats:,}", f"{median:.3f}", f"{min(seconds):.3f}", f"{chats / median:,.0f}", f"{memory_mb:.1f}"
        )
    Console().print(table)
    return 0


def _fill(url: URL, chats: int) -> None:
    """Write users with a running chat each, by the rows: what a start writes, without its cost."""
    with connect(url) as connection, connection.cursor() as cursor:
        row = cursor.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        users = [(bucket_of(f"user-{n}"), f"user-{n}") for n in range(chats)]
        with cursor.copy(
            "COPY account (bucket, user_id, balance, materialized_through, next_entry, due_at) FROM STDIN"
        ) as copy:
            for bucket, user_id in users:
                copy.write_row((bucket, user_id, 10**12, row[0], 1, row[0]))
        cursor.execute(
            "INSERT INTO allowance SELECT bucket, user_id, 'advisor-' || hashtext(user_id) % 100, 0, 0 FROM account"
        )
        cursor.execute(
            "INSERT INTO chat SELECT bucket, user_id, 'chat', advisor_id, 'running', 60000000, 0, 0, 3600000000,"
            " 7200000000, due_at, due_at, 1, NULL, NULL, NULL, due_at, 0, 0, 0, 0, 0 FROM account JOIN allowance"
            " USING (bucket, user_id)"
        )
        cursor.execute("VACUUM ANALYZE")


def _measured_apart(url: URL, passes: int) -> tuple[list[float], float]:
    """Measure in a process of its own, whose memory is the pass's alone."""
    shown = url.render_as_string(hide_password=False)
    out = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--measure-pass", shown, "--passes", str(passes)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()
    return [float(seconds) for seconds in out[:-1]], float(out[-1])


async def _measure(url: URL, passes: int) -> int:
    database = Database(url, pool_size=8)
    for counted in range(passes + 1):
        began = time.perf_counter()
        made = await sweep(database, asyncio.Event())
        if counted:
            print(time.perf_counter() - began)
        assert not made.failed
    await database.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return 0


if __name__ == "__main__":
    sys.exit(main())
