"""How often one may call: the rate itself, and who is counted for what."""

from __future__ import annotations

from fractions import Fraction
from typing import cast

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient
from litestar.types import Scope
from sqlalchemy import event
from sqlalchemy.engine import URL, Engine

from talktime.api.app import create_app
from talktime.api.limits import BURST_SECONDS, COOKIES_MAX, SECOND_NS, Limits, Rate
from talktime.api.problems import Refusal
from talktime.api.tokens import wall_clock
from talktime.settings import RequestLimits, load_settings
from talktime.store.database import Database
from tests.api.conftest import CLOSED_PORT
from tests.api.requests import AUTH, KEY, problem_of
from tests.api.tokens import SECRET, VARIABLES, bearer, claims_for, live_token
from tests.web.server import COOKIE, SIGN_IN, console, page_of

REFUSED = "TALKTIME_REFUSED_REQUESTS_PER_SECOND"

ACCOUNT = "/v1/users/{}/account"


class Ticks:
    """A clock that the test moves, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 7 * SECOND_NS

    def __call__(self) -> int:
        return self.now


# --- the rate ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 2 * SECOND_NS), st.sampled_from("ab")), max_size=200),
)
def test_a_caller_has_a_bucket_that_holds_two_seconds_and_leaks_evenly(
    per_second: int, requests: list[tuple[int, str]]
) -> None:
    ticks = Ticks()
    rate = Rate(per_second, ticks=ticks)
    interval = -(-SECOND_NS // per_second)
    size = BURST_SECONDS * per_second
    level, seen_at = {"a": Fraction(0), "b": Fraction(0)}, dict.fromkeys("ab", ticks.now)
    for pause, caller in requests:
        ticks.now += pause
        level[caller] = max(Fraction(0), level[caller] - Fraction(ticks.now - seen_at[caller], interval))
        seen_at[caller] = ticks.now
        is_in = level[caller] + 1 <= size
        assert is_in == rate.take(caller)
        level[caller] += is_in


@pytest.mark.parametrize("per_second", [1, 3, 20, 10_000])
def test_who_waits_for_the_next_place_is_let_in_and_not_earlier(per_second: int) -> None:
    ticks = Ticks()
    rate = Rate(per_second, ticks=ticks)
    assert all(rate.take("a") for _ in range(2 * per_second))
    interval = -(-SECOND_NS // per_second)
    assert interval <= SECOND_NS  # what Retry-After says
    ticks.now += interval - 1
    assert not rate.take("a")
    ticks.now += 1
    assert rate.take("a")
    assert not rate.take("a")
    assert rate.take("b")


def test_callers_who_are_as_good_as_new_are_forgotten() -> None:
    ticks = Ticks()
    rate = Rate(10, ticks=ticks)
    for number in range(1000):
        rate.take(number)
        assert number + 1 == len(rate)
    ticks.now += SECOND_NS
    for number in range(1000):
        rate.take(("later", number))
    assert 1000 == len(rate)


def test_a_flood_of_callers_takes_no_more_memory_and_no_longer() -> None:
    rate = Rate(1, callers_max=100, ticks=Ticks())
    for number in range(10_000):
        assert rate.take(number)
        assert len(rate) <= 100
    # Who was heard last is remembered.
    assert rate.take(9_999)
    assert not rate.take(9_999)


def scope_of(address: str) -> Scope:
    return cast("Scope", {"client": (address, 50_000)})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),  # one machine's to choose
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("unix", "unix", True),
    ],
)
def test_addresses_that_one_client_can_choose_from_are_one(one: str, other: str, same: bool) -> None:  # noqa: FBT001
    limits = Limits(RequestLimits(per_user=None, per_service=None, refused=1), ticks=Ticks())
    for _ in range(2):
        limits.count_refused(scope_of(one))
    if same:
        with pytest.raises(Refusal):
            limits.count_refused(scope_of(other))
    else:
        limits.count_refused(scope_of(other))


# --- over HTTP, without a database: who passes is answered with 503 ---------------------------------------------------


def client_of(**variables: str) -> TestClient[Litestar]:
    named = {f"TALKTIME_{name}_REQUESTS_PER_SECOND": value for name, value in variables.items()}
    settings = load_settings({"TALKTIME_SERVICE_KEY": KEY, **VARIABLES, **named})
    return TestClient(create_app(settings, lambda: Database(CLOSED_PORT)))


def statuses(client: TestClient[Litestar], times: int, path: str, headers: dict[str, str]) -> list[int]:
    return [client.get(path, headers=headers).status_code for _ in range(times)]


def test_a_user_is_held_to_the_rate_over_all_tokens_and_others_go_on() -> None:
    with client_of(USER="1") as client:
        path = "/v1/users/u1/nothing"
        assert [404] == statuses(client, 1, path, bearer(live_token("u1")))  # not counted: there is no route
        path = "/v1/advisors/a1"  # not for users: that is found out later
        assert [403, 403, 429] == [
            client.get(path, headers=bearer(live_token("u1", jti=str(number)))).status_code for number in range(3)
        ]
        refused = client.get(ACCOUNT.format("u1"), headers=bearer(live_token("u1")))
        problem_of(refused, 429, "too-many-requests")
        assert refused.headers["retry-after"] == "1"
        assert [403, 403, 429] == statuses(client, 3, path, bearer(live_token("u2")))
        # An advisor is another caller, whatever the id.
        assert [403, 403, 429] == statuses(client, 3, path, bearer(live_token("u1", role="advisor")))
        assert [503] * 5 == statuses(client, 5, path, AUTH)


def test_a_user_may_do_what_a_page_does() -> None:
    with client_of() as client:
        # Four tabs on two devices, opened at once, each asking five times.
        assert [403] * 40 == statuses(client, 40, "/v1/advisors/a1", bearer(live_token("u1")))


def test_a_service_is_held_to_a_rate_only_if_there_is_one() -> None:
    with client_of() as client:
        assert {503} == set(statuses(client, 300, "/v1/advisors/a1", AUTH))
    with client_of(SERVICE="2") as client:
        assert [503] * 4 + [429] == statuses(client, 5, "/v1/advisors/a1", AUTH)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer a.b.c"}])
def test_those_without_a_credential_are_held_off_and_those_with_one_are_not(headers: dict[str, str]) -> None:
    with client_of(REFUSED="1") as client:
        assert [401, 401, 429] == statuses(client, 3, "/v1/advisors/a1", headers)
        problem = client.get("/v1/advisors/a1", headers=headers)
        problem_of(problem, 429, "too-many-requests")
        assert int(problem.headers["retry-after"]) >= 1
        assert [503] * 3 == statuses(client, 3, "/v1/advisors/a1", AUTH)
        assert [503] * 3 == statuses(client, 3, ACCOUNT.format("u1"), bearer(live_token("u1")))


def test_a_token_that_has_expired_is_no_guess_and_counts_for_its_user_alone() -> None:
    with client_of(REFUSED="1", USER="2") as client:
        old = [
            bearer(jwt.encode(claims_for(f"u{number}", at=wall_clock() - 3600), SECRET, algorithm="HS256"))
            for number in range(20)
        ]
        for headers in old:
            assert [401, 401, 401] == statuses(client, 3, "/v1/advisors/a1", headers)
        assert [401, 429] == statuses(client, 2, "/v1/advisors/a1", old[0])
        # They left what is for guesses untouched, and what is for the user: anybody may hold an old token.
        assert [401, 401, 429] == statuses(client, 3, "/v1/advisors/a1", {})
        assert 503 == statuses(client, 1, ACCOUNT.format("u0"), bearer(live_token("u0")))[0]


async def test_made_up_cookies_cost_no_query_each_and_keep_nobody_out(database_url: URL) -> None:
    asked = 0

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal asked
        asked += "console_session" in statement

    async with console(database_url, **{REFUSED: "5"}) as operator:
        event.listen(Engine, "before_cursor_execute", count)
        try:
            for number in range(100):
                cookie = {"Cookie": f"{COOKIE}=made-up-{number}"}
                answer = await operator.get("/console/users", headers=cookie)
                assert answer.status_code in (303, 429)
            assert 10 <= asked <= 15
            assert "Too many attempts" in page_of(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
            page_of(await operator.get("/console"))
        finally:
            event.remove(Engine, "before_cursor_execute", count)


async def test_signing_in_by_guessing_is_held_off_and_who_has_a_key_gets_in(database_url: URL) -> None:
    async with console(database_url, key=None, **{REFUSED: "1"}) as client:
        found = [(await client.post(SIGN_IN, data={"key": f"guess-{number}"})).status_code for number in range(4)]
        assert [403, 403, 429, 429] == found
        assert 303 == (await client.post(SIGN_IN, data={"key": KEY})).status_code
        page_of(await client.get("/console"))


def test_cookies_that_were_good_are_not_kept_without_end() -> None:
    limits = Limits(RequestLimits(per_user=None, per_service=None, refused=1), ticks=Ticks())
    for number in range(COOKIES_MAX + 10):
        limits.remember_cookie(f"c{number}")
    assert COOKIES_MAX == len(limits._cookies)
    limits.forget_cookie("c0")
    limits.forget_cookie(f"c{COOKIES_MAX + 9}")
    assert COOKIES_MAX - 1 == len(limits._cookies)


async def test_guesses_do_not_use_up_what_is_for_sessions_that_a_process_does_not_know(database_url: URL) -> None:
    async with console(database_url) as operator, console(database_url, key=None, **{REFUSED: "1"}) as restarted:
        for _ in range(5):
            guess = await restarted.get("/v1/advisors/a1", headers={"Authorization": "Bearer no-key"})
        problem_of(guess, 429, "too-many-requests")
        page_of(await restarted.get("/console", headers={"Cookie": f"{COOKIE}={operator.cookies[COOKIE]}"}))
