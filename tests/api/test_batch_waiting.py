"""What batches mean for those who wait for them, over a real socket: neighbours that fail, lost commits, a full queue.

The clock is simulated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest
from httpx import AsyncClient, Response
from sqlalchemy.engine import URL

from talktime import beats
from talktime.api import connections
from talktime.batching import Batcher
from talktime.logs import DiscreetFormatter
from talktime.store import database
from tests.api.requests import AUTH, problem_of
from tests.api.server import json_of, serving
from tests.api.test_heartbeats import BAD, PATH, RUNS, UNKNOWN, beat, chat, send, start
from tests.api.test_outage import Proxy, refused
from tests.database import Clock
from tests.store.many_chats import HANGS_AFTER_SECONDS, beat_at, beats_at, chats_shut, commits_held, undecodable
from tests.support import S, until_blocked


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody lose patience with a lock while the test that holds it looks around, nor with a busy machine."""
    monkeypatch.setattr(database, "_SESSION", database._SESSION.replace("'2s'", "'60s'"))
    monkeypatch.setattr(database, "TRANSACTION_SECONDS_MAX", HANGS_AFTER_SECONDS)
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)
    for name in ("ANSWER_SECONDS_MAX", "SHUTDOWN_SECONDS_MAX"):
        monkeypatch.setattr(connections, name, HANGS_AFTER_SECONDS)


