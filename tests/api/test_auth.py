"""Who gets in, and that nobody learns anything outside."""

from __future__ import annotations

import pytest
from litestar import Litestar
from litestar.testing import TestClient
from sqlalchemy.engine import URL

from talktime.api.auth import Gate
from talktime.api.keyring import KeyRing
from talktime.api.limits import Limits
from talktime.keys import active_keys, digest_of, new_key, revoke_key
from talktime.settings import RequestLimits, UserMay
from talktime.store.database import Database
from tests.api.requests import AUTH, KEY, ROUTES, Json, as_sent, problem_of


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_every_route_asks_for_the_key(client: TestClient[Litestar], method: str, path: str, body: Json) -> None:
    response = client.request(method, path, json=body)

    problem_of(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == 'Bearer realm="talktime"'


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {KEY}",
        f"Bearer,{KEY}",
        "Bearer \u043a\u043b\u044e\u0447",
    ],
)
def test_a_wrong_credential_is_refused_and_not_repeated(client: TestClient[Litestar], value: str) -> None:
    response = client.get("/v1/advisors/a1", headers={b"Authorization": value.encode()})

    problem_of(response, 401, "unauthorized")
    assert KEY not in response.text


@pytest.mark.parametrize(
    ("value", "challenge"),
    [
        ("Bearer wrong", 'Bearer realm="talktime", error="invalid_token"'),
        ("bearer a.b.c", 'Bearer realm="talktime", error="invalid_token"'),
        ("Basic wrong", 'Bearer realm="talktime"'),
        ("Bearer ", 'Bearer realm="talktime"'),
    ],
)
def test_a_refusal_says_whether_there_was_a_credential_at_all(
    client: TestClient[Litestar], value: str, challenge: str
) -> None:
    response = client.get("/v1/advisors/a1", headers={"Authorization": value})

    assert (401, challenge) == (response.status_code, response.headers["www-authenticate"])


async def test_the_gate_finds_service_keys_and_their_names(database_url: URL) -> None:
    database = Database(database_url)
    try:
        key, revoked = [await new_key(database, name) for name in ("key", "revoked")]
        await revoke_key(database, "revoked")
        gate = Gate(
            KeyRing(KEY, lambda: active_keys(database)),
            None,
            UserMay.BEAT,
            Limits(RequestLimits(per_user=None, per_service=None, refused=None)),
        )
        given = [KEY, key, revoked, "", "other", f"{key}x", "a.b.c", "\u043a", "\ud800", "tt_\ud800"]
        found = [await gate.find_key(text) for text in given]
        names = [await gate.key_name(digest_of(text)) for text in (KEY, key, revoked, "other")]
    finally:
        await database.close()

    assert [digest_of(KEY), digest_of(key), *[None] * 8] == found
    assert ["environment", "key", None, None] == names


async def test_two_credentials_are_none(app: Litestar) -> None:
    header = ("Authorization", f"Bearer {KEY}")
    async with as_sent(app) as client:
        response = await client.get("/v1/advisors/a1", headers=[header, header])

    problem_of(response, 401, "unauthorized")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_word_may_be_written_in_any_case(client: TestClient[Litestar], scheme: str) -> None:
    problem_of(client.get("/v1/advisors/a1", headers={"Authorization": f"{scheme} {KEY}"}), 503, "unavailable")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/advisors/a%00"),
        ("GET", "/v1/advisors/a?x=1"),
        ("PUT", "/v1/advisors/a"),
        ("POST", "/v1/users/a%2Fchats/c1/stop"),
        ("GET", "/v1/users//chats/ledger"),
        ("OPTIONS", "/v1/advisors/a"),
    ],
)
def test_authentication_comes_before_everything_else(client: TestClient[Litestar], method: str, path: str) -> None:
    problem_of(client.request(method, path, content=b"{"), 401, "unauthorized")


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_a_valid_request_reaches_the_database(client: TestClient[Litestar], method: str, path: str, body: Json) -> None:
    response = client.request(method, path, json=body, headers={**AUTH, "Idempotency-Key": "k1"})

    problem_of(response, 503, "unavailable")
    assert response.headers["retry-after"] == "1"
