"""The database goes away and comes back; the API, which is not started anew, answers 503 meanwhile and then goes on.

Between the two stands a proxy that can be cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from httpx import AsyncClient, Response
from sqlalchemy.engine import URL

from talktime.store import database
from tests.api.requests import CHAT, CREDIT, ROUTES, START, Json, problem_of
from tests.api.server import json_of, serving
from tests.database import connect
from tests.support import until_blocked

CREDITS = "/v1/users/u1/credits"
KEYED = {"Idempotency-Key": "k1"}


@dataclass(slots=True)
class Proxy:
    """A TCP port in front of a PostgreSQL, which may listen on a TCP port or on a socket in the file system."""

    database: URL
    port: int = 0
    silent: bool = False
    cut_at: bytes | None = None
    lets_through: bool = False
    _listening: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> URL:
        """The database as it is reached through the proxy. Unencrypted, so that the proxy can see what is said."""
        query = {"sslmode": "disable", "gssencmode": "disable"}
        return self.database.set(host="127.0.0.1", port=self.port, query=query)

    async def restore(self) -> None:
        """Listen, on the same port as before, and pass everything on."""
        self.silent, self.cut_at = False, None
        if self._listening is None:
            self._listening = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.port = self._listening.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Refuse new connections and break those that are open."""
        self._break()
        while self._connections:
            await asyncio.wait(self._connections)
            self._break()  # what was only just being connected

    def fall_silent(self) -> None:
        """Refuse new connections, and leave those that are open without any word."""
        self.silent = True
        self._refuse()

    def _refuse(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _break(self) -> None:
        self._refuse()
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        ends = {writer}
        self._writers |= ends
        try:
            answers, upstream = await self._connect()
            ends.add(upstream)
            self._writers |= ends
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, upstream, answers))
                both.create_task(self._pass_on(answers, writer))
        except (OSError, ExceptionGroup):
            pass  # either end is gone, and so is the connection
        finally:
            for end in ends:
                end.transport.abort()
            for end in ends:
                with suppress(OSError):
                    await end.wait_closed()
            self._writers -= ends
            self._connections.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect as libpq would: the URL's query, where the embedded PostgreSQL's socket is named, goes first."""
        host = self.database.query.get("host") or self.database.host or "127.0.0.1"
        port = self.database.query.get("port") or self.database.port or 5432
        assert isinstance(host, str)
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, int(str(port)))

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, answers: asyncio.StreamReader | None = None
    ) -> None:
        """Pass on what is said. What a client says to the server may hold the words at which the proxy cuts."""
        while data := await source.read(65_536):
            if answers is not None and self.cut_at is not None and self.cut_at in data:
                if self.lets_through:
                    target.write(data)
                    await target.drain()
                    # The other direction is silent from here on; the database has time to do as it was told.
                    self.silent = True
                    await asyncio.sleep(0.3)
                self._break()
                break
            if not self.silent:
                target.write(data)
                await target.drain()
        raise ConnectionResetError


@pytest.fixture
async def proxy(database_url: URL) -> AsyncIterator[Proxy]:
    """A proxy to the test's database that passes everything on."""
    proxy = Proxy(database_url)
    await proxy.restore()
    yield proxy
    await proxy.cut()


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[AsyncClient]:
    """The API behind the proxy, with free time for everybody and a running chat."""
    async with serving(proxy.url) as client:
        json_of(await client.post(f"{CHAT}/start", json=START))
        yield client


def refused(response: Response) -> None:
    """Check that the answer is to try again in a second, and tells nothing of the database."""
    problem = problem_of(response, 503, "unavailable")
    assert "1" == response.headers["retry-after"]
    assert not {"reading", "errors"} & set(problem)
    assert "127.0.0.1" not in response.text


async def add(client: AsyncClient) -> Response:
    return await client.post(CREDITS, headers=KEYED, json=CREDIT)


