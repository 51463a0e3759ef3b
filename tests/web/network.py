"""A network between a browser and the service that can be slow, and cut: it carries bytes between two sockets."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHUNK = 1 << 16


class Network:
    """The way to a service, as its two ends see it."""

    def __init__(self, port: int, *, seed: int) -> None:
        self.origin = ""
        self.late_s_max = 0.0
        """Half of the answers come late, by up to so many seconds."""
        self.delays: list[float] = []
        self._port = port
        self._chance = random.Random(seed)
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection of the browser's until one side closes it."""
        # The streams' own callback task may be cancelled by nobody else; so the work is in tasks that are known here.
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        both = [
            asyncio.create_task(self._pass_on(reader, far_writer, answers=False)),
            asyncio.create_task(self._pass_on(far_reader, writer, answers=True)),
        ]
        self._tasks.update(both)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
            self._tasks.discard(task)
        for one in (writer, far_writer):
            one.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(CHUNK):
                if answers and self.late_s_max and self._chance.random() < 0.5:
                    self.delays.append(self._chance.uniform(0, self.late_s_max))
                    await asyncio.sleep(self.delays[-1])
                if not answers:
                    await self._open.wait()
                writer.write(chunk)
                await writer.drain()

    def cut(self) -> None:
        """Let no request through any more, and tell nobody. Answers that are on their way still come.

        Where a heartbeat arrives and its answer is lost, no page can know how long the server's clock runs on.
        """
        self._open.clear()

    def mend(self) -> None:
        """Let new connections through; those from before are lost."""
        for task in self._tasks:
            task.cancel()
        self._open.set()


@asynccontextmanager
async def network(port: int, *, seed: int) -> AsyncIterator[Network]:
    """Offer a way to the service on this port of loopback, at `origin`."""
    way = Network(port, seed=seed)
    server = await asyncio.start_server(way.carry, "127.0.0.1", 0)
    way.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield way
    finally:
        server.close()
        way.mend()
