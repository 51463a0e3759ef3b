"""The console's door: signing in and out, what a session is good for, and how errors are told."""

from __future__ import annotations

import asyncio
from http.cookies import Morsel, SimpleCookie
from typing import Any

import pytest
from httpx import AsyncClient, Response
from litestar import Litestar
from sqlalchemy.engine import URL

from talktime import keys
from talktime.api.app import create_app
from talktime.api.keyring import READ_AGAIN_S
from talktime.settings import load_settings
from talktime.store.database import Database
from talktime.web import pages
from talktime.web.sessions import safe_target
from tests.api.conftest import CLOSED_PORT
from tests.api.requests import AUTH, KEY, as_sent
from tests.database import Clock, connect
from tests.support import S, open_service
from tests.web.server import COOKIE, SIGN_IN, console, field_of, page_of, text_of

HOUR = 3600 * S


def make_app() -> Litestar:
    return create_app(load_settings({"TALKTIME_SERVICE_KEY": KEY}), lambda: Database(CLOSED_PORT), pages=pages())


def console_routes() -> list[tuple[str, str]]:
    """Each route below /console as a method and a path, but the sign-in page's."""
    found = []
    for route in make_app().routes:
        if route.path.startswith("/console") and route.path != SIGN_IN:
            path = route.path
            for kind in ("user_id:str", "chat_id:str", "rest:path"):
                path = path.replace("{" + kind + "}", "x")
            found += [(method, path) for method in sorted(getattr(route, "methods", ())) if method != "OPTIONS"]
    return found


def cookie_of(response: Response) -> Morsel[str]:
    [header] = response.headers.get_list("set-cookie")
    return SimpleCookie(header)[COOKIE]


# --- signing in -------------------------------------------------------------------------------------------------------


async def test_who_has_a_service_key_signs_in_and_sees_the_overview(database_url: URL) -> None:
    async with console(database_url, key=None) as client:
        assert "Sign in to the console" in text_of(page_of(await client.get(SIGN_IN)))
        answer = await client.post(SIGN_IN, data={"key": f" {KEY} "})
        assert (303, "/console") == (answer.status_code, answer.headers["location"])
        assert "Running now" in text_of(page_of(await client.get("/console")))
        assert "<strong>environment</strong>" in (await client.get("/console")).text


async def test_the_cookie_is_kept_from_scripts_and_other_sites(database_url: URL) -> None:
    async with console(database_url, key=None) as client:
        plain = cookie_of(await client.post(SIGN_IN, data={"key": KEY}))
        behind_tls = cookie_of(await client.post(SIGN_IN, data={"key": KEY}, headers={"X-Forwarded-Proto": "https"}))
    assert ("/console", "strict", True, "28800", "", "") == (
        plain["path"],
        plain["samesite"].lower(),
        plain["httponly"],
        plain["max-age"],
        plain["domain"],
        plain["secure"],
    )
    assert behind_tls["secure"] is True
    assert len(plain.value) >= 43


@pytest.mark.parametrize("key", ["", "wrong", "tt_" + "x" * 43, KEY + "x", "a.b.c", "\udcff\x00"])
async def test_a_wrong_key_is_told_and_opens_nothing(database_url: URL, key: str) -> None:
    async with console(database_url, key=None) as client:
        form = {"key": key.encode("utf-8", "surrogateescape"), "next": "/console/passes"}
        refused = await client.post(SIGN_IN, data=form)
        html = page_of(refused, 403)
        assert "No such key is in force." in text_of(html)
        assert "/console/passes" == field_of(html, "next")
        assert "set-cookie" not in refused.headers
        assert 303 == (await client.get("/console")).status_code
    assert (0,) == _row(database_url, "SELECT count(*) FROM console_session")


async def test_only_digests_of_the_session_are_stored(database_url: URL) -> None:
    async with console(database_url) as client:
        token = client.cookies[COOKIE]
    digest, key_digest = _row(database_url, "SELECT digest, key_digest FROM console_session")
    assert (keys.digest_of(token), keys.digest_of(KEY)) == (digest, key_digest)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 303),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "none"}, 303),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "OURS"}, 403),
        ({"Origin": "http://OURS"}, 303),
        ({"Origin": "https://OURS"}, 303),
        ({"Origin": "http://OURS:1"}, 403),
        ({"Origin": "http://OURS.evil.example"}, 403),
    ],
)
async def test_another_site_cannot_sign_anybody_in(database_url: URL, headers: dict[str, str], status: int) -> None:
    async with console(database_url, key=None) as client:
        ours = client.base_url.netloc.decode()
        sent = {name: value.replace("OURS", ours) for name, value in headers.items()}
        answer = await client.post(SIGN_IN, data={"key": KEY}, headers=sent)
        assert (status, status == 303) == (answer.status_code, "set-cookie" in answer.headers)