async def entries(client: AsyncClient) -> list[tuple[str, str]]:
    items = json_of(await client.get("/v1/users/u1/ledger"))["items"]
    return [(item["kind"], item["amount"]) for item in items]


@contextmanager
def account_locked(url: URL) -> Iterator[None]:
    """Hold the account's row, so that every locking request waits in the database."""
    with connect(url) as connection, connection.transaction():
        connection.execute("SELECT FROM account FOR UPDATE")
        yield


async def test_every_route_answers_503_while_the_database_is_away_and_serves_again_when_it_is_back(
    client: AsyncClient, proxy: Proxy
) -> None:
    before = json_of(await client.get(CHAT))
    for _ in range(2):
        assert {"status": "ready"} == (await client.get("/readyz")).json()
        await proxy.cut()
        for method, path, body in ROUTES:
            refused(await client.request(method, path, headers=KEYED, json=body))
        refused(await client.get("/readyz"))
        assert (200, {"status": "alive"}) == ((alive := await client.get("/livez")).status_code, alive.json())
        assert 200 == (await client.get("/metrics")).status_code
        # What the API itself refuses needs no database.
        problem_of(await client.get(CHAT, headers={"Authorization": "Bearer wrong"}), 401, "unauthorized")
        problem_of(await client.get("/v1/users/u1/ledger?limit=0"), 400, "invalid-input")
        await proxy.restore()
    assert {"status": "ready"} == (await client.get("/readyz")).json()
    after = json_of(await client.get(CHAT))
    assert ("running", before["revision"], before["started_at"]) == (
        after["state"],
        after["revision"],
        after["started_at"],
    )
    for method, path, body in ROUTES:
        assert (await client.request(method, path, headers=KEYED, json=body)).is_success, path


async def test_an_outage_shorter_than_the_time_between_two_requests_is_not_noticed(
    client: AsyncClient, proxy: Proxy
) -> None:
    async def all_at_once() -> list[int]:
        commands = [client.post(f"{CHAT}/start", json=START) for _ in range(30)]
        lists = [client.get("/v1/users/u1/chats") for _ in range(30)]
        reads = [client.get(CHAT) for _ in range(30)]
        return [response.status_code for response in await asyncio.gather(*commands, *lists, *reads)]

    assert [200] * 90 == await all_at_once()  # so the pool is full of connections
    await proxy.cut()
    await proxy.restore()
    assert [200] * 90 == await all_at_once()


async def test_a_database_that_was_restarted_is_not_noticed_either(client: AsyncClient, database_url: URL) -> None:
    reads = [200] * 30
    assert reads == [r.status_code for r in await asyncio.gather(*(client.get(CHAT) for _ in reads))]
    query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
    with connect(database_url) as connection:
        row = connection.execute(f"{query} AND pid <> pg_backend_pid()").fetchone()
    assert row is not None
    assert row[0] > 1
    assert 201 == (await add(client)).status_code
    assert reads == [r.status_code for r in await asyncio.gather(*(client.get(CHAT) for _ in reads))]


async def test_a_request_cut_in_mid_flight_is_answered_503_and_repeating_it_is_harmless(
    client: AsyncClient, proxy: Proxy, database_url: URL
) -> None:
    with account_locked(database_url):
        requests = [
            asyncio.create_task(request)
            for request in (
                add(client),
                client.post(f"{CHAT}/pause"),
                client.post(f"{CHAT}/start", headers=KEYED, json=START),
            )
        ]
        await until_blocked(database_url, 3)
        await proxy.cut()
        for response in await asyncio.gather(*requests):
            refused(response)
    await proxy.restore()
    assert [] == await entries(client)
    assert "running" == json_of(await client.get(CHAT))["state"]
    first, again = [json_of(await add(client), 201) for _ in range(2)]
    assert first == again
    assert [("purchase", "25.000000")] == await entries(client)
    assert "paused" == json_of(await client.post(f"{CHAT}/pause"))["state"]


