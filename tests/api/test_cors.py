"""Pages of other origins: those that are allowed can call and read all answers, and no others."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from httpx import AsyncClient, Response
from sqlalchemy.engine import URL

from tests.api.requests import AUTH, CHAT, START, problem_of
from tests.api.server import json_of, serving
from tests.api.tokens import VARIABLES, bearer, live_token

APP, OTHER_APP = "https://app.example.com", "http://localhost:3000"
STRANGERS = [
    "https://app.example.com.evil.example",
    "https://evil.example",
    "http://app.example.com",
    "https://app.example.com:8443",
    "https://xapp.example.com",
    "https://appxexample.com",
    "null",
]


@pytest.fixture
async def client(database_url: URL) -> AsyncIterator[AsyncClient]:
    async with serving(database_url, TALKTIME_CORS_ORIGINS=f"{APP},{OTHER_APP}", **VARIABLES) as client:
        del client.headers["Authorization"]
        yield client


async def preflight(client: AsyncClient, origin: str, method: str = "POST", headers: str = "authorization") -> Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return await client.options(f"{CHAT}/heartbeat", headers=asked)


@pytest.mark.parametrize("origin", [APP, OTHER_APP])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
async def test_a_page_of_an_allowed_origin_may_ask_first_without_a_credential(
    client: AsyncClient, origin: str, method: str
) -> None:
    response = await preflight(client, origin, method, "authorization,content-type,idempotency-key")

    assert 204 == response.status_code
    assert origin == response.headers["access-control-allow-origin"]
    assert method in response.headers["access-control-allow-methods"].split(", ")
    allowed = {name.lower() for name in response.headers["access-control-allow-headers"].split(", ")}
    assert {"authorization", "content-type", "idempotency-key"} <= allowed
    assert "600" == response.headers["access-control-max-age"]
    assert "Origin" == response.headers["vary"]
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    ("origin", "method", "headers"),
    [
        *((stranger, "POST", "authorization") for stranger in STRANGERS),
        (APP, "DELETE", "authorization"),
        (APP, "PATCH", "authorization"),
        (APP, "POST", "x-anything"),
    ],
)
async def test_nothing_else_is_allowed_when_asked(client: AsyncClient, origin: str, method: str, headers: str) -> None:
    response = await preflight(client, origin, method, headers)

    assert 400 == response.status_code
    assert "access-control-allow-origin" not in response.headers


def readable(response: Response, origin: str = APP) -> None:
    """Check that a page of this origin may read the answer, and that no cache gives it to others."""
    assert origin == response.headers["access-control-allow-origin"]
    assert ["Origin"] == response.headers.get_list("vary")
    assert {"Retry-After", "WWW-Authenticate", "X-Request-Id"} == set(
        response.headers["access-control-expose-headers"].split(", ")
    )
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("origin", [APP, OTHER_APP])
async def test_every_answer_can_be_read_by_an_allowed_page(client: AsyncClient, origin: str) -> None:
    page = {"Origin": origin}
    user = {**page, **bearer(live_token("u1"))}
    service = {**page, **AUTH}
    start = await client.post(f"{CHAT}/start", headers=service, json=START)
    json_of(start)
    answers = [
        (start, 200),
        (await client.get(CHAT, headers=page), 401),
        (await client.get("/v1/users/u2/account", headers=user), 403),
        (await client.get("/v1/users/u1/chats/c9", headers=user), 404),
        (await client.get("/nowhere", headers=page), 404),
        (await client.delete(CHAT, headers=page), 405),
        (await client.post(f"{CHAT}/start", headers=service, json={"advisor_id": "a2"}), 409),
        (await client.get("/v1/users/u1/ledger?limit=0", headers=user), 400),
    ]
    for response, status in answers:
        assert status == response.status_code
        readable(response, origin)


async def test_an_outage_can_be_read_too() -> None:
    url: URL = "postgresql+psycopg://nobody:nothing@127.0.0.1:1/nowhere"  # type: ignore[assignment] # a URL as text
    async with serving(url, TALKTIME_CORS_ORIGINS=APP) as client:
        response = await client.get(CHAT, headers={"Origin": APP})

    problem_of(response, 503, "unavailable")
    readable(response)


@pytest.mark.parametrize("origin", STRANGERS)
async def test_no_answer_can_be_read_by_another_page(client: AsyncClient, origin: str) -> None:
    for headers in ({}, AUTH):
        response = await client.get("/v1/advisors/a1", headers={"Origin": origin, **headers})
        assert "access-control-allow-origin" not in response.headers


async def test_an_answer_without_an_origin_is_not_kept_for_a_page(client: AsyncClient) -> None:
    for path in ("/v1/advisors/a1", "/schema/openapi.json", "/schema/assets/swagger-ui.css"):
        response = await client.get(path, headers=AUTH)
        assert (200, ["Origin"]) == (response.status_code, response.headers.get_list("vary"))


async def test_without_origins_in_the_settings_there_are_none(database_url: URL) -> None:
    async with serving(database_url) as client:
        answered = await client.get("/v1/advisors/a1", headers={"Origin": APP})
        del client.headers["Authorization"]
        asked = await preflight(client, APP)

    assert (200, 401) == (answered.status_code, asked.status_code)
    for response in (answered, asked):
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert "vary" not in response.headers
