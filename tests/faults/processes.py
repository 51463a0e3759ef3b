"""Real processes over one database, and a small supervisor that starts them again, as systemd's ``Restart=always``."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.program import PATIENCE_S, TALKTIME, environment

RESTART_S = 0.2
# Seconds on a quiet machine; but one that is busy with other things takes its time to start programs.
RECOVERY_S_MAX = 2 * PATIENCE_S
SOME_FAILED, NO_DATABASE = 1, 75
IS_UP = r"(?m)^listening on |reconciler INFO pass "
PASSED = r"reconciler INFO pass accounts=[1-9]\d* chats=\d+ failed=0 "
# Of whatever was logged, or not even caught: where in the program it happened.
TRACE = r'(?m)^ *File ".*\n.*'
LOOK_AGAIN_S = 0.02
# Below the ports that the system gives to outgoing connections: one of those could take a dead server's port.
PORTS = range(20_000, 30_000)


def free_port() -> int:
    """Return a port that nobody listens on, and that nobody is given by chance."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass
class Program:
    """A program that is started again whenever it ends, with how often it began and how it ended each time."""

    name: str
    arguments: tuple[str | Path, ...]
    log: Path
    origin: str = ""
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    ends: list[int] = field(default_factory=list)
    kills: int = 0
    failed: list[str] = field(default_factory=list)
    """What those said that ended by themselves before they were up: their database died while they started."""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that runs now."""
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        """Kill the process that runs now; if none does, or it ends by itself, the next one, as soon as it has begun."""
        self.kills += 1
        while len(self.ends) < self.kills:
            await until(lambda: done(self.is_running), f"{self.name} to run")
            assert self.process is not None
            process = self.process
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # `process.kill` might take its exit code from who waits for it
            await process.wait()

    @property
    def output(self) -> str:
        """All that its processes said."""
        return self.log.read_text(errors="replace")

    @property
    def traces(self) -> list[str]:
        """Where errors happened that nobody had thought of."""
        return re.findall(TRACE, self.output)


@dataclass
class Cluster:
    """API processes and reconcilers over one database."""

    apis: list[Program]
    reconcilers: list[Program]
    variables: Mapping[str, str]
    options: tuple[str | Path, ...]
    ending: bool = False

    @property
    def programs(self) -> list[Program]:
        return [*self.apis, *self.reconcilers]

    @property
    def origins(self) -> list[str]:
        return [api.origin for api in self.apis]

    async def keep(self, program: Program) -> None:
        """Run a program for ever."""
        while not self.ending:
            with program.log.open("ab") as file:
                program.process = await asyncio.create_subprocess_exec(
                    TALKTIME, *program.arguments, env=environment(**self.variables), stdout=file, stderr=file
                )
            if self.ending:
                program.process.kill()  # whoever ended the others could not see this one
            program.starts += 1
            said = len(program.output)
            code = await program.process.wait()
            output = program.output[said:]
            if code in (SOME_FAILED, NO_DATABASE) and not re.search(IS_UP, output):
                program.failed.append(output)
            else:
                program.ends.append(code)
            if not self.ending:
                await asyncio.sleep(RESTART_S)

    async def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Run a command on the cluster's database to its end; return its exit code and what it said."""
        process = await asyncio.create_subprocess_exec(
            TALKTIME,
            *arguments,
            *self.options,
            env=environment(**self.variables),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(RECOVERY_S_MAX):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, out.decode(), err.decode()

    async def audit(self) -> None:
        """Check all that is stored. Right at any moment at which the database answers, under load too."""
        code, out, err = await self.run("reconcile", "--audit")
        assert (0, "") == (code, out), err

    async def end(self) -> None:
        """End all programs as an operator would."""
        await until(lambda: done(all(program.is_running for program in self.programs)), "all programs to run")
        self.ending = True
        for program in self.programs:
            program.signal(signal.SIGTERM)
        await until(lambda: done(all(p.starts == len(p.ends) + len(p.failed) for p in self.programs)), "an end")
        codes = {p.name: p.ends[-1] for p in self.programs if p.ends}
        assert dict.fromkeys(codes, 0) == codes, [p.output[-2_000:] for p in self.programs]


@asynccontextmanager
async def cluster(
    folder: Path,
    variables: Mapping[str, str],
    *options: str | Path,
    apis: int = 2,
    reconcilers: int = 2,
) -> AsyncIterator[Cluster]:
    """Run a cluster until the block ends; it is up when the block begins. `options` say where its database is."""
    ports = [free_port() for _ in range(apis)]
    serving = [
        Program(
            f"api{n}",
            ("serve", "--port", str(port), *options),
            folder / f"api{n}.log",
            f"http://127.0.0.1:{port}",
        )
        for n, port in enumerate(ports)
    ]
    passing = [
        Program(f"reconciler{n}", ("reconcile", "--every", "1", *options), folder / f"reconciler{n}.log")
        for n in range(reconcilers)
    ]
    made = Cluster(serving, passing, variables, options)
    tasks = [asyncio.create_task(made.keep(program)) for program in made.programs]
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            for api in serving:
                await until(partial(is_ready, client, api.origin), f"{api.name} being ready")
        yield made
    finally:
        made.ending = True
        for program in made.programs:
            if program.process is not None and program.is_running:
                program.process.kill()
        await asyncio.gather(*tasks)


async def done(value: bool) -> bool:  # noqa: FBT001 - what `until` asks for
    """Return what is known already, for `until`."""
    return value


async def until(holds: Callable[[], Awaitable[bool]], what: str, *, patience_s: float = RECOVERY_S_MAX) -> float:
    """Wait until something holds, and return how many seconds that took."""
    began = time.monotonic()
    while not await holds():
        if time.monotonic() - began > patience_s:
            pytest.fail(f"waited {patience_s} s for {what}")
        await asyncio.sleep(LOOK_AGAIN_S)
    return time.monotonic() - began


async def passes_after(reconciler: Program, said: int) -> bool:
    """Tell whether a reconciler has made a pass that wrote accounts, and all of them, since its log was so long."""
    return re.search(PASSED, reconciler.output[said:]) is not None


async def is_ready(client: httpx.AsyncClient, origin: str) -> bool:
    """Tell whether an API can serve requests."""
    try:
        return (await client.get(f"{origin}/readyz")).status_code == 200
    except httpx.TransportError:
        return False
