"""Hot routes: what goes straight to its handler is answered, refused and counted as the framework would do it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from httpx import AsyncClient, Response
from litestar import Litestar
from litestar.types import Receive, Scope, Send
from sqlalchemy.engine import URL

from talktime.api.app import create_app
from talktime.api.hot import HotRoutes
from talktime.settings import load_settings
from talktime.store.database import Database
from tests.api.requests import AUTH, CHAT, KEY, START, UNLIMITED, as_sent
from tests.api.server import json_of
from tests.api.tokens import VARIABLES, bearer, live_token
from tests.database import Clock
from tests.support import S

BEAT = f"{CHAT}/heartbeat"
USER, ADVISOR = bearer(live_token("u1")), bearer(live_token("a1", role="advisor"))


def hot_routes(app: Litestar) -> HotRoutes:
    assert isinstance(app.asgi_handler, HotRoutes)
    return app.asgi_handler


@asynccontextmanager
async def applications(url: URL, **variables: str) -> AsyncIterator[dict[str, AsyncClient]]:
    """Yield clients of two applications over one database: as it is, and the framework alone."""
    settings = load_settings({"TALKTIME_SERVICE_KEY": KEY, **UNLIMITED, **VARIABLES, **variables})
    whole, alone = (create_app(settings, lambda: Database(url)) for _ in range(2))
    alone.asgi_handler = hot_routes(alone).framework
    async with whole.lifespan(), alone.lifespan(), as_sent(whole) as hot, as_sent(alone) as plain:
        json_of(await plain.post(f"{CHAT}/start", json=START, headers=AUTH))
        json_of(await plain.post("/v1/users/u1/chats/ended/start", json=START, headers=AUTH))
        json_of(await plain.post("/v1/users/u1/chats/ended/stop", headers=AUTH))
        json_of(await plain.post(f"{CHAT}/start", json=START, headers=AUTH))
        yield {"hot": hot, "plain": plain}


def shown(response: Response) -> tuple[int, list[tuple[str, str]], bytes]:
    headers = sorted((name, value) for name, value in response.headers.items() if name != "x-request-id")
    # Litestar keeps methods as a set, which each application may tell in another order.
    headers = [(name, ", ".join(sorted(value.split(", "))) if name == "allow" else value) for name, value in headers]
    return response.status_code, headers, response.content


def framework_requests(app_client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every path is added that gets to the framework."""
    app: Any = app_client._transport.app  # type: ignore[attr-defined]
    hot = hot_routes(app)
    paths: list[str] = []
    framework = hot.framework

    async def noticing(scope: Scope, receive: Receive, send: Send) -> None:
        paths.append(scope["path"])
        await framework(scope, receive, send)

    monkeypatch.setattr(hot, "framework", noticing)
    return paths


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "reading": ("GET", CHAT, {"headers": AUTH}),
    "the user's own": ("GET", CHAT, {"headers": USER}),
    "the advisor's": ("GET", CHAT, {"headers": ADVISOR}),
    "heartbeat": ("POST", BEAT, {"headers": AUTH}),
    "the user's heartbeat": ("POST", BEAT, {"headers": USER}),
    "heartbeat with an empty object": ("POST", BEAT, {"headers": AUTH, "json": {}}),
    "heartbeat with a body": ("POST", BEAT, {"headers": AUTH, "json": {"at": 1}}),
    "advisor's heartbeat": ("POST", BEAT, {"headers": ADVISOR}),
    "nobody": ("GET", CHAT, {}),
    "two credentials": ("GET", CHAT, {"headers": [("Authorization", "Bearer a"), ("Authorization", "Bearer b")]}),
    "forged": ("POST", BEAT, {"headers": bearer(live_token("u1")[:-2])}),
    "expired": ("GET", CHAT, {"headers": bearer(live_token("u1", exp=1))}),
    "somebody else": ("GET", CHAT, {"headers": bearer(live_token("u2"))}),
    "no such chat": ("GET", "/v1/users/u1/chats/c9", {"headers": AUTH}),
    "no such user": ("POST", "/v1/users/u9/chats/c1/heartbeat", {"headers": AUTH}),
    "ended": ("POST", "/v1/users/u1/chats/ended/heartbeat", {"headers": AUTH}),
    "no id": ("GET", "/v1/users/u1/chats/c 1", {"headers": AUTH}),
    "dots": ("GET", "/v1/users/u1/chats/..", {"headers": AUTH}),
    "encoded slash": ("GET", "/v1/users/u1/chats/c%2F1", {"headers": AUTH}),
    "encoded heartbeat": ("GET", "/v1/users/u1/chats/c1%2Fheartbeat", {"headers": AUTH}),
    "doubled slash": ("GET", "/v1/users//u1/chats/c1", {"headers": AUTH}),
    "slash at the end": ("GET", f"{CHAT}/", {"headers": AUTH}),
    "encoded letter": ("GET", "/v1/users/%751/chats/c1", {"headers": AUTH}),
    "line end": ("GET", f"{CHAT}%0A", {"headers": AUTH}),
    "long id": ("GET", f"/v1/users/u1/chats/{'c' * 129}", {"headers": AUTH}),
    "query": ("GET", f"{CHAT}?at=1", {"headers": AUTH}),
    "wrong host": ("GET", CHAT, {"headers": {**AUTH, "Host": "a b"}}),
    "origin": ("GET", CHAT, {"headers": {**AUTH, "Origin": "https://page.example"}}),
    "HEAD": ("HEAD", CHAT, {"headers": AUTH}),
    "OPTIONS": ("OPTIONS", CHAT, {"headers": AUTH}),
    "PUT": ("PUT", CHAT, {"headers": AUTH}),
    "POST to a reading": ("POST", CHAT, {"headers": AUTH}),
    "GET of a heartbeat": ("GET", BEAT, {"headers": AUTH}),
}
STRAIGHT = {"reading", "the user's own", "the advisor's", "heartbeat", "the user's heartbeat", "encoded letter"}