async def test_signing_in_again_ends_the_session_before(database_url: URL) -> None:
    async with console(database_url) as client:
        before = client.cookies[COOKIE]
        await client.post(SIGN_IN, data={"key": KEY})
        client.cookies.delete(COOKIE)
        client.cookies.set(COOKIE, before)
        assert 303 == (await client.get("/console/passes")).status_code


async def test_behind_a_proxy_that_ends_tls_the_cookie_is_for_tls_alone(database_url: URL) -> None:
    async with console(database_url, key=None) as client:
        answer = await client.post(SIGN_IN, data={"key": KEY}, headers={"X-Forwarded-Proto": "https"})
        assert "; secure" in answer.headers["set-cookie"].lower()


# --- what a session is good for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), console_routes())
async def test_every_page_asks_for_a_session(database_url: URL, method: str, path: str) -> None:
    async with console(database_url, key=None) as client:
        # The API's bearer key, and made-up cookies, are no session.
        for extra in ({}, AUTH, {"Cookie": f"{COOKIE}=x"}, {"Cookie": f"{COOKIE}={KEY}"}):
            answer = await client.request(method, path, headers=extra)
            assert 303 == answer.status_code
            assert answer.headers["location"].startswith(SIGN_IN)
            assert "" == answer.text


def test_the_routes_that_are_tried_are_all_there_are() -> None:
    assert [
        ("GET", "/console"),
        ("GET", "/console/passes"),
        ("GET", "/console/users"),
        ("GET", "/console/users/x"),
        ("GET", "/console/users/x/chats/x"),
        ("GET", "/console/users/x/chats/x/x"),
        ("GET", "/console/users/x/x"),
        ("GET", "/console/x"),
        ("POST", "/console/sign-out"),
        ("POST", "/console/users/x/credits"),
    ] == sorted({(method, path.rstrip("/")) for method, path in console_routes()})


async def test_pages_are_not_part_of_the_api_description(database_url: URL) -> None:
    async with console(database_url) as client:
        paths = (await client.get("/schema/openapi.json")).json()["paths"]
    assert paths
    assert not [path for path in paths if path.startswith(("/console", "/assets", "/client"))]


async def test_signing_in_leads_back_to_the_page_that_was_asked_for(database_url: URL) -> None:
    async with console(database_url, key=None) as client:
        asked = await client.get("/console/users/a%7Cb%2B1?ledger=x&chats=y")
        html = page_of(await client.get(asked.headers["location"]))
        target = field_of(html, "next")
        assert "/console/users/a%7Cb%2B1?ledger=x&chats=y" == target
        answer = await client.post(SIGN_IN, data={"key": KEY, "next": target})
        assert target == answer.headers["location"]


@pytest.mark.parametrize(
    "target",
    [
        None,
        "",
        "https://evil.example/console",
        "//evil.example/console",
        "/console.evil.example",
        "/consolex",
        "/console/../v1/users/u",
        "/console/%2e%2e/v1/users/u",
        "/console/users/.%2E/../x",
        "/console\\..\\x",
        "/console/\r\nSet-Cookie: a=b",
        "/console/ü",
        "javascript:alert(1)",
        "/v1/users/u",
    ],
)
def test_a_target_elsewhere_becomes_the_overview(target: str | None) -> None:
    assert "/console" == safe_target(target)


@pytest.mark.parametrize("target", ["/console", "/console/passes", "/console?x=y", "/console/users/u%7C1?ledger=a.."])
def test_a_target_in_the_console_is_kept(target: str) -> None:
    assert target == safe_target(target)


async def test_a_revoked_key_ends_the_sessions_it_opened(database_url: URL) -> None:
    async with open_service(database_url) as service:
        key = await keys.new_key(service.database, "anna")
        async with console(database_url, key=key) as client:
            assert "<strong>anna</strong>" in page_of(await client.get("/console"))
            await keys.revoke_key(service.database, "anna")
            await asyncio.sleep(READ_AGAIN_S + 0.1)
            assert 303 == (await client.get("/console")).status_code
            assert 403 == (await client.post(SIGN_IN, data={"key": key})).status_code


async def test_a_session_ends_after_eight_hours(database_url: URL, clock: Clock) -> None:
    async with console(database_url) as client:
        clock.tick(8 * HOUR - 1)
        assert 200 == (await client.get("/console")).status_code
        clock.tick(1)
        assert 303 == (await client.get("/console")).status_code


