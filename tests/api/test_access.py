"""Who may do what: every route with every kind of caller, and that nobody learns what is not for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from httpx import AsyncClient, Response
from litestar import Litestar
from litestar.routes import HTTPRoute
from sqlalchemy.engine import URL

from talktime.api import keyring
from talktime.keys import new_key, revoke_key
from talktime.store.database import Database
from tests.api.requests import BEATS, CARD, CHAT, CREDIT, KEY, START, Json, problem_of
from tests.api.server import json_of, serving
from tests.api.test_routes import stored
from tests.api.tokens import VARIABLES, bearer, live_token
from tests.database import Clock
from tests.support import S

# --- what is expected -------------------------------------------------------------------------------------------------

SETTINGS = ("read", "beat", "control")


@dataclass(frozen=True, slots=True)
class Rule:
    """A route: a body that is right, the status of success, from which setting on users may, whether advisors may."""

    body: Json = None
    success: int = 200
    users: str | None = None
    advisors: bool = False


_CHAT = "/v1/users/{user_id:str}/chats/{chat_id:str}"
RULES = {
    ("PUT", "/v1/advisors/{advisor_id:str}"): Rule(CARD),
    ("GET", "/v1/advisors/{advisor_id:str}"): Rule(),
    ("POST", "/v1/users/{user_id:str}/credits"): Rule(CREDIT, 201),
    ("GET", "/v1/users/{user_id:str}/account"): Rule(users="read"),
    ("GET", "/v1/users/{user_id:str}/ledger"): Rule(users="read"),
    ("GET", "/v1/users/{user_id:str}/chats"): Rule(users="read"),
    ("GET", _CHAT): Rule(users="read", advisors=True),
    ("GET", f"{_CHAT}/segments"): Rule(users="read"),
    ("POST", f"{_CHAT}/heartbeat"): Rule(users="beat"),
    ("POST", "/v1/heartbeats"): Rule(BEATS),
    ("POST", f"{_CHAT}/start"): Rule(START, users="control"),
    ("POST", f"{_CHAT}/pause"): Rule(users="control"),
    ("POST", f"{_CHAT}/stop"): Rule(users="control"),
}
"""All that is routed under /v1. A route that is not here fails the tests."""


def routed(app: Litestar) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        if isinstance(route, HTTPRoute) and route.path.startswith("/v1"):
            for method in route.methods:
                yield method, route.path


def path_of(template: str) -> str:
    """Fill in who and what a test's data are about."""
    for name, value in (("user_id", "u1"), ("chat_id", "c1"), ("advisor_id", "a1")):
        template = template.replace(f"{{{name}:str}}", value)
    assert "{" not in template
    return template


def test_every_route_has_its_rule(app: Litestar) -> None:
    assert set(RULES) == {(method, path) for method, path in routed(app) if method != "OPTIONS"}


# --- callers ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class World:
    """The API over a database with a chat of u1 with a1, and a key that is in force and one that was revoked."""

    client: AsyncClient
    key: str
    revoked: str
    callers: dict[str, dict[str, str]] = field(default_factory=dict)

    async def send(self, caller: str, method: str, path: str, body: Json = None) -> Response:
        # A key of its own for each credit; the other routes pay no heed to it.
        headers = {"Idempotency-Key": f"{caller} {method} {path}", **self.callers[caller]}
        return await self.client.request(method, path, headers=headers, json=body)


SERVICES = ("environment", "database")
UNKNOWN = ("nobody", "unknown key", "revoked key", "unknown word", "expired", "forged")
STRANGERS = ("other user", "other advisor", "unknown role", "advisor named as the user")


