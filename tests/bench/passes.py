"""Passes in a process of its own: ``python -m tests.bench.passes``; for each line of JSON, as many as fit the time."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from reconciler.sweep import sweep
from talktime.settings import load_settings
from talktime.store.database import Database

CONNECTIONS_MAX = 8


async def _passes(database: Database, us: int) -> dict[str, Any]:
    made: list[dict[str, int]] = []
    elapsed_us = 0
    computed_before = time.process_time_ns()
    while not made or elapsed_us < us:
        began = time.perf_counter_ns()
        found = await sweep(database, asyncio.Event())
        took_us = (time.perf_counter_ns() - began) // 1000
        elapsed_us += took_us
        made.append({"accounts": found.accounts, "chats": found.chats, "failed": found.failed, "elapsed_us": took_us})
    return {
        "chats": sum(one["chats"] for one in made),
        "failed": sum(one["failed"] for one in made),
        "elapsed_us": elapsed_us,
        "passes": made,
        "reconciler_cpu_us": (time.process_time_ns() - computed_before) // 1000,
    }


async def _work() -> None:
    url = load_settings().database_url
    assert url is not None
    database = Database(url, pool_size=CONNECTIONS_MAX)
    try:
        # One line at a time, with nothing else to do meanwhile.
        for line in sys.stdin:
            print(json.dumps(await _passes(database, json.loads(line)["us"])), flush=True)
    finally:
        await database.close()


if __name__ == "__main__":
    asyncio.run(_work())