async def test_signing_out_ends_the_session_for_good(database_url: URL) -> None:
    async with console(database_url) as client:
        token = client.cookies[COOKIE]
        csrf = field_of(page_of(await client.get("/console")), "csrf")
        answer = await client.post("/console/sign-out", data={"csrf": csrf})
        assert (303, SIGN_IN) == (answer.status_code, answer.headers["location"])
        assert ("0", "") == (cookie_of(answer)["max-age"], cookie_of(answer).value)
        assert COOKIE not in client.cookies
        again = await client.get("/console", headers={"Cookie": f"{COOKIE}={token}"})
        assert 303 == again.status_code


@pytest.mark.parametrize("csrf", [None, "", "0" * 64, "\udcff", "of another session"])
@pytest.mark.parametrize("path", ["/console/sign-out", "/console/users/u/credits"])
async def test_a_form_without_the_sessions_token_changes_nothing(
    database_url: URL, csrf: str | None, path: str
) -> None:
    async with console(database_url) as client:
        mine = client.cookies[COOKIE]
        if csrf == "of another session":
            client.cookies.clear()  # it would end the one that is there
            await client.post(SIGN_IN, data={"key": KEY})
            csrf = field_of(page_of(await client.get("/console")), "csrf")
            client.cookies.clear()
            client.cookies.set(COOKIE, mine, path="/console")
        form = {"kind": "grant", "amount": "5", "reason": "r", "key": "console-x"}
        if csrf is not None:
            form["csrf"] = csrf
        refused = await client.post(
            path, data={name: value.encode("utf-8", "surrogateescape") for name, value in form.items()}
        )
        assert "This is not allowed" in text_of(page_of(refused, 403))
        assert 200 == (await client.get("/console")).status_code
    assert (0,) == _row(database_url, "SELECT count(*) FROM ledger_entry")


async def test_what_is_no_form_is_refused(database_url: URL) -> None:
    async with console(database_url) as client:
        for body in (b"\xff\xfe", b"&".join(b"a=%d" % n for n in range(99))):
            answer = await client.post(
                "/console/sign-out", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"}
            )
            page_of(answer, 400)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/console/nothing",
        "/console/nothing/at/all",
        "/console/users/u/nothing",
        "/console/users/u/chats/c/nothing",
        "/console/users/nobody",
        "/console/users/no%20id",
        "/console/users/u/chats/c",
        "/console/users/u/chats/%3Cscript%3E",
    ],
)
async def test_what_is_not_there_is_a_page_that_says_so(database_url: URL, path: str) -> None:
    async with console(database_url) as client:
        html = page_of(await client.get(path), 404)
        assert "There is no such page" in text_of(html)
        assert "<script>" not in html


@pytest.mark.parametrize("query", ["ledger=x", "chats=x", "ledger=Y2hhdHM6MQ"])
async def test_a_place_that_is_none_is_a_page_that_says_so(database_url: URL, query: str) -> None:
    async with console(database_url) as client:
        await client.post(
            "/v1/users/u/credits",
            json={"kind": "grant", "amount": "1"},
            headers={**AUTH, "Idempotency-Key": "k"},
        )
        assert "This is not understood" in text_of(page_of(await client.get(f"/console/users/u?{query}"), 400))


async def test_without_a_database_a_page_says_so_and_when_to_try_again() -> None:
    client: AsyncClient
    app = make_app()
    async with app.lifespan(), as_sent(app) as client:
        assert "Sign in" in text_of(page_of(await client.get(SIGN_IN)))
        for answer in (
            await client.get("/console", headers={"Cookie": f"{COOKIE}=x"}),
            await client.post(SIGN_IN, data={"key": KEY}),
        ):
            assert "The database does not answer" in text_of(page_of(answer, 503))
            assert "1" == answer.headers["retry-after"]


async def test_an_unexpected_error_is_logged_and_the_page_tells_nothing(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    async with console(database_url) as client:
        with connect(database_url) as connection:
            connection.execute("INSERT INTO reconciler_pass VALUES ('x', now(), 1, 1, 1, 1, 1)")
            connection.execute("ALTER TABLE reconciler_pass ALTER COLUMN took_us TYPE text USING 'much'")
        html = page_of(await client.get("/console/passes"), 500)
    assert "Something went wrong on our side It has been logged." in text_of(html)
    assert "unexpected error in GET /console/passes" in caplog.messages


def _row(url: URL, query: str) -> tuple[Any, ...]:
    with connect(url) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return tuple(row)
