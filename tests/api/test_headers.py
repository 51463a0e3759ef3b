"""The headers that browsers are to see, with the answers of every route that there is."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
from httpx import AsyncClient, Response
from litestar import Litestar
from sqlalchemy.engine import URL

from talktime.api.app import create_app
from talktime.api.tokens import mint
from talktime.settings import load_settings
from talktime.store.database import Database
from talktime.web import pages
from talktime.web.demo import Demo
from tests.api.conftest import CLOSED_PORT
from tests.api.requests import KEY
from tests.api.server import serving
from tests.api.tokens import VARIABLES
from tests.web.server import SIGN_IN

PARAMETERS = {"advisor_id": "a1", "user_id": "u1", "chat_id": "c1", "rest": "nowhere"}
FILES = {"/assets": "console.js", "/client": "index.js", "/schema/assets": "docs.js"}


def demo() -> Demo:
    tokens = load_settings(VARIABLES).tokens
    assert tokens is not None
    assert mint(tokens, "u1", seconds=1)
    return Demo(tokens)


def all_paths() -> list[tuple[str, str]]:
    """Return every method and path that the application has a route for, whoever added it, and some it has none for."""
    app: Litestar = create_app(load_settings({}), lambda: Database(CLOSED_PORT), pages=pages(demo()))
    found = [("GET", "/nowhere"), ("GET", "/v1/nowhere"), ("DELETE", "/livez"), ("GET", "/assets/none.js")]
    for route in app.routes:
        file = next((name for folder, name in FILES.items() if route.path.startswith(f"{folder}/")), "none")
        path = re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: PARAMETERS.get(match[1], file), route.path)  # noqa: B023 - called at once
        methods: set[str] = set(getattr(route, "methods", ()))
        found += [(method, path) for method in sorted(methods - {"OPTIONS"})]
    return found


@pytest.fixture
async def client(database_url: URL) -> AsyncIterator[AsyncClient]:
    async with serving(database_url, pages=pages(demo()), **VARIABLES) as client:
        assert 303 == (await client.post(SIGN_IN, data={"key": KEY})).status_code
        yield client


def check(answer: Response, what: str) -> str:
    """Check the headers of an answer, and return its kind."""
    headers = answer.headers
    kind = str(headers.get("content-type", "")).partition(";")[0]
    assert "nosniff" == headers["x-content-type-options"], what
    assert "same-origin" == headers["referrer-policy"], what
    assert "server" not in headers, what
    is_for_all = what.startswith("GET /client/") and answer.status_code == 200
    assert ("cross-origin" if is_for_all else "same-origin") == headers["cross-origin-resource-policy"], what
    assert ("*" if is_for_all else None) == headers.get("access-control-allow-origin"), what
    if kind in ("text/javascript", "text/css"):
        assert headers["cache-control"] in ("no-cache", "max-age=86400, public"), what
        assert "content-security-policy" not in headers, what  # a worker would take it for its own
        return kind
    assert {"no-store"} == set(headers["cache-control"].split(", ")), what
    policy = headers["content-security-policy"].split("; ")
    assert "default-src 'none'" == policy[0], what
    assert "frame-ancestors 'none'" in policy, what
    if kind == "text/html":
        assert {"base-uri 'none'", "script-src 'self'"} <= set(policy), what
        assert "DENY" == headers["x-frame-options"], what
        assert "same-origin" == headers["cross-origin-opener-policy"], what
        assert "camera=()" in headers["permissions-policy"], what
    return kind


async def test_every_answer_of_every_route_has_its_headers(client: AsyncClient) -> None:
    kinds: dict[str, set[int]] = {}
    paths = all_paths()
    assert len(paths) > 40
    for method, path in paths:
        for headers in ({}, {"Authorization": "Bearer wrong", "Cookie": "x=y"}):
            answer = await client.request(method, path, headers=headers)
            kinds.setdefault(check(answer, f"{method} {path}"), set()).add(answer.status_code)
    assert {200, 303, 404} <= kinds["text/html"]
    assert {200, 404} <= kinds["application/json"] | kinds["application/problem+json"]
    assert {400, 401, 404, 405} <= kinds["application/problem+json"]
    assert {200} <= kinds["text/javascript"]


async def test_a_page_of_another_origin_may_not_keep_a_hand_on_ours(client: AsyncClient) -> None:
    for path in ("/", "/console", SIGN_IN, "/schema", "/console/nowhere"):
        answer = await client.get(path)
        assert "text/html" == check(answer, f"GET {path}")
