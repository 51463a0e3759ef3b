"""The product's own processes, quick to start and easy to kill.

A warm process, which has imported everything, forks them on request. One that is doomed kills itself with SIGKILL
between two statements, or between its commit and its answer: nothing of it can clean up.

The warm process takes a line of JSON on standard input for each request and answers with one. When its input ends, it
kills what it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DIE_AT = "x-die-at"
"""The header that dooms an API process: it dies at the so-many-th statement, commit or part of an answer."""


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Processes:
    """The warm process, from outside."""

    url: str
    warm: subprocess.Popen[str] = field(init=False)
    running: set[int] = field(default_factory=set)

    def __enter__(self) -> Processes:
        command = [sys.executable, "-m", "tests.simulator.processes"]
        self.warm = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.warm.stdin is not None
        self.warm.stdin.close()
        self.warm.wait()
        assert self.warm.stdout is not None
        self.warm.stdout.close()

    def serve(self, variables: Mapping[str, str]) -> tuple[int, int]:
        """Start an API process; returns its id and its port."""
        answer = self._ask(serve={"url": self.url, "variables": dict(variables)})
        self.running.add(answer["pid"])
        return answer["pid"], answer["port"]

    def sweep(self, *, batch_accounts: int, die_at: int) -> int:
        """Start a reconciler that makes one pass, and dies at its `die_at`-th statement or commit if that is not 0."""
        answer = self._ask(sweep={"url": self.url, "batch_accounts": batch_accounts, "die_at": die_at})
        self.running.add(answer["pid"])
        return int(answer["pid"])

    def wait(self, pid: int) -> int:
        """Wait until a process has ended; returns its exit code, negative for a signal."""
        self.running.discard(pid)
        return int(self._ask(wait=pid)["code"])

    def kill(self, pid: int) -> int:
        """Kill a process, if it still runs; returns its exit code."""
        self._ask(kill=pid)
        return self.wait(pid)

    def kill_all(self) -> None:
        """Kill what runs."""
        for pid in list(self.running):
            self.kill(pid)

    def _ask(self, **request: object) -> Any:  # noqa: ANN401 - JSON
        assert self.warm.stdin is not None
        assert self.warm.stdout is not None
        print(json.dumps(request), file=self.warm.stdin, flush=True)
        return json.loads(self.warm.stdout.readline())


# --- being asked ------------------------------------------------------------------------------------------------------


class _Doom:
    """Counts statements, commits and parts of answers down to the process's death."""

    left = 0

    def count(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def _serve(listener: socket.socket, url: str, variables: dict[str, str], doom: _Doom) -> None:
    import uvicorn

    from talktime.api.app import create_app
    from talktime.settings import load_settings
    from talktime.store.database import Database

    app: Any = create_app(load_settings(variables), lambda: Database(url))

    async def doomed(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - as ASGI has it
        armed = 0
        if scope["type"] == "http":
            armed = int(dict(scope["headers"]).get(DIE_AT.encode(), 0))
        doom.left = armed or doom.left

        async def send_or_die(message: Any) -> None:  # noqa: ANN401 - as ASGI has it
            doom.count()
            await send(message)

        await app(scope, receive, send_or_die)
        if armed:
            doom.left = 0

    config = uvicorn.Config(doomed, log_config=None, access_log=False, ws="none", lifespan="on")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def _sweep(url: str, batch_accounts: int) -> None:
    from reconciler.sweep import sweep
    from talktime.store.database import Database

    async def work() -> int:
        database = Database(url)
        try:
            return (await sweep(database, asyncio.Event(), batch_accounts=batch_accounts)).failed
        finally:
            await database.close()

    os._exit(1 if asyncio.run(work()) else 0)


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    # From here on in the new process. It must not take the warm one's input, nor answer in its place.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    random.seed()
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type] # there is an exception
        os._exit(70)
    os._exit(0)


def _answer(request: dict[str, Any], doom: _Doom) -> dict[str, int]:
    match request:
        case {"serve": {"url": str(url), "variables": dict(variables)}}:
            # With the protocol named: asyncio turns off Nagle's algorithm only then.
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                port = int(listener.getsockname()[1])
                return {"pid": _fork(lambda: _serve(listener, url, variables, doom)), "port": port}
        case {"sweep": {"url": str(url), "batch_accounts": int(batch_accounts), "die_at": int(die_at)}}:
            doom.left = die_at
            pid = _fork(lambda: _sweep(url, batch_accounts))
            doom.left = 0
            return {"pid": pid}
        case {"wait": int(pid)}:
            return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
        case {"kill": int(pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return {}
    raise ValueError(request)


def _main() -> None:
    from sqlalchemy import Engine, event

    import reconciler.sweep
    import talktime.api.app
    import uvicorn  # noqa: F401 - to be warm

    doom = _Doom()
    event.listen(Engine, "before_cursor_execute", doom.count)
    event.listen(Engine, "commit", doom.count)
    started: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer = _answer(request, doom)
        if "pid" in answer:
            started.add(answer["pid"])
        started.discard(request.get("wait", 0))
        print(json.dumps(answer), flush=True)
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _main()
