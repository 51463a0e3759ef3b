"""Clients that do not wait for an answer before they send the next request, on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from httpx import AsyncClient
from sqlalchemy.engine import make_url

from talktime.api import connections
from tests.api.conftest import CLOSED_PORT
from tests.api.echo import Echo
from tests.api.server import serving
from tests.api.wire import Wire, wire

WAITING = "GET /waiting HTTP/1.1\r\nhost: x\r\n\r\n"


def asking(name: object, headers: str = "") -> str:
    return f"GET /echo?{name} HTTP/1.1\r\nhost: x\r\n{headers}\r\n"


def posting(name: object, body: str) -> str:
    return f"POST /echo?{name} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}"


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def client(echo: Echo) -> AsyncIterator[AsyncClient]:
    async with serving(make_url(CLOSED_PORT), pages=echo.pages()) as client:
        yield client


async def query_of(heard: Wire) -> str:
    status, _, body = await heard.answer()
    assert 200 == status
    return str(json.loads(body)["query"])


async def test_answers_come_in_the_order_of_the_requests(client: AsyncClient, echo: Echo) -> None:
    async with wire(client) as one:
        one.say("".join(asking(i) if i % 3 else posting(i, "x" * i) for i in range(500)))
        assert [str(i) for i in range(500)] == [await query_of(one) for _ in range(500)]
    assert [f"GET {i}" if i % 3 else f"POST {i}" for i in range(500)] == echo.heard


async def test_a_request_is_not_begun_before_the_one_before_is_answered(client: AsyncClient, echo: Echo) -> None:
    async with wire(client) as one:
        one.say(WAITING + asking("behind"))
        await asyncio.sleep(0.3)
        one.say(asking("later"))
        await asyncio.sleep(0.3)
        assert ["waiting"] == echo.heard
        echo.goes_on.set()
        assert b"went on" == (await one.answer())[2]
        assert ["behind", "later"] == [await query_of(one), await query_of(one)]


async def test_a_client_that_sends_on_and_on_is_stopped_until_it_is_answered(client: AsyncClient, echo: Echo) -> None:
    count, body = 1000, 60_000 * "x"  # more than sockets and buffers hold
    async with wire(client) as eager:
        eager.say(WAITING)
        for i in range(count):
            eager.say(posting(i, body))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await eager.writer.drain()
        assert ["waiting"] == echo.heard
        # Nobody else waits for that.
        assert 200 == (await client.get("/livez")).status_code
        echo.goes_on.set()
        assert b"went on" == (await eager.answer())[2]
        assert [str(i) for i in range(count)] == [await query_of(eager) for _ in range(count)]


async def test_requests_behind_one_that_closes_the_connection_are_not_begun(client: AsyncClient, echo: Echo) -> None:
    async with wire(client) as one:
        one.say(asking("last", "connection: close\r\n") + WAITING)
        assert "last" == await query_of(one)
        assert await one.is_closed()
    assert ["GET last"] == echo.heard


async def test_requests_of_a_client_that_left_are_not_begun(client: AsyncClient, echo: Echo) -> None:
    async with wire(client) as gone:
        gone.say(WAITING + WAITING)
        await asyncio.sleep(0.3)
    await asyncio.sleep(0.3)
    echo.goes_on.set()
    await asyncio.sleep(0.3)
    assert ["waiting"] == echo.heard


async def test_requests_before_nonsense_are_answered_and_those_behind_it_are_not(
    client: AsyncClient, echo: Echo
) -> None:
    async with wire(client) as one:
        one.say(WAITING + asking("before") + "nonsense\r\n\r\n" + asking("behind"))
        await asyncio.sleep(0.3)
        echo.goes_on.set()
        assert b"went on" == (await one.answer())[2]
        assert "before" == await query_of(one)
        await one.problem(400, "invalid-input")
        assert await one.is_closed()
    assert ["waiting", "GET before"] == echo.heard


async def test_a_late_answer_does_not_get_in_the_way_of_the_next(
    client: AsyncClient, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS_MAX", 1)
    async with wire(client) as one:
        one.say(WAITING + asking("behind"))
        problem = await one.problem(503, "unavailable")
        assert "there was no answer in time" in problem["detail"]
        assert "behind" == await query_of(one)
        echo.goes_on.set()  # now it ends by itself, and says so to nobody
        await asyncio.sleep(0.3)
        one.say(asking("next"))
        assert "next" == await query_of(one)


async def test_when_the_service_ends_what_was_begun_is_answered_and_what_is_behind_is_not() -> None:
    echo = Echo()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(make_url(CLOSED_PORT), pages=echo.pages()) as client:
            one = await stack.enter_async_context(wire(client))
            one.say(WAITING + WAITING)
            await asyncio.sleep(0.3)
            asyncio.get_running_loop().call_later(0.5, echo.goes_on.set)
        status, headers, body = await one.answer()
        assert (200, "close", b"went on") == (status, headers["connection"], body)
        assert await one.is_closed()
    assert ["waiting"] == echo.heard