@pytest.fixture
async def client(database_url: URL, clock: Clock) -> AsyncIterator[AsyncClient]:
    """The API with default settings, on simulated time: the lease is 15 s."""
    async with serving(database_url) as client:
        yield client


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_one_that_fails_is_a_500_among_good_ones_and_no_log_says_whose_it_was(
    client: AsyncClient, database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    users = ["hers", "mark-of-a-user", "his"]
    for user_id in users:
        await start(client, user_id, f"mark-of-a-chat-{user_id}")
    sent = [beat(user_id, f"mark-of-a-chat-{user_id}") for user_id in users]
    with undecodable(database_url, "mark-of-a-user"):
        assert [RUNS, {"status": 500, "code": "internal-error"}, RUNS] == await send(client, *sent)
        for method, what in (("GET", ""), ("POST", "/heartbeat")):
            answers = await asyncio.gather(*(client.request(method, chat(**one) + what) for one in sent))
            assert [200, 500, 200] == [answer.status_code for answer in answers]
            assert "vanity" not in problem_of(answers[1], 500, "internal-error")["detail"]
    written = _as_the_service_writes(caplog.records)
    assert 3 <= written.count("KeyError")
    for word in ("mark-of-a", "hers", "vanity"):
        assert word not in written


def _as_the_service_writes(records: Sequence[logging.LogRecord]) -> str:
    # What pytest's own handlers made of an exception is kept in the record, and not to be taken for the service's.
    anew = [logging.makeLogRecord({**vars(record), "exc_text": None}) for record in records]
    return "\n".join(map(DiscreetFormatter().format, anew))


@pytest.fixture
async def proxy(database_url: URL, clock: Clock) -> AsyncIterator[Proxy]:
    """A proxy to the test's database that passes everything on."""
    proxy = Proxy(database_url)
    await proxy.restore()
    yield proxy
    await proxy.cut()


@pytest.mark.parametrize("arrives", [True, False], ids=["commit-arrives", "commit-is-lost"])
async def test_beats_whose_commit_is_cut_off_are_not_told_of_success_and_repeating_them_is_harmless(
    proxy: Proxy, clock: Clock, database_url: URL, *, arrives: bool
) -> None:
    async with serving(proxy.url) as client:
        for user_id in ("u1", "u2", "u3"):
            await start(client, user_id)
        clock.tick(5 * S)
        # The connections are new: their first commits are told in words.
        proxy.cut_at, proxy.lets_through = b"COMMIT\0", arrives
        refused(await client.post(f"{chat('u1')}/heartbeat"))
        await proxy.restore()
        proxy.cut_at, proxy.lets_through = b"COMMIT\0", arrives
        refused(await client.post(PATH, json={"beats": [beat("u2"), beat("u3")]}))
        committed = clock.now if arrives else clock.now - 5 * S
        assert {committed} == beats_at(database_url, [("u1", "c"), ("u2", "c"), ("u3", "c")])
        await proxy.restore()
        clock.tick(5 * S)
        assert [RUNS] * 3 == await send(client, beat("u1"), beat("u2"), beat("u3"))
        assert {clock.now} == beats_at(database_url, [("u1", "c"), ("u2", "c"), ("u3", "c")])
        for user_id in ("u1", "u2", "u3"):
            reading = json_of(await client.get(chat(user_id)))
            assert (10 * S, 1) == (reading["elapsed_us"], reading["revision"])
            assert 1 == len(json_of(await client.get(f"{chat(user_id)}/segments"))["items"])


async def test_without_a_database_a_request_is_refused_as_a_whole_whatever_is_in_it(proxy: Proxy, clock: Clock) -> None:
    async with serving(proxy.url) as client:
        await start(client, "u1")
        await proxy.cut()
        for sent in ([beat("u1")], [beat("u1"), beat("u1"), beat("nobody")], [beat("a b"), beat("u1")]):
            refused(await client.post(PATH, json={"beats": sent}))
        # What needs no database has its result.
        assert [BAD] == await send(client, beat("a b"))
        await proxy.restore()
        assert [RUNS, UNKNOWN, BAD] == await send(client, beat("u1"), beat("nobody"), beat("a b"))


# --- those who wait ---------------------------------------------------------------------------------------------------


class Asked:
    """How many have asked for an item of a batch."""

    def __init__(self) -> None:
        self._count = 0
        self._more = asyncio.Event()

    def one_more(self) -> None:
        self._count += 1
        self._more.set()

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            while self._count < count:
                self._more.clear()
                await self._more.wait()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Sees those who ask the service's batchers, who are served as ever."""
    asked = Asked()
    ask = Batcher.ask

    async def watched_ask(self: Batcher[Any, Any], item: object) -> object:
        asked.one_more()
        return await ask(self, item)

    monkeypatch.setattr(Batcher, "ask", watched_ask)
    return asked


async def _requests(client: AsyncClient, method: str, users: list[str]) -> list[asyncio.Task[Response]]:
    what = "/heartbeat" if method == "POST" else ""
    return [asyncio.create_task(client.request(method, chat(user_id) + what)) for user_id in users]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_when_too_many_wait_the_next_is_told_to_come_again_and_nothing_is_done_for_him(
    clock: Clock, database_url: URL, monkeypatch: pytest.MonkeyPatch, asked: Asked, method: str
) -> None:
    monkeypatch.setitem(cast("dict[str, Any]", Batcher.__init__.__kwdefaults__), "waiting_max", 4)
    async with serving(database_url) as client:
        users = ["u0", "u1", "u2", "u3", "late"]
        for user_id in users:
            await start(client, user_id)
        clock.tick(5 * S)
        with chats_shut(database_url):
            waiting = await _requests(client, method, users[:4])
            await asked.reach(4)
            await until_blocked(database_url)
            for request in await _requests(client, method, ["late", "u0"]):
                answer = await request
                problem_of(answer, 503, "overloaded")
                assert "1" == answer.headers["retry-after"]
        for request in waiting:
            assert "running" == json_of(await request)["state"]
        begin = clock.now - 5 * S
        assert (begin if method == "GET" else clock.now) == beat_at(database_url, "u3")
        assert begin == beat_at(database_url, "late")
        [again] = await _requests(client, method, ["late"])
        assert 5 * S == json_of(await again)["elapsed_us"]


async def test_all_who_wait_are_answered_when_the_service_ends(clock: Clock, database_url: URL, asked: Asked) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(database_url))
        origin = str(first.base_url)
        users = ["u0", "u1", "u2", "u3"]
        for user_id in users:
            await start(first, user_id)
        clock.tick(5 * S)
        # The service's own client goes before the service does.
        async with AsyncClient(base_url=origin, headers=AUTH, timeout=HANGS_AFTER_SECONDS, trust_env=False) as client:
            with commits_held(database_url):
                waiting = await _requests(client, "POST", users)
                await until_blocked(database_url)
                await asked.reach(4)
                waiting.append(asyncio.create_task(client.post(PATH, json={"beats": [beat(u) for u in users]})))
                await until_blocked(database_url, 2)
                ending = asyncio.create_task(stack.aclose())
                # From when it takes no more, it is ending.
                await _until_closed(origin)
                assert not any(request.done() for request in waiting)
            answers = await asyncio.gather(*waiting)
            await ending
    assert [200] * 5 == [answer.status_code for answer in answers]
    assert [RUNS] * 4 == json_of(answers[-1])["results"]
    assert {clock.now} == beats_at(database_url, [(user_id, "c") for user_id in users])


async def _until_closed(origin: str) -> None:
    """Wait until nobody listens there any more."""
    host, port = origin.removeprefix("http://").split(":")
    for _ in range(1000):
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.01)
    pytest.fail("it takes connections still")