@pytest.mark.parametrize("origins", ["", "https://page.example"])
async def test_answers_are_those_of_the_framework(
    database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch, origins: str
) -> None:
    async with applications(database_url, TALKTIME_CORS_ORIGINS=origins) as clients:
        clock.tick(S)
        noticed = framework_requests(clients["hot"], monkeypatch)
        for name, (method, path, given) in CASES.items():
            noticed.clear()
            hot = await clients["hot"].request(method, path, **given)
            assert (name in STRAIGHT) != bool(noticed), name
            plain = await clients["plain"].request(method, path, **given)
            assert shown(plain) == shown(hot), name


async def test_requests_are_counted_once_and_alike(database_url: URL, clock: Clock) -> None:
    async with applications(database_url) as clients:
        clock.tick(S)
        for client in clients.values():
            before = await counts(client)
            for method, path, given in CASES.values():
                await client.request(method, path, **given)
            after = await counts(client)
            made = {labels: value - before.get(labels, 0.0) for labels, value in after.items()}
            found = {labels: value for labels, value in made.items() if value}
            if client is clients["hot"]:
                expected = found
            assert expected == found
            assert 3 == found["/v1/users/{user_id}/chats/{chat_id}", "401"]


async def counts(client: AsyncClient) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for line in (await client.get("/metrics")).text.splitlines():
        for name in ("talktime_requests_total", "talktime_request_duration_seconds_count"):
            if line.startswith(f"{name}{{"):
                labels = dict(part.split("=", 1) for part in line[len(name) + 1 : line.index("} ")].split('",'))
                key = labels["path"].strip('"'), labels["status_code"].strip('"')
                found[key] = found.get(key, 0.0) + float(line.rsplit(" ", 1)[1]) / 2
    return found


@pytest.mark.parametrize(("user", "status"), [("u1", 200), ("u2", 404)])
async def test_a_request_is_taken_from_its_callers_rate_once(
    database_url: URL, clock: Clock, user: str, status: int
) -> None:
    # One a second, and two at once.
    async with applications(database_url, TALKTIME_USER_REQUESTS_PER_SECOND="1") as clients:
        clock.tick(S)
        path, headers = f"/v1/users/{user}/chats/c1", bearer(live_token(user))

        assert [status, status, 429] == [
            (await clients["hot"].get(path, headers=headers)).status_code for _ in range(3)
        ]