@pytest.mark.parametrize("arrives", [True, False], ids=["commit-arrives", "commit-is-lost"])
async def test_a_connection_lost_at_commit_leaves_it_open_and_the_repeated_request_decides(
    client: AsyncClient, proxy: Proxy, database_url: URL, *, arrives: bool
) -> None:
    proxy.cut_at, proxy.lets_through = b"COMMIT\0", arrives
    refused(await add(client))
    with connect(database_url) as connection:
        assert (1 if arrives else 0,) == connection.execute("SELECT count(*) FROM ledger_entry").fetchone()
    await proxy.restore()
    first, again = [json_of(await add(client), 201) for _ in range(2)]
    assert first == again
    assert [("purchase", "25.000000")] == await entries(client)


@pytest.mark.parametrize("arrives", [True, False], ids=["commit-arrives", "commit-is-lost"])
async def test_a_start_lost_at_commit_can_be_repeated(client: AsyncClient, proxy: Proxy, *, arrives: bool) -> None:
    async def start() -> Response:
        return await client.post("/v1/users/u1/chats/c2/start", headers=KEYED, json=START)

    proxy.cut_at, proxy.lets_through = b"COMMIT\0", arrives
    refused(await start())
    await proxy.restore()
    first, again = [json_of(await start()) for _ in range(2)]
    assert (1, "running") == (first["revision"], first["state"])
    assert first["started_at"] == again["started_at"]
    assert 1 == again["revision"]
    assert 1 == len(json_of(await client.get("/v1/users/u1/chats/c2/segments"))["items"])


async def test_a_database_that_falls_silent_is_answered_503_in_time(
    client: AsyncClient, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once that is over, psycopg waits five seconds more for a query to end that it asked the server to cancel.
    monkeypatch.setattr(database, "TRANSACTION_SECONDS_MAX", 0.5)
    proxy.fall_silent()
    async with asyncio.timeout(9):
        responses = await asyncio.gather(client.get(CHAT), add(client), client.get("/readyz"))
    for response in responses:
        refused(response)
    await proxy.cut()
    await proxy.restore()
    assert 201 == (await add(client)).status_code
    assert [("purchase", "25.000000")] == await entries(client)


async def test_the_api_starts_without_its_database_and_serves_when_it_comes(database_url: URL) -> None:
    proxy = Proxy(database_url)
    await proxy.restore()
    await proxy.cut()
    async with serving(proxy.url) as client:
        refused(await client.get("/readyz"))
        refused(await add(client))
        assert 200 == (await client.get("/livez")).status_code
        await proxy.restore()
        assert 200 == (await client.get("/readyz")).status_code
        assert 201 == (await add(client)).status_code
    await proxy.cut()


async def test_a_database_without_tables_is_not_ready_until_it_is_migrated(
    empty_database_url: URL, database_url: URL
) -> None:
    async with serving(empty_database_url) as client:
        problem = problem_of(await client.get("/readyz"), 503, "unavailable")
        assert "talktime migrate" in problem["detail"]
        problem = problem_of(await add(client), 503, "unavailable")
        assert "talktime migrate" in problem["detail"]


async def test_readings_go_on_from_the_stored_times_after_an_outage(client: AsyncClient, proxy: Proxy) -> None:
    readings: list[Json] = [json_of(await client.get(CHAT))]
    await proxy.cut()
    refused(await client.post(f"{CHAT}/heartbeat"))
    await asyncio.sleep(0.5)
    await proxy.restore()
    readings.append(json_of(await client.post(f"{CHAT}/heartbeat")))
    readings.append(json_of(await client.get(CHAT)))
    for earlier, later in pairwise(readings):
        assert earlier["elapsed_us"] <= later["elapsed_us"]
    assert readings[-1]["elapsed_us"] >= 500_000
    assert readings[-1]["started_at"] == readings[0]["started_at"]
