"""A connection on which a test says what it likes, and what it hears there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from httpx import AsyncClient

from tests.api.requests import Json

PATIENCE_S = 20
LIVE = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass
class Wire:
    """A connection on which a test says what it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def say(self, text: str) -> None:
        self.writer.write(text.encode("latin-1"))

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(status.split()[1]), headers

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        async with asyncio.timeout(PATIENCE_S):
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))

    async def problem(self, status: int, code: str) -> Json:
        found, headers, body = await self.answer()
        assert (status, "application/problem+json", "no-store", "nosniff") == (
            found,
            headers["content-type"],
            headers["cache-control"],
            headers["x-content-type-options"],
        )
        problem = json.loads(body)
        assert (code, status) == (problem["code"], problem["status"])
        return {**problem, "headers": headers}

    async def is_closed(self) -> bool:
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                assert b"" == await self.reader.read()
            return True


@contextlib.asynccontextmanager
async def wire(client: AsyncClient) -> AsyncIterator[Wire]:
    port = client.base_url.port
    assert port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()
