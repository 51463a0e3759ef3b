"""A network between the service and its database: it can be slow, be cut, and swallow everything without a word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sqlalchemy.engine import URL

CHUNK = 1 << 16


class Network:
    """The way to a PostgreSQL, which may listen on a TCP port or on a socket in the file system."""

    def __init__(self, database: URL) -> None:
        self.delay_s = 0.0
        """How long everything is on its way, in each direction."""
        self.port = 0
        self._database = database
        self._open = asyncio.Event()
        self._open.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._carriers: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> URL:
        """The database as it is reached through this network."""
        query = {"sslmode": "disable", "gssencmode": "disable"}
        return self._database.set(host="127.0.0.1", port=self.port, query=query)

    def swallow(self) -> None:
        """Let nothing through any more, and tell nobody. What is sent arrives later, as TCP sends it again."""
        self._open.clear()

    def mend(self) -> None:
        """Let everything through again, what was held up too."""
        self._open.set()

    def cut(self) -> int:
        """Break all connections that are open; new ones may come at once. Returns how many there were."""
        for connection in self._connections:
            connection.cancel()
        return len(self._connections)

    async def end(self) -> None:
        """Break all connections, and wait until nothing is left of them."""
        self.mend()
        await asyncio.sleep(0.1)  # what was accepted begins
        while self._carriers:
            self.cut()
            await asyncio.wait(self._carriers)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until one side closes it, or it is cut."""
        # The streams' own callback task may be cancelled by nobody else; so the work is in a task that is known here.
        connection = asyncio.create_task(self._carry(reader, writer))
        carrier = asyncio.current_task()
        assert carrier is not None
        self._connections.add(connection)
        self._carriers.add(carrier)
        carrier.add_done_callback(self._carriers.discard)
        await asyncio.wait([connection])
        self._connections.discard(connection)
        # Here, since a task that is cancelled before it has begun does nothing at all.
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError, OSError):
            await self._open.wait()
            far_reader, far_writer = await self._connect()
            tasks = [
                asyncio.create_task(self._pass_on(reader, far_writer)),
                asyncio.create_task(self._pass_on(far_reader, writer)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                far_writer.transport.abort()  # before anything is awaited: it may be cut once more
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await far_writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect as libpq would: the URL's query, where the embedded PostgreSQL's socket is named, goes first."""
        host = str(self._database.query.get("host") or self._database.host)
        port = int(str(self._database.query.get("port") or self._database.port or 5432))
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what is said, each piece when its time has come; more of it may be on its way at once."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.create_task(self._arrive(under_way, writer))
        loop = asyncio.get_running_loop()
        try:
            while chunk := await reader.read(CHUNK):
                under_way.put_nowait((loop.time() + self.delay_s, chunk))
            under_way.put_nowait((loop.time() + self.delay_s, b""))
            await arriving
        finally:
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)

    async def _arrive(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self._open.wait()
            if not chunk:
                return
            writer.write(chunk)
            await writer.drain()


@asynccontextmanager
async def network(database: URL) -> AsyncIterator[Network]:
    """Offer a way to a database on a port of loopback."""
    way = Network(database)
    server = await asyncio.start_server(way.carry, "127.0.0.1", 0)
    way.port = server.sockets[0].getsockname()[1]
    try:
        yield way
    finally:
        server.close()
        await way.end()
        await server.wait_closed()
