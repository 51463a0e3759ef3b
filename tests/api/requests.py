"""The routes under /v1, and how their answers are looked at."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

from httpx import ASGITransport, AsyncClient, Response
from litestar import Litestar

Json: TypeAlias = Any

KEY = "a-service-key-for-tests"
AUTH = {"Authorization": f"Bearer {KEY}"}

# Many tests ask more, and worse, than one caller may; test_limits.py is about that.
UNLIMITED = {f"TALKTIME_{who}_REQUESTS_PER_SECOND": "none" for who in ("USER", "REFUSED")}

CARD = {"credits_per_minute": "1.5", "free_seconds": 180}
CREDIT = {"kind": "purchase", "amount": "25"}
START = {"advisor_id": "a1"}
CHAT = "/v1/users/u1/chats/c1"
BEATS = {"beats": [{"user_id": "u1", "chat_id": "c1"}]}

# Each route with a request that is right.
ROUTES: list[tuple[str, str, Json]] = [
    ("PUT", "/v1/advisors/a1", CARD),
    ("GET", "/v1/advisors/a1", None),
    ("POST", "/v1/users/u1/credits", CREDIT),
    ("GET", "/v1/users/u1/account", None),
    ("GET", "/v1/users/u1/ledger", None),
    ("POST", f"{CHAT}/start", START),
    ("POST", f"{CHAT}/heartbeat", None),
    ("POST", "/v1/heartbeats", BEATS),
    ("POST", f"{CHAT}/pause", None),
    ("POST", f"{CHAT}/stop", None),
    ("GET", CHAT, None),
    ("GET", "/v1/users/u1/chats", None),
    ("GET", f"{CHAT}/segments", None),
]


def as_sent(app: Litestar) -> AsyncClient:
    """Return a client that sends headers as they are; Litestar's own joins those of one name."""
    return AsyncClient(transport=ASGITransport(app=cast("Any", app)), base_url="http://talktime.test")


def problem_of(response: Response, status: int, code: str) -> Json:
    """Check that this is a problem document of the kind, and return it."""
    body = response.json()
    assert (status, code) == (response.status_code, body["code"]), body
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert body["type"] == f"urn:talktime:problem:{code}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


def fault_of(response: Response) -> Json:
    """Check that one thing is wrong with the request, and return it."""
    [fault] = problem_of(response, 400, "invalid-input")["errors"]
    return fault
