"""Clients that are slow, broken or many, on real sockets; and answers that do not come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from httpx import AsyncClient
from litestar import get
from sqlalchemy.engine import URL, make_url

from talktime import operations
from talktime.api import bodies, connections
from talktime.store import database
from talktime.web import pages
from tests.api.conftest import CLOSED_PORT
from tests.api.requests import CHAT, KEY, problem_of
from tests.api.server import serving
from tests.api.test_outage import Proxy
from tests.api.wire import LIVE, PATIENCE_S, wire

AUTH = f"authorization: bearer {KEY}\r\n"
HEAD = f"POST {CHAT}/start HTTP/1.1\r\nhost: x\r\n{AUTH}content-type: application/json\r\n"
LENGTH = "content-length: 1000\r\n"
CLOSED_PORT_URL = make_url(CLOSED_PORT)


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    async with serving(CLOSED_PORT_URL, pages=[large]) as client:
        yield client


@get("/large", include_in_schema=False)
async def large() -> bytes:
    """Send more than sockets and buffers hold."""
    return b"x" * 50_000_000


# --- slow clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["", "G", HEAD, f"{LIVE}G"], ids=["nothing", "a byte", "no end", "after another"])
async def test_a_client_that_does_not_send_its_headers_is_cut_off(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 2)
    async with wire(client) as slow:
        slow.say(said)
        if said.startswith(LIVE):
            assert 200 == (await slow.answer())[0]
        began = asyncio.get_running_loop().time()
        assert await slow.is_closed()
        assert 1 < asyncio.get_running_loop().time() - began < 8  # 5, as an idle one, if it came with the one before


async def test_a_byte_now_and_then_does_not_keep_a_connection_open(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 2)
    async with wire(client) as slow:
        slow.say("GET /livez HTTP/1.1\r\nx: ")
        async with asyncio.timeout(PATIENCE_S):
            while not slow.reader.at_eof():
                slow.say("x")
                with contextlib.suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(0.2):
                        await slow.reader.read(1)


async def test_a_client_that_is_within_its_time_is_not_cut_off(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 4)
    async with wire(client) as slow:
        for _ in range(3):
            for part in (LIVE[:5], LIVE[5:20], LIVE[20:]):
                slow.say(part)
                await asyncio.sleep(0.7)
            assert 200 == (await slow.answer())[0]


async def test_a_body_that_does_not_come_is_answered_408_and_the_connection_closed(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS_MAX", 0.5)
    async with wire(client) as slow:
        slow.say(f'{HEAD}{LENGTH}\r\n{{"advisor')
        problem = await slow.problem(408, "request-timeout")
        assert "close" == problem["headers"]["connection"]
        assert await slow.is_closed()


async def test_a_form_that_does_not_come_is_answered_408_with_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS_MAX", 0.5)
    async with serving(CLOSED_PORT_URL, pages=pages()) as client, wire(client) as slow:
        slow.say(f"POST /console/sign-in HTTP/1.1\r\nhost: x\r\n{LENGTH}\r\nkey=")
        status, headers, page = await slow.answer()
        assert (408, "close") == (status, headers["connection"])
        assert b"This came too slowly" in page
        assert await slow.is_closed()


async def test_a_body_that_nobody_reads_does_not_keep_the_connection_open(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "EXCHANGE_SECONDS_MAX", 2)
    async with wire(client) as slow:
        slow.say("GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert 200 == (await slow.answer())[0]
        async with asyncio.timeout(PATIENCE_S):
            while not slow.reader.at_eof():
                slow.say("x")
                with contextlib.suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(0.2):
                        await slow.reader.read(1)


async def test_a_client_that_does_not_take_its_answer_is_cut_off(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "EXCHANGE_SECONDS_MAX", 2)
    async with wire(client) as slow:
        slow.say("GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        await slow.reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(5)
        with contextlib.suppress(ConnectionError):
            assert len(await slow.reader.read(-1)) < 50_000_000
    async with wire(client) as fast:
        fast.say("GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        assert 50_000_000 == len((await fast.answer())[2])


# --- many clients -----------------------------------------------------------------------------------------------------


async def test_connections_beyond_the_limit_are_told_so_and_those_before_go_on() -> None:
    async with serving(CLOSED_PORT_URL, TALKTIME_CONNECTIONS_MAX="3") as client, contextlib.AsyncExitStack() as stack:
        first = [await stack.enter_async_context(wire(client)) for _ in range(3)]
        for one in first:
            one.say(LIVE)
            assert 200 == (await one.answer())[0]
        looking = await stack.enter_async_context(wire(client))
        looking.say(LIVE)
        assert 200 == (await looking.answer())[0]
        looking.writer.close()
        await asyncio.sleep(0.2)
        surplus = await stack.enter_async_context(wire(client))
        surplus.say(LIVE.replace("/livez", "/v1/advisors/a1"))
        problem = await surplus.problem(503, "unavailable")
        assert ("1", "close") == (problem["headers"]["retry-after"], problem["headers"]["connection"])
        assert await surplus.is_closed()
        for one in first:
            one.say(LIVE)
            assert 200 == (await one.answer())[0]
        # One that says nothing is not waited for as long as others are.
        silent = await stack.enter_async_context(wire(client))
        began = asyncio.get_running_loop().time()
        assert await silent.is_closed()
        assert asyncio.get_running_loop().time() - began < connections.HEAD_SECONDS_MAX / 2
        # When one leaves, there is a place.
        first[0].writer.close()
        await asyncio.sleep(0.2)
        fourth = await stack.enter_async_context(wire(client))
        fourth.say(LIVE)
        assert 200 == (await fourth.answer())[0]


async def test_a_flood_of_connections_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SURPLUS_MAX", 2)
    async with serving(CLOSED_PORT_URL, TALKTIME_CONNECTIONS_MAX="1") as client, contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            (await stack.enter_async_context(wire(client))).say("G")
        await asyncio.sleep(0.1)
        dropped = await stack.enter_async_context(wire(client))
        async with asyncio.timeout(1):
            assert await dropped.is_closed()


# --- answers that do not come -----------------------------------------------------------------------------------------


async def test_a_silent_database_is_answered_503_in_time_whatever_its_driver_waits_for(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "TRANSACTION_SECONDS_MAX", 1.5)  # and the driver waits five seconds more
    monkeypatch.setattr(connections, "ANSWER_SECONDS_MAX", 2)
    proxy = Proxy(database_url)
    await proxy.restore()
    async with serving(proxy.url) as client:
        assert 404 == (await client.get(CHAT)).status_code
        proxy.fall_silent()
        began = asyncio.get_running_loop().time()
        problem = problem_of(await client.get(CHAT), 503, "unavailable")
        assert 1.9 < asyncio.get_running_loop().time() - began < 4
        assert "repeat the request" in problem["detail"]
        # The connection is good for the next one, also while the one before still waits.
        assert 200 == (await client.get("/livez")).status_code
        await proxy.cut()
        await asyncio.sleep(0.5)  # now the request ends by itself, and says so to nobody
        await proxy.restore()
        assert 404 == (await client.get(CHAT)).status_code
    await proxy.cut()


async def test_the_time_that_a_body_takes_is_not_counted(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS_MAX", 1)
    async with wire(client) as slow:
        slow.say(f'{HEAD}content-length: 18\r\n\r\n{{"advisor')
        await asyncio.sleep(0.7)
        slow.say('_id"')
        await asyncio.sleep(0.7)
        slow.say(':"a"}')
        # The database is not there; but it was asked.
        assert "database" in (await slow.problem(503, "unavailable"))["detail"]


async def test_who_is_in_the_middle_of_a_body_when_the_service_ends_gets_a_problem_and_the_log_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "SHUTDOWN_SECONDS_MAX", 1)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(CLOSED_PORT_URL) as client:
            slow = await stack.enter_async_context(wire(client))
            slow.say(f'{HEAD}{LENGTH}\r\n{{"advisor')
            await asyncio.sleep(0.2)
        await slow.problem(503, "unavailable")
        assert await slow.is_closed()
    assert [] == [record for record in caplog.records if record.exc_info]


async def test_many_who_ask_whether_it_is_ready_are_one_query_at_a_time(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = most = asked = 0
    ready = operations.ready

    async def counted(service: operations.Service) -> None:
        nonlocal running, most, asked
        running, asked = running + 1, asked + 1
        most = max(most, running)
        await ready(service)
        running -= 1

    monkeypatch.setattr(operations, "ready", counted)
    async with serving(database_url) as client:
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(50)))
        assert {200} == {answer.status_code for answer in answers}
        assert 1 == most
        assert asked < 50
