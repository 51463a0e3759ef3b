"""The demo's own server: what a product has behind its page, and that it gives nothing to others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from httpx import AsyncClient
from litestar import Litestar

from talktime import operations
from talktime.api.tokens import mint
from talktime.meter.state import RateCard, Tariff
from talktime.settings import TokenSettings
from talktime.web import pages
from talktime.web.demo import Demo, demo_router, seed
from tests.api.requests import problem_of
from tests.api.server import serving
from tests.support import CREDIT, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

SECRET = "a secret of at least thirty-two bytes"
TOKENS = TokenSettings(
    algorithm="HS256", secret=SECRET.encode(), jwks=None, issuer="talktime", audience="talktime", leeway_s=10
)
VARIABLES = {"TALKTIME_TOKEN_SECRET": SECRET, "TALKTIME_TOKEN_ISSUER": "talktime"}


@asynccontextmanager
async def demo(url: URL) -> AsyncIterator[tuple[AsyncClient, dict[str, Any]]]:
    """Serve the demo over a seeded database; yields a client without a key, and a guest."""
    async with open_service(url) as service:
        await seed(service)
    async with serving(url, pages=pages(Demo(TOKENS)), **VARIABLES) as client:
        del client.headers["Authorization"]
        guest = (await client.post("/demo/guests")).raise_for_status().json()
        yield client, guest


def signed(guest: dict[str, Any], key: str = "k1") -> dict[str, str]:
    return {"Authorization": f"Bearer {guest['token']}", "Idempotency-Key": key}


async def test_a_guest_starts_pauses_and_ends_a_chat_and_tops_up(database_url: URL) -> None:
    async with demo(database_url) as (client, guest):
        headers = signed(guest)
        account = (await client.get(f"/v1/users/{guest['user_id']}/account", headers=headers)).json()
        started = (await client.post("/demo/advisors/theo-okafor/chats/c1/start", headers=headers)).json()
        paused = (await client.post("/demo/chats/c1/pause", headers=headers)).json()
        stopped = (await client.post("/demo/chats/c1/stop", headers=headers)).json()
        topped_up = [(await client.post("/demo/credits", headers=headers)).json() for _ in range(2)]

        assert "5.000000" == account["balance"]
        states = [(reading["user_id"], reading["state"]) for reading in (started, paused, stopped)]
        assert [(guest["user_id"], state) for state in ("running", "paused", "ended")] == states
        assert topped_up[0] == topped_up[1]
        assert ("purchase", "5.000000", "10.000000") == tuple(
            topped_up[0][name] for name in ("kind", "amount", "balance_after")
        )


async def test_a_guests_token_opens_nothing_of_another_and_gives_no_credits(database_url: URL) -> None:
    async with demo(database_url) as (client, guest):
        other = (await client.post("/demo/guests")).json()
        credit = {"kind": "purchase", "amount": "1000"}

        for method, path, body in (
            ("GET", f"/v1/users/{other['user_id']}/account", None),
            ("POST", f"/v1/users/{guest['user_id']}/credits", credit),
        ):
            problem_of(await client.request(method, path, json=body, headers=signed(guest)), 403, "forbidden")


@pytest.mark.parametrize("path", ["/demo/credits", "/demo/advisors/theo-okafor/chats/c1/start"])
async def test_a_token_of_somebody_who_is_no_guest_is_good_for_nothing_here(database_url: URL, path: str) -> None:
    async with demo(database_url) as (client, _):
        token = mint(TOKENS, "customer-7", seconds=60)
        problem_of(await client.post(path, headers=signed({"token": token})), 403, "forbidden")


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via"])
async def test_what_a_proxy_passes_on_is_refused(database_url: URL, header: str) -> None:
    async with demo(database_url) as (client, _):
        problem_of(await client.post("/demo/guests", headers={header: "203.0.113.9"}), 403, "forbidden")


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
async def test_pages_of_other_sites_make_no_guests(database_url: URL, headers: dict[str, str]) -> None:
    async with demo(database_url) as (client, _):
        problem_of(await client.post("/demo/guests", headers=headers), 403, "forbidden")


@pytest.mark.parametrize("user_id", ["u1", "guest-", "guest-0123456789abcdeg", "guest-0123456789abcdef0", "Guest-00"])
async def test_there_are_tokens_for_guests_alone(database_url: URL, user_id: str) -> None:
    async with demo(database_url) as (client, _):
        problem_of(await client.post(f"/demo/guests/{user_id}/token"), 403, "forbidden")


async def test_a_guest_gets_another_token(database_url: URL) -> None:
    async with demo(database_url) as (client, guest):
        again = (await client.post(f"/demo/guests/{guest['user_id']}/token")).json()

        assert guest["user_id"] == again["user_id"]
        response = await client.get(f"/v1/users/{again['user_id']}/account", headers=signed(again))
        assert 200 == response.status_code


ORDERS = ["/demo/advisors/theo-okafor/chats/c1/start", "/demo/chats/c1/pause", "/demo/chats/c1/stop", "/demo/credits"]


@pytest.mark.parametrize("path", ORDERS)
async def test_who_shows_no_token_gets_nothing(database_url: URL, path: str) -> None:
    async with demo(database_url) as (client, _):
        problem_of(await client.post(path, headers={"Idempotency-Key": "k"}), 401, "unauthorized")


def test_every_route_that_does_something_for_a_guest_is_tried_without_a_token() -> None:
    app = Litestar([demo_router(Demo(TOKENS))], openapi_config=None)
    orders = {route.path for route in app.routes if "POST" in getattr(route, "methods", ())}

    assert orders - {"/demo/guests", "/demo/guests/{user_id:str}/token"} == {
        path.replace("theo-okafor", "{advisor_id:str}").replace("c1", "{chat_id:str}") for path in ORDERS
    }


@pytest.mark.parametrize("host", ["talktime.example", "127.0.0.1.example", "localhost.example:8000", "10.0.0.1", ""])
@pytest.mark.parametrize("path", ["/", "/demo/advisors", "/demo/guests"])
async def test_a_name_from_elsewhere_that_leads_here_is_refused(database_url: URL, host: str, path: str) -> None:
    async with demo(database_url) as (client, _):
        method = "POST" if path == "/demo/guests" else "GET"
        problem_of(await client.request(method, path, headers={"Host": host}), 403, "forbidden")


@pytest.mark.parametrize("path", ["/demo/credits", "/demo/advisors/theo-okafor/chats/c1/start"])
async def test_what_must_not_happen_twice_needs_a_key(database_url: URL, path: str) -> None:
    async with demo(database_url) as (client, guest):
        headers = {"Authorization": f"Bearer {guest['token']}"}
        problem_of(await client.post(path, headers=headers), 400, "invalid-input")


async def test_the_page_asks_nobody_else(database_url: URL) -> None:
    async with demo(database_url) as (client, _):
        page = await client.get("/")

        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "//" not in page.text.replace("<!--", "").replace("http://www.w3.org", "")


async def test_a_database_in_use_is_left_alone(database_url: URL) -> None:
    async with open_service(database_url) as service:
        await operations.put_advisor(service, "own", RateCard(Tariff(CREDIT), 0))
        await seed(service)
        card, default = await operations.get_advisor(service, "mara-lindholm")

        assert default
        assert card == service.default_card


async def test_without_the_demo_the_front_door_leads_to_the_console(database_url: URL) -> None:
    async with serving(database_url, pages=pages()) as client:
        answer = await client.get("/")

        assert (303, "/console") == (answer.status_code, answer.headers["location"])
        problem_of(await client.post("/demo/guests"), 404, "not-found")
