"""What is an HTTP request and what is none, told apart on raw sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from httpx import AsyncClient
from sqlalchemy.engine import make_url

from talktime.api.framing import HEAD_BYTES_MAX
from tests.api.conftest import CLOSED_PORT
from tests.api.echo import Echo
from tests.api.requests import Json
from tests.api.server import serving
from tests.api.wire import LIVE, Wire, wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNKED = "transfer-encoding: chunked\r\n"
UPGRADE = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n"
NEXT = "GET /echo?next HTTP/1.1\r\nhost: x\r\n\r\n"


def asking(line: str = "GET /echo HTTP/1.1", headers: str = "", body: str = "") -> str:
    return f"{line}\r\nhost: x\r\n{headers}\r\n{body}"


def posting(headers: str, body: str = "", version: str = "1.1") -> str:
    return asking(f"POST /echo HTTP/{version}", headers, body)


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(echo: Echo) -> AsyncIterator[AsyncClient]:
    async with serving(make_url(CLOSED_PORT), pages=echo.pages()) as client:
        yield client


async def said_back(heard: Wire) -> Json:
    status, _, body = await heard.answer()
    assert 200 == status
    return json.loads(body)


async def is_next(heard: Wire) -> bool:
    """Check that the next request is read as one, and nothing is left of the one before."""
    said = await said_back(heard)
    return ("next", "", [["host", "x"]]) == (said["query"], said["body"], said["headers"])


# --- what is none -----------------------------------------------------------------------------------------------------

REFUSED = {
    "nonsense": "nonsense\r\n\r\n",
    "nonsense without an end": "nonsense",
    "no version": "GET /echo\r\n\r\n",
    "no version, and headers": "GET /echo\r\nhost: x\r\n\r\n",
    "the handshake of TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "the preface of HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": asking("GET /echo HTTP/0.9"),
    "HTTP/1.2": asking("GET /echo HTTP/1.2"),
    "HTTP/2.0": asking("GET /echo HTTP/2.0"),
    "http in small letters": asking("GET /echo http/1.1"),
    "another protocol": asking("GET /echo RTSP/1.0"),
    "a method that nobody knows": asking("FOO /echo HTTP/1.1"),
    "a method in small letters": asking("get /echo HTTP/1.1"),
    "two spaces": asking("GET  /echo HTTP/1.1"),
    "two spaces after the target": asking("GET /echo  HTTP/1.1"),
    "a space at the end of the line": asking("GET /echo HTTP/1.1 "),
    "a tab in the target": asking("GET /ec\tho HTTP/1.1"),
    "a control character in the target": asking("GET /echo\x01 HTTP/1.1"),
    "no ASCII in the target": asking("GET /echo\xe4 HTTP/1.1"),
    "no ASCII in the query": asking("GET /echo?\xe4 HTTP/1.1"),
    "a fragment": asking("GET /echo#top HTTP/1.1"),
    "a target without a path": asking("GET http://x HTTP/1.1"),
    "a target that is no path": asking("GET echo HTTP/1.1"),
    "a tunnel": asking("CONNECT x:443 HTTP/1.1"),
    "no host": "GET /echo HTTP/1.1\r\n\r\n",
    "two hosts": asking(headers="host: x\r\n"),
    "two hosts in HTTP/1.0": asking("GET /echo HTTP/1.0", "host: y\r\n"),
    "bare line feeds": asking().replace("\r\n", "\n"),
    "a bare line feed after a header": "GET /echo HTTP/1.1\r\nhost: x\ny: z\r\n\r\n",
    "a bare line feed at the end": "GET /echo HTTP/1.1\r\nhost: x\r\n\n",
    "a bare carriage return": asking(headers="x: a\ry: b\r\n"),
    "a folded line": asking(headers="x: a\r\n b\r\n"),
    "a folded first line": "GET /echo HTTP/1.1\r\n host: x\r\n\r\n",
    "a null character": asking(headers="x: a\0b\r\n"),
    "a control character": asking(headers="x: a\x01b\r\n"),
    "a delete character": asking(headers="x: a\x7fb\r\n"),
    "a space before the colon": asking(headers="x : a\r\n"),
    "no name": asking(headers=": a\r\n"),
    "no colon": asking(headers="xa\r\n"),
    "a name that is none": asking(headers="x(: a\r\n"),
    "a length and chunks": posting(f"content-length: 5\r\n{CHUNKED}", "0\r\n\r\n"),
    "chunks and a length": posting(f"{CHUNKED}content-length: 5\r\n", "0\r\n\r\n"),
    "two lengths": posting("content-length: 1\r\ncontent-length: 2\r\n", "xx"),
    "the same length twice": posting("content-length: 1\r\ncontent-length: 1\r\n", "x"),
    "lengths in a list": posting("content-length: 1, 1\r\n", "x"),
    "a length that is empty": posting("content-length:\r\n"),
    "a length with a sign": posting("content-length: +1\r\n", "x"),
    "a length below zero": posting("content-length: -1\r\n"),
    "a length in hexadecimal": posting("content-length: 0x1\r\n", "x"),
    "a length in words": posting("content-length: x\r\n"),
    "a length beyond all bounds": posting(f"content-length: {'9' * 30}\r\n"),
    "an encoding that is none": posting("transfer-encoding: xchunked\r\n"),
    "no encoding": posting("transfer-encoding:\r\n"),
    "the identity": posting("transfer-encoding: identity\r\n"),
    "another encoding": posting("transfer-encoding: gzip\r\n", "x"),
    "another encoding in chunks": posting("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"),
    "another encoding in chunks, in two headers": posting(f"transfer-encoding: gzip\r\n{CHUNKED}", "0\r\n\r\n"),
    "chunks in another encoding": posting("transfer-encoding: chunked, gzip\r\n", "0\r\n\r\n"),
    "chunks in chunks": posting(f"{CHUNKED}{CHUNKED}", "0\r\n\r\n"),
    "a disguised encoding": posting("transfer-encoding: \x0bchunked\r\n"),
    "chunks in HTTP/1.0": posting(CHUNKED, "0\r\n\r\n", version="1.0"),
    "an upgrade and two lengths": posting(f"{UPGRADE}content-length: 1\r\ncontent-length: 2\r\n", "xx"),
    "headers that do not end": "GET /echo HTTP/1.1\r\nhost: x\r\n" + "y: z\r\n" * 20_000,
    "empty lines that do not end": "\r\n" * HEAD_BYTES_MAX,
}
BROKEN_CHUNKS = {
    "a size that is none": "x\r\n",
    "no size": "\r\nx\r\n",
    "a size with a sign": "+1\r\nx\r\n0\r\n\r\n",
    "a size below zero": "-1\r\nx\r\n0\r\n\r\n",
    "a size as in programs": "0x1\r\nx\r\n0\r\n\r\n",
    "a size beyond all bounds": "f" * 17 + "\r\nx",
    "a space after the size": "1 \r\nx\r\n0\r\n\r\n",
    "more than the size": "1\r\nxx\r\n0\r\n\r\n",
    "bare line feeds": "1\nx\n0\n\n",
    "a bare line feed in an extension": "1;a\nb\r\nx\r\n0\r\n\r\n",
    "a trailer that is none": "1\r\nx\r\n0\r\nnothing\r\n\r\n",
    "a length as a trailer": "1\r\nx\r\n0\r\ncontent-length: 5\r\n\r\n",
    "an extension that does not end": f"1;a={'x' * 2 * HEAD_BYTES_MAX}",
    "trailers that do not end": "1\r\nx\r\n0\r\n" + "y: z\r\n" * HEAD_BYTES_MAX,
}


async def is_refused(broken: Wire) -> bool:
    problem = await broken.problem(400, "invalid-input")
    assert "this is not an HTTP/1.1 request" == problem["detail"]
    assert "close" == problem["headers"]["connection"]
    assert "server" not in problem["headers"]
    return await broken.is_closed()


@pytest.mark.parametrize("said", REFUSED.values(), ids=REFUSED.keys())
async def test_what_is_not_http_is_a_problem_that_tells_nothing_of_the_server_and_nobody_is_asked(
    client: AsyncClient, echo: Echo, said: str
) -> None:
    echo.heard.clear()
    async with wire(client) as broken:
        broken.say(said)
        assert await is_refused(broken)
    assert [] == echo.heard


@pytest.mark.parametrize("said", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS.keys())
async def test_chunks_that_are_none_are_refused(client: AsyncClient, echo: Echo, said: str) -> None:
    echo.heard.clear()
    async with wire(client) as broken:
        broken.say(posting(CHUNKED, said))
        assert await is_refused(broken)
    assert [] == echo.heard


async def test_a_body_that_breaks_off_in_nonsense_is_refused_without_a_word_in_the_log(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with wire(client) as broken:
        broken.say(posting(CHUNKED, "5\r\n{"))
        await asyncio.sleep(0.3)
        broken.say("xxxxxxxxxxxxxxxxxxxxxxxxx")
        assert await is_refused(broken)
    await asyncio.sleep(0.1)
    assert [] == [record for record in caplog.records if record.exc_info]


async def test_nothing_is_added_to_an_answer_when_the_rest_of_its_request_breaks_off(client: AsyncClient) -> None:
    async with wire(client) as broken:
        broken.say(asking("POST /unread HTTP/1.1", CHUNKED))
        assert b"not read" == (await broken.answer())[2]
        broken.say("nonsense\r\n")
        assert await broken.is_closed()


# --- what is one ------------------------------------------------------------------------------------------------------

UNDERSTOOD = {
    "nothing unusual": asking(),
    "an empty line before": "\r\n" + asking(),
    "a full address": asking("GET http://elsewhere/echo HTTP/1.1"),
    "no value": asking(headers="x:\r\n"),
    "an empty host": "GET /echo HTTP/1.1\r\nhost:\r\n\r\n",
    "letters beyond ASCII in a value": asking(headers="x: \xe4\r\n"),
    "nothing in chunks": asking(headers=CHUNKED, body="0\r\n\r\n"),
    "chunks in large letters": asking(headers=CHUNKED.upper(), body="0\r\n\r\n"),
    "zero": asking(headers="content-length: 0\r\n"),
    "an upgrade": asking(headers=UPGRADE),
    "a WebSocket": asking(headers="connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"),
    "an upgrade that is not meant": asking(headers="upgrade: h2c\r\n"),
    "two upgrades": asking(headers="connection: upgrade\r\nUpgrade: a\r\nUPGRADE: b\r\n"),
}
BODIES = {
    "a length": ("content-length: 3\r\n", "abc"),
    "a length with zeros": ("content-length: 0003\r\n", "abc"),
    "a length and a space": ("content-length: 3 \r\n", "abc"),
    "one chunk": (CHUNKED, "3\r\nabc\r\n0\r\n\r\n"),
    "chunks": (CHUNKED, "1\r\na\r\n02\r\nbc\r\n000\r\n\r\n"),
    "an extension": (CHUNKED, "3;a=b\r\nabc\r\n0;c\r\n\r\n"),
    "trailers": (CHUNKED, "3\r\nabc\r\n0\r\nhost: y\r\nauthorization: z\r\n\r\n"),
    "an upgrade and a length": (f"{UPGRADE}content-length: 3\r\n", "abc"),
    "an upgrade and a chunk": (f"{CHUNKED}{UPGRADE}", "3\r\nabc\r\n0\r\n\r\n"),
    "an upgrade as a trailer": (CHUNKED, f"3\r\nabc\r\n0\r\n{UPGRADE}\r\n"),
}


@pytest.mark.parametrize("said", UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
async def test_a_request_is_understood_and_the_connection_goes_on(client: AsyncClient, said: str) -> None:
    async with wire(client) as one:
        one.say(said + NEXT)
        found = await said_back(one)
        assert ("GET", "", "") == (found["method"], found["query"], found["body"])
        assert await is_next(one)


@pytest.mark.parametrize(("headers", "body"), BODIES.values(), ids=BODIES.keys())
async def test_a_body_ends_where_it_ends_however_it_is_cut(client: AsyncClient, headers: str, body: str) -> None:
    said = posting(headers, body)
    cuts = ([said + NEXT], [said, NEXT], [said[:-1], said[-1] + NEXT], [said[:-2], said[-2:] + NEXT], list(said + NEXT))
    for parts in cuts:
        async with wire(client) as one:
            for part in parts:
                one.say(part)
                await asyncio.sleep(0.001)
            found = await said_back(one)
            assert "abc" == found["body"]
            # No trailer has become a header.
            assert [["host", "x"]] == [pair for pair in found["headers"] if pair[0] in {"host", "authorization"}]
            assert await is_next(one)


async def test_nothing_is_taken_after_a_trailer_that_closes_the_connection(client: AsyncClient, echo: Echo) -> None:
    async with wire(client) as one:
        one.say(posting(CHUNKED, "3\r\nabc\r\n0\r\nconnection: close\r\n\r\n"))
        assert "abc" == (await said_back(one))["body"]
        echo.heard.clear()
        one.say(NEXT)
        assert await is_refused(one)
    assert [] == echo.heard


async def test_empty_lines_in_a_body_are_its_own(client: AsyncClient) -> None:
    lines = 1000 * "\r\n\r\n" + "\n\r"
    async with wire(client) as one:
        for headers, body in (
            (f"content-length: {len(lines)}\r\n", lines),
            (CHUNKED, f"{len(lines):x}\r\n{lines}\r\n0\r\n\r\n"),
        ):
            one.say(posting(headers, body))
            assert lines == (await said_back(one))["body"]
        one.say(NEXT)
        assert await is_next(one)


async def test_what_stands_around_a_value_is_no_part_of_it(client: AsyncClient) -> None:
    async with wire(client) as one:
        one.say(asking(headers="x:\t  a \t b \t \r\n"))
        assert [["host", "x"], ["x", "a \t b"]] == (await said_back(one))["headers"]


async def test_the_head_has_a_limit_whether_it_comes_at_once_or_in_parts(client: AsyncClient) -> None:
    empty = len(asking(headers="x: \r\n"))
    largest = asking(headers=f"x: {'x' * (HEAD_BYTES_MAX - empty)}\r\n")
    too_large = asking(headers=f"x: {'x' * (HEAD_BYTES_MAX - empty + 1)}\r\n")
    for cut in (HEAD_BYTES_MAX, 10_000):
        async with wire(client) as one:
            for said in (largest, largest, too_large):
                one.say(said[:cut])
                await asyncio.sleep(0.05)
                one.say(said[cut:])
                if said is largest:
                    assert "x" == (await said_back(one))["headers"][1][0]
            assert await is_refused(one)


async def test_a_large_head_leaves_room_for_chunks(client: AsyncClient) -> None:
    said = posting(f"{CHUNKED}x: {'x' * HEAD_BYTES_MAX}\r\n")
    async with wire(client) as one:
        one.say(said.replace("x" * (len(said) - HEAD_BYTES_MAX), "", 1))
        for part in ("3\r\n", "abc\r\n", "0\r\n\r\n"):
            await asyncio.sleep(0.05)
            one.say(part)
        assert "abc" == (await said_back(one))["body"]


async def test_a_target_that_is_too_long_is_refused(client: AsyncClient) -> None:
    async with wire(client) as one:
        one.say(asking(f"GET /echo?{'x' * HEAD_BYTES_MAX} HTTP/1.1"))
        assert await is_refused(one)


async def test_the_headers_of_an_answer_come_without_a_body_where_only_they_were_asked_for(client: AsyncClient) -> None:
    async with wire(client) as one:
        one.say(asking("HEAD /echo HTTP/1.1"))
        status, headers = await one.head()
        assert (200, "application/json") == (status, headers["content-type"])
        one.say(NEXT)
        assert await is_next(one)


async def test_options_are_told(client: AsyncClient) -> None:
    async with wire(client) as one:
        one.say(asking("OPTIONS /echo HTTP/1.1"))
        status, headers = await one.head()
        assert (204, {"GET", "HEAD", "OPTIONS", "POST"}) == (status, set(headers["allow"].split(", ")))
        one.say(NEXT)
        assert await is_next(one)


@pytest.mark.parametrize(
    "said",
    [
        asking(headers="connection: close\r\n"),
        asking(headers="connection: keep-alive, Close\r\n"),
        asking("GET /echo HTTP/1.0"),
        asking("GET /echo HTTP/1.0", "connection: keep-alive\r\n"),
        asking("GET /echo HTTP/1.0", UPGRADE),
        "GET /echo HTTP/1.0\r\n\r\n",
    ],
)
async def test_a_connection_is_closed_after_the_answer_where_that_was_asked_for(client: AsyncClient, said: str) -> None:
    async with wire(client) as one:
        one.say(said)
        status, headers, _ = await one.answer()
        assert (200, "close") == (status, headers["connection"])
        assert await one.is_closed()


async def test_a_client_that_waits_with_its_body_is_told_to_go_on(client: AsyncClient) -> None:
    async with wire(client) as one:
        one.say(posting("expect: 100-Continue\r\ncontent-length: 3\r\n"))
        assert (100, {}) == await one.head()
        one.say("abc")
        assert "abc" == (await said_back(one))["body"]
        one.say(NEXT)
        assert await is_next(one)


async def test_a_client_is_not_told_to_go_on_where_it_would_not_understand_or_nobody_reads(client: AsyncClient) -> None:
    async with wire(client) as old:
        old.say(posting("expect: 100-continue\r\ncontent-length: 3\r\n", version="1.0"))
        await asyncio.sleep(0.1)
        old.say("abc")
        assert "abc" == (await said_back(old))["body"]
    async with wire(client) as unread:
        unread.say(asking("POST /unread HTTP/1.1", "expect: 100-continue\r\ncontent-length: 3\r\n"))
        assert b"not read" == (await unread.answer())[2]
        unread.say("abc" + NEXT)
        assert await is_next(unread)


async def test_a_body_that_nobody_reads_is_passed_over_also_where_it_looks_like_requests(
    client: AsyncClient, echo: Echo
) -> None:
    echo.heard.clear()
    body = 10_000 * asking("GET /echo?hidden HTTP/1.1")
    async with wire(client) as one:
        one.say(asking("POST /unread HTTP/1.1", f"content-length: {len(body)}\r\n"))
        assert b"not read" == (await one.answer())[2]
        one.say(body + NEXT)
        assert await is_next(one)
    assert ["GET next"] == echo.heard


async def test_a_large_body_is_not_taken_for_a_large_head(client: AsyncClient) -> None:
    large = "x" * (HEAD_BYTES_MAX - 1)
    async with wire(client) as one:
        one.say(2 * posting(f"content-length: {len(large)}\r\n", large))
        one.say(posting(CHUNKED, f"{len(large):x}\r\n{large}\r\n0\r\n\r\n") + LIVE)
        for _ in range(3):
            assert large == (await said_back(one))["body"]
        assert 200 == (await one.answer())[0]
