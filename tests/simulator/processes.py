"""The product's processes: API processes and reconcilers that are quick to start and easy to kill.

A warm process (`tests.simulator.warm`) forks them. One that is doomed kills itself with SIGKILL between two statements,
or between its commit and its answer: nothing of it can clean up. Reconcilers that are not doomed are not started for
each pass; they live on in a thread of the simulator's.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any

from reconciler.sweep import BATCHES_AT_ONCE, Pass, sweep
from talktime.store.database import Database
from tests.support import audit_lines

DIE_AT = "x-die-at"
"""The header that dooms an API process: it dies at the so-many-th statement, commit or part of an answer."""
STALL_AT = "x-stall-at"
"""The header that makes it stand still there for a moment instead."""


class Processes:
    """The warm process, and those that it started."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.simulator.warm"]
        self._warm = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._running: set[int] = set()

    def close(self) -> None:
        """End the warm process, which kills what still runs."""
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.close()
        self._warm.wait()
        self._warm.stdout.close()

    def serve(self, url: str, variables: Mapping[str, str]) -> tuple[int, int]:
        """Start an API process; returns its id and its port."""
        answer = self._ask(serve={"url": url, "variables": dict(variables)})
        self._running.add(answer["pid"])
        return answer["pid"], answer["port"]

    def sweep(self, url: str, *, batch_accounts: int, die_at: int) -> int:
        """Start a reconciler that makes one pass, unless it gets to its `die_at`-th event: there it dies."""
        answer = self._ask(sweep={"url": url, "batch_accounts": batch_accounts, "die_at": die_at})
        self._running.add(answer["pid"])
        return int(answer["pid"])

    def wait(self, pid: int) -> int:
        """Wait until a process has ended; returns its exit code, negative for a signal."""
        self._running.discard(pid)
        return int(self._ask(wait=pid)["code"])

    def kill(self, pid: int) -> int:
        """Kill a process, if it still runs; returns its exit code."""
        self._ask(kill=pid)
        return self.wait(pid)

    def kill_all(self) -> None:
        """Kill all that still run."""
        for pid in list(self._running):
            self.kill(pid)

    def _ask(self, **request: object) -> Any:  # noqa: ANN401 - JSON
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.write(json.dumps(request) + "\n")
        self._warm.stdin.flush()
        return json.loads(self._warm.stdout.readline())


class Reconcilers:
    """Reconcilers that live on from pass to pass, each with connections of its own, beside what else happens."""

    def __init__(self, url: str) -> None:
        self._databases = [Database(url, pool_size=BATCHES_AT_ONCE) for _ in range(2)]
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def begin(self, count: int, *, batch_accounts: int) -> list[Future[Pass]]:
        """Begin as many passes at once."""
        return [
            asyncio.run_coroutine_threadsafe(
                sweep(database, asyncio.Event(), batch_accounts=batch_accounts), self._loop
            )
            for database in self._databases[:count]
        ]

    def audit(self) -> list[str]:
        """Audit what is stored now; returns what is found."""
        return asyncio.run_coroutine_threadsafe(audit_lines(self._databases[0]), self._loop).result()

    def close(self) -> None:
        """Close the connections, and end."""
        for database in self._databases:
            asyncio.run_coroutine_threadsafe(database.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