@asynccontextmanager
async def world(url: URL, **variables: str) -> AsyncIterator[World]:
    database = Database(url)
    try:
        key, revoked = [await new_key(database, name) for name in ("key", "revoked")]
        await revoke_key(database, "revoked")
    finally:
        await database.close()
    async with serving(url, **VARIABLES, **variables) as client:
        for path, body in ((f"{CHAT}/start", START), ("/v1/users/u2/chats/c2/start", {"advisor_id": "a2"})):
            json_of(await client.post(path, json=body))
        del client.headers["Authorization"]
        yield World(
            client,
            key,
            revoked,
            {
                "environment": bearer(KEY),
                "database": bearer(key),
                "nobody": {},
                "unknown key": bearer(key[:-1] + ("A" if key[-1] != "A" else "B")),
                "revoked key": bearer(revoked),
                "unknown word": bearer("some-word"),
                "expired": bearer(live_token("u1", exp=1)),
                "forged": bearer(live_token("u1")[:-2]),
                "user": bearer(live_token("u1")),
                "advisor": bearer(live_token("a1", role="advisor")),
                "other user": bearer(live_token("u2")),
                "other advisor": bearer(live_token("a2", role="advisor")),
                "unknown role": bearer(live_token("u1", role="service")),
                "advisor named as the user": bearer(live_token("u1", role="advisor")),
            },
        )


def expected_status(caller: str, rule: Rule, user_may: str) -> int:
    if caller in UNKNOWN:
        return 401
    allowed = (
        caller in SERVICES
        or (caller == "user" and rule.users is not None and SETTINGS.index(rule.users) <= SETTINGS.index(user_may))
        or (caller == "advisor" and rule.advisors)
    )
    return rule.success if allowed else 403


@pytest.mark.parametrize("user_may", SETTINGS)
async def test_every_route_with_every_caller(database_url: URL, app: Litestar, user_may: str) -> None:
    async with world(database_url, TALKTIME_USER_MAY=user_may) as there:
        assert {*SERVICES, *UNKNOWN, *STRANGERS, "user", "advisor"} == set(there.callers)
        expected, found = {}, {}
        for method, template in routed(app):
            rule = RULES.get((method, template), Rule(success=204))  # OPTIONS, with no rule, is for services
            for caller in there.callers:
                # So that who may beat finds a clock that can be kept running.
                json_of(await there.client.post(f"{CHAT}/start", headers=bearer(KEY), json=START))
                response = await there.send(caller, method, path_of(template), rule.body)
                case = f"{caller}: {method} {template}"
                expected[case] = expected_status(caller, rule, user_may)
                found[case] = response.status_code
                assert KEY not in response.text
                assert there.key not in response.text
                if response.status_code >= 400:
                    code = {401: "unauthorized", 403: "forbidden"}[response.status_code]
                    problem_of(response, response.status_code, code)
    assert expected == found
    assert len(expected) > 250


@pytest.mark.parametrize("caller", STRANGERS)
async def test_who_is_forbidden_changes_nothing(database_url: URL, app: Litestar, caller: str) -> None:
    async with world(database_url, TALKTIME_USER_MAY="control") as there:
        before = stored(database_url)
        for (method, template), rule in RULES.items():
            assert 403 == (await there.send(caller, method, path_of(template), rule.body)).status_code
    assert before == stored(database_url)


# --- what nobody learns -----------------------------------------------------------------------------------------------

# Of somebody else: what there is, and what there is not.
OTHERS = [
    ("GET", "/v1/users/u2/account", "/v1/users/u9/account"),
    ("GET", "/v1/users/u2/ledger", "/v1/users/u9/ledger"),
    ("GET", "/v1/users/u2/chats", "/v1/users/u9/chats"),
    ("GET", "/v1/users/u2/chats/c2", "/v1/users/u2/chats/c9"),
    ("GET", "/v1/users/u2/chats/c2", "/v1/users/u9/chats/c9"),
    ("GET", "/v1/users/u2/chats/c2/segments", "/v1/users/u2/chats/c9/segments"),
    ("POST", "/v1/users/u2/chats/c2/heartbeat", "/v1/users/u2/chats/c9/heartbeat"),
    ("POST", "/v1/users/u2/chats/c2/pause", "/v1/users/u9/chats/c9/pause"),
    ("POST", "/v1/users/u2/chats/c2/start", "/v1/users/u9/chats/c9/start"),
    ("GET", "/v1/advisors/a1", "/v1/advisors/a9"),
]


