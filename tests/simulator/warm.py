"""The warm process: it has imported everything, so a process of the product is one fork away.

It takes a line of JSON on standard input for each request and answers with one. When its input ends, it kills what it
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import uvicorn

from reconciler.sweep import sweep
from talktime.api.app import create_app
from talktime.settings import load_settings
from talktime.store.database import Database
from tests import driver
from tests.simulator.processes import DIE_AT, STALL_AT

STALL_S = 0.01
FIRST_NEEDED = ("uvicorn.protocols.http.auto", "uvicorn.lifespan.on", "anyio._backends._asyncio")
"""What servers import while they start."""


class Fate:
    """Counts statements, commits and parts of answers, up to the one at which the process dies, or stands still."""

    def __init__(self) -> None:
        self.die_at = self.stall_at = self.seen = 0

    def decide(self, die_at: int, stall_at: int) -> None:
        """Begin to count; 0 is never."""
        self.die_at, self.stall_at, self.seen = die_at, stall_at, 0

    def count(self, *_: object) -> None:
        """Count one."""
        self.seen += 1
        if self.seen == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seen == self.stall_at:
            time.sleep(STALL_S)  # with all that it holds locked


def _serve(listener: socket.socket, url: str, variables: dict[str, str], fate: Fate) -> None:
    app: Any = create_app(load_settings(variables), lambda: Database(url))

    async def fated(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - as ASGI has it
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        die_at, stall_at = (int(headers.get(name.encode(), 0)) for name in (DIE_AT, STALL_AT))
        if die_at or stall_at:
            fate.decide(die_at, stall_at)

        async def send_and_count(message: Any) -> None:  # noqa: ANN401 - as ASGI has it
            fate.count()
            await send(message)

        await app(scope, receive, send_and_count)
        if die_at or stall_at:
            fate.decide(0, 0)

    # Connections are kept for as long as the simulator may think: a closed one means that the process died.
    config = uvicorn.Config(fated, log_config=None, access_log=False, ws="none", lifespan="on", timeout_keep_alive=3600)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def _sweep(url: str, batch_accounts: int) -> int:
    async def work() -> int:
        database = Database(url)
        try:
            return (await sweep(database, asyncio.Event(), batch_accounts=batch_accounts)).failed
        finally:
            await database.close()

    return asyncio.run(work())


def _fork(work: Callable[[], int | None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    # In the new process. It must not take the warm one's input, nor answer in its place.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    random.seed()
    code = os.EX_SOFTWARE
    try:
        code = int(bool(work()))
    except Exception:  # noqa: BLE001 - whatever it is, the exit code tells
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(request: dict[str, Any], fate: Fate) -> dict[str, int]:
    match request:
        case {"serve": {"url": str(url), "variables": dict(variables)}}:
            # With the protocol named: asyncio turns off Nagle's algorithm only then.
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()  # so that whoever comes too early waits
                port = int(listener.getsockname()[1])
                return {"pid": _fork(lambda: _serve(listener, url, variables, fate)), "port": port}
        case {"sweep": {"url": str(url), "batch_accounts": int(batch_accounts), "die_at": int(die_at)}}:
            fate.decide(die_at, 0)
            pid = _fork(lambda: _sweep(url, batch_accounts))
            fate.decide(0, 0)
            return {"pid": pid}
        case {"wait": int(pid)}:
            return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
        case {"kill": int(pid)}:
            os.kill(pid, signal.SIGKILL)  # until it is waited for, the id is its own
            return {}
    raise ValueError(request)


def main() -> None:
    """Answer until the input ends."""
    fate = Fate()
    for name in FIRST_NEEDED:
        import_module(name)
    create_app(load_settings({}), lambda: Database("postgresql+psycopg://"))  # what Litestar imports when it is asked
    gc.freeze()  # what is there now stays; those that are forked need not look at it again and again
    started: set[int] = set()
    with driver.watched(fate.count, fate.count):
        for line in sys.stdin:
            request = json.loads(line)
            answer = _answer(request, fate)
            if "pid" in answer:
                started.add(answer["pid"])
            started.discard(request.get("wait", 0))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
