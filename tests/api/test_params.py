"""Whatever is wrong with a path, a query or a header is said before anything reaches the database."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient

from talktime.api.params import (
    is_id,
    read_chats_cursor,
    read_cursor,
    write_chats_cursor,
    write_cursor,
)
from talktime.meter.units import END_OF_TIME_US
from tests.api.requests import AUTH, CHAT, CREDIT, ROUTES, START, Json, as_sent, fault_of, problem_of

KEYED = {**AUTH, "Idempotency-Key": "k1"}
LONG = "x" * 128


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["u", LONG, "Az09-_.:@+=~|", "...", ".a", "a..b", "~", "0"])
def test_ids_are_taken_percent_encoded(client: TestClient[Litestar], text: str) -> None:
    path = f"/v1/users/{quote(text, safe='')}/chats/{quote(text, safe='')}"

    problem_of(client.get(path, headers=AUTH), 503, "unavailable")


@pytest.mark.parametrize(
    "encoded",
    [
        "%2E",
        "%2E%2E",
        LONG + "x",
        "a%20b",
        "a%00",
        "%00",
        "a%0A",
        "%0Aa",
        "%C3%A9",
        "%FF",
        "a%25b",
        "a%5Cb",
        "a*",
        "a%3Fb",
    ],
)
@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/v1/advisors/{}", "advisor_id"),
        ("/v1/users/{}/account", "user_id"),
        ("/v1/users/{}/chats/c1", "user_id"),
        ("/v1/users/u1/chats/{}", "chat_id"),
    ],
)
def test_what_is_no_id_is_refused(client: TestClient[Litestar], path: str, parameter: str, encoded: str) -> None:
    fault = fault_of(client.get(path.format(encoded), headers=AUTH))

    assert fault["parameter"] == parameter
    assert "1 to 128 characters" in fault["detail"]


@pytest.mark.parametrize("slash", ["%2F", "%2f"])
@pytest.mark.parametrize(
    "path",
    ["/v1/users/u1/chats/c1{}start", "/v1/users/u1{}chats/c1/start", "/v1/users/a{}b/chats/c1/start", "/v1/users/{}/x"],
)
def test_an_encoded_slash_does_not_lead_elsewhere(client: TestClient[Litestar], path: str, slash: str) -> None:
    fault = fault_of(client.post(path.format(slash), headers=AUTH, json=START))

    assert fault == {"detail": "must not hold an encoded slash", "parameter": "path"}


def test_each_wrong_id_is_named(client: TestClient[Litestar]) -> None:
    body = problem_of(client.get("/v1/users/a%20/chats/b%20", headers=AUTH), 400, "invalid-input")

    assert [fault["parameter"] for fault in body["errors"]] == ["user_id", "chat_id"]


# --- idempotency keys -------------------------------------------------------------------------------------------------


def test_a_credit_must_have_a_key(client: TestClient[Litestar]) -> None:
    fault = fault_of(client.post("/v1/users/u1/credits", headers=AUTH, json=CREDIT))

    assert fault == {"detail": "is required", "header": "Idempotency-Key"}


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/users/u1/credits", CREDIT), (f"{CHAT}/start", START)], ids=["credits", "start"]
)
@pytest.mark.parametrize("key", [b"", b"x" * 256, b"a\tb", "\u043a".encode(), b"a\x7f"])
def test_keys_are_printable_ascii(client: TestClient[Litestar], path: str, body: Json, key: bytes) -> None:
    fault = fault_of(client.post(path, headers=[*_encoded(AUTH), (b"Idempotency-Key", key)], json=body))

    assert fault == {"detail": "must be 1 to 255 printable ASCII characters", "header": "Idempotency-Key"}


async def test_two_keys_are_none(app: Litestar) -> None:
    headers = [*AUTH.items(), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    async with as_sent(app) as client:
        fault = fault_of(await client.post("/v1/users/u1/credits", headers=headers, json=CREDIT))

    assert fault == {"detail": "is given twice", "header": "Idempotency-Key"}


@pytest.mark.parametrize("key", ["k", "x" * 255, "a b", "~!@#$%^&*()"])
def test_a_start_may_have_a_key(client: TestClient[Litestar], key: str) -> None:
    response = client.post(f"{CHAT}/start", headers={**AUTH, "Idempotency-Key": key}, json=START)

    problem_of(response, 503, "unavailable")


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_unknown_query_parameters_are_refused(client: TestClient[Litestar], method: str, path: str, body: Json) -> None:
    fault = fault_of(client.request(method, path, headers=KEYED, json=body, params={"page": "2"}))

    assert fault == {"detail": "is not known here", "parameter": "page"}


LISTS = ["/v1/users/u1/ledger", "/v1/users/u1/chats", f"{CHAT}/segments"]


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("limit", ["0", "-1", "201", "", "x", "1.5", "1e1", "9" * 30, "null", "true"])
def test_limits_are_1_to_200(client: TestClient[Litestar], path: str, limit: str) -> None:
    fault = fault_of(client.get(path, headers=AUTH, params={"limit": limit}))

    assert fault["parameter"] == "limit"
    assert fault["detail"].startswith("must be an integer")


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("limit", ["1", "200"])
def test_the_limits_of_limits_are_limits(client: TestClient[Litestar], path: str, limit: str) -> None:
    problem_of(client.get(path, headers=AUTH, params={"limit": limit}), 503, "unavailable")


@pytest.mark.parametrize("path", LISTS)
def test_a_parameter_given_twice_is_refused(client: TestClient[Litestar], path: str) -> None:
    fault = fault_of(client.get(f"{path}?limit=5&limit=5", headers=AUTH))

    assert fault == {"detail": "is given twice", "parameter": "limit"}


@pytest.mark.parametrize("state", ["", "Running", "null", "running,paused", "x"])
def test_states_are_known_ones(client: TestClient[Litestar], state: str) -> None:
    fault = fault_of(client.get("/v1/users/u1/chats", headers=AUTH, params={"state": state}))

    assert fault == {
        "detail": "must be one of running, lapsed, paused, exhausted, abandoned, ended",
        "parameter": "state",
    }


@pytest.mark.parametrize("state", ["running", "lapsed", "paused", "exhausted", "abandoned", "ended"])
def test_every_state_can_be_asked_for(client: TestClient[Litestar], state: str) -> None:
    problem_of(client.get("/v1/users/u1/chats", headers=AUTH, params={"state": state}), 503, "unavailable")


def _cursor(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "null",
        "garbage",
        "=",
        "é",
        "a" * 5_000,
        _cursor("other:5"),
        _cursor("ledger:"),
        _cursor("ledger:x"),
        _cursor("ledger:" + "9" * 19),
        _cursor("segments:5\n"),
        _cursor("segments:٣"),
        _cursor("chats:5"),
        _cursor("chats:5:"),
        _cursor("chats:5:.."),
        _cursor("chats:5:a/b"),
        _cursor("chats:5:a\n"),
        _cursor("ledger:5") + "=",
        _cursor("ledger:5") + "\n",
    ],
)
def test_cursors_are_those_that_were_given_out(client: TestClient[Litestar], path: str, cursor: str) -> None:
    fault = fault_of(client.get(path, headers=AUTH, params={"cursor": cursor}))

    assert fault["parameter"] == "cursor"


@pytest.mark.parametrize(
    ("path", "cursor"),
    [
        (LISTS[0], write_cursor("ledger", 5)),
        (LISTS[1], write_chats_cursor((5, "c:1"))),
        (LISTS[2], write_cursor("segments", 5)),
    ],
)
def test_cursors_are_taken_by_their_own_list(client: TestClient[Litestar], path: str, cursor: str) -> None:
    problem_of(client.get(path, headers=AUTH, params={"cursor": cursor}), 503, "unavailable")
    for other in set(LISTS) - {path}:
        assert fault_of(client.get(other, headers=AUTH, params={"cursor": cursor}))["parameter"] == "cursor"


INSTANTS = st.integers(0, END_OF_TIME_US)
IDS = st.from_regex(r"[A-Za-z0-9\-_.:@+=~|]{1,128}", fullmatch=True).filter(is_id)


@given(INSTANTS, IDS)
def test_cursors_are_read_as_they_were_written(at: int, chat_id: str) -> None:
    assert at == read_cursor("segments", write_cursor("segments", at))
    assert (at, chat_id) == read_chats_cursor(write_chats_cursor((at, chat_id)))
    assert write_cursor("ledger", None) is write_chats_cursor(None) is None


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/v1/users/u1/chats", "chats:999999999999999999:a"),
        ("/v1/users/u1/chats", "chats:-1:a"),
        ("/v1/users/u1/chats/c1/segments", "segments:999999999999999999"),
        ("/v1/users/u1/chats/c1/segments", "segments:-1"),
    ],
)
def test_a_cursor_beyond_the_calendar_is_refused(client: TestClient[Litestar], path: str, key: str) -> None:
    cursor = urlsafe_b64encode(key.encode()).decode().rstrip("=")
    assert fault_of(client.get(path, headers=AUTH, params={"cursor": cursor}))["parameter"] == "cursor"


@pytest.mark.parametrize("path", ["/v1/users//chats/ledger", "/v1//advisors/a1", "/v1/users/u1/chats//segments"])
def test_a_path_with_an_empty_part_is_refused(client: TestClient[Litestar], path: str) -> None:
    assert fault_of(client.get(path, headers=AUTH))["parameter"] == "path"