def told(response: Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """Return all that an answer tells, but when it was given and to which request."""
    headers = [(name, value) for name, value in response.headers.items() if name not in ("date", "x-request-id")]
    return response.status_code, response.content, headers


@pytest.mark.parametrize("caller", ["user", "advisor", "unknown role", "nobody", "revoked key"])
async def test_a_refusal_does_not_tell_whether_a_thing_exists(database_url: URL, caller: str) -> None:
    async with world(database_url, TALKTIME_USER_MAY="control") as there:
        for method, there_is, there_is_not in OTHERS:
            one, other = [await there.send(caller, method, path) for path in (there_is, there_is_not)]
            assert (401 if caller in UNKNOWN else 403) == one.status_code, there_is
            assert told(one) == told(other), there_is


UNFIT: list[tuple[str, str, bytes | None]] = [
    ("GET", "/v1/users/u2/chats/c%00", None),
    ("GET", "/v1/users/u2/account?x=1", None),
    ("GET", "/v1/users/u2/chats?limit=0", None),
    ("POST", "/v1/users/u2/credits", b"{"),
    ("POST", "/v1/users/u2/chats/c2/start", b"x" * 2_000_000),
    ("GET", "/v1/users//chats/ledger", None),
    ("GET", "/v1/users/u2%2Fchats/c2", None),
    ("PUT", "/v1/advisors/a%20", b"{"),
]


@pytest.mark.parametrize("caller", ["user", "unknown role"])
async def test_who_may_not_is_told_so_before_anything_is_looked_at(database_url: URL, caller: str) -> None:
    async with world(database_url) as there:
        for method, path, content in UNFIT:
            response = await there.client.request(method, path, headers=there.callers[caller], content=content)
            problem_of(response, 403, "forbidden")


async def test_what_is_the_users_own_is_looked_at_as_it_is_for_services(database_url: URL) -> None:
    async with world(database_url) as there:
        for path, status, code in [
            ("/v1/users/u1/chats/c%00", 400, "invalid-input"),
            ("/v1/users/u1%2Fchats/c1", 400, "invalid-input"),
            ("/v1/users/u1/ledger?limit=0", 400, "invalid-input"),
            ("/v1/users/u1/chats/c9", 404, "chat-not-found"),
        ]:
            problem_of(await there.send("user", "GET", path), status, code)


@pytest.mark.parametrize("encoded", ["%75%31", "u%31"])
async def test_a_user_is_recognized_in_a_percent_encoded_path(database_url: URL, encoded: str) -> None:
    async with world(database_url) as there:
        assert "u1" == json_of(await there.send("user", "GET", f"/v1/users/{encoded}/account"))["user_id"]
        problem_of(await there.send("other user", "GET", f"/v1/users/{encoded}/account"), 403, "forbidden")


# --- paths that there are not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", ["nobody", "unknown key", "other user", "environment"])
async def test_which_paths_there_are_is_no_secret(database_url: URL, caller: str) -> None:
    async with world(database_url) as there:
        for method, path, status, code in [
            ("GET", "/v1/nowhere", 404, "not-found"),
            ("GET", "/v1/users/u1", 404, "not-found"),
            ("DELETE", CHAT, 405, "method-not-allowed"),
            ("HEAD", CHAT, 405, None),
            ("GET", "/v1/users/a%2Fb/account", 400, "invalid-input"),
            ("GET", "/v1//users/u1", 400, "invalid-input"),
        ]:
            response = await there.send(caller, method, path)
            assert status == response.status_code, path
            if code is not None:
                problem_of(response, status, code)
        allowed = (await there.send(caller, "DELETE", CHAT)).headers["allow"]
        assert {"GET", "OPTIONS"} == set(allowed.split(", "))


# --- advisors ---------------------------------------------------------------------------------------------------------


async def test_an_advisor_sees_the_clock_and_not_the_purse(database_url: URL) -> None:
    async with world(database_url, TALKTIME_FREE_SECONDS="0") as there:
        await there.send("environment", "POST", "/v1/users/u1/credits", CREDIT)
        started = json_of(await there.send("environment", "POST", f"{CHAT}/start", START))
        advisor, user = [json_of(await there.send(caller, "GET", CHAT)) for caller in ("advisor", "user")]
    hidden = {"balance", "exhausts_at", "materialized_through"}
    moving = {"as_of", "server_time", "elapsed_us", "count_us", "credits_used", "paid_from"} | hidden

    assert (True, "25.000000") == (started["accruing"], started["balance"])
    assert hidden == {name for name in advisor if advisor[name] is None and user[name] is not None}
    assert list(user) == list(advisor)
    assert {name: user[name] for name in user if name not in moving} == {
        name: advisor[name] for name in advisor if name not in moving
    }


async def test_an_advisor_reads_no_chat_of_another(database_url: URL) -> None:
    async with world(database_url) as there:
        for path in ("/v1/users/u2/chats/c2", "/v1/users/u1/chats/c2", "/v1/users/u9/chats/c1"):
            problem_of(await there.send("advisor", "GET", path), 403, "forbidden")
        json_of(await there.send("other advisor", "GET", "/v1/users/u2/chats/c2"))


# --- users ------------------------------------------------------------------------------------------------------------


async def test_a_user_starts_a_chat_that_there_is(database_url: URL) -> None:
    async with world(database_url, TALKTIME_USER_MAY="control") as there:
        assert "ended" == json_of(await there.send("user", "POST", f"{CHAT}/stop"))["state"]
        problem = problem_of(await there.send("user", "POST", f"{CHAT}/heartbeat"), 409, "chat-not-active")
        assert "ended" == problem["reading"]["state"]
        again = json_of(await there.send("user", "POST", f"{CHAT}/start", START))

    assert ("running", 3) == (again["state"], again["revision"])


@pytest.mark.parametrize(("caller", "user"), [("user", "u1"), ("new user", "u9")])
async def test_a_user_makes_no_chat(database_url: URL, caller: str, user: str) -> None:
    async with world(database_url, TALKTIME_USER_MAY="control") as there:
        there.callers["new user"] = bearer(live_token("u9"))
        before = stored(database_url)
        response = await there.send(caller, "POST", f"/v1/users/{user}/chats/c9/start", START)

    problem_of(response, 404, "chat-not-found")
    assert before == stored(database_url)


async def test_a_user_does_not_choose_the_advisor(database_url: URL) -> None:
    async with world(database_url, TALKTIME_USER_MAY="control") as there:
        before = stored(database_url)
        response = await there.send("user", "POST", f"{CHAT}/start", {"advisor_id": "a2"})

    problem_of(response, 409, "wrong-advisor")
    assert before == stored(database_url)


async def test_a_users_heartbeat_keeps_the_clock_running(clock: Clock, database_url: URL) -> None:
    async with world(database_url) as there:
        for _ in range(4):
            clock.tick(14 * S)
            beat = json_of(await there.send("user", "POST", f"{CHAT}/heartbeat"))
    assert ("running", 56 * S) == (beat["state"], beat["elapsed_us"])


# --- keys that come and go --------------------------------------------------------------------------------------------


async def test_a_new_key_opens_at_once_and_a_revoked_one_soon_no_more(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "READ_AGAIN_S", 0)
    database = Database(database_url)
    try:
        async with serving(database_url, TALKTIME_SERVICE_KEY="") as client:
            keys = [await new_key(database, name) for name in ("one", "two")]
            statuses: list[list[int]] = []
            for name in ("one", "two", None):
                statuses.append([(await client.get("/v1/advisors/a1", headers=bearer(k))).status_code for k in keys])
                if name is not None:
                    await revoke_key(database, name)
    finally:
        await database.close()
    assert [[200, 200], [401, 200], [401, 401]] == statuses


async def test_a_key_of_the_database_is_refused_as_unavailable_where_it_cannot_be_asked_for() -> None:
    url: Any = "postgresql+psycopg://nobody:nothing@127.0.0.1:1/nowhere"
    async with serving(url, **VARIABLES) as client:
        problem_of(await client.get("/v1/advisors/a1", headers=bearer("tt_some-key")), 503, "unavailable")
        problem_of(await client.get("/v1/advisors/a1", headers=bearer("some-key")), 401, "unauthorized")
        problem_of(await client.get("/v1/advisors/a1", headers=bearer("a.b.c")), 401, "unauthorized")
        problem_of(await client.get("/v1/advisors/a1", headers=bearer(live_token("u1"))), 403, "forbidden")
