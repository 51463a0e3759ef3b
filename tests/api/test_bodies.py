"""Whatever is wrong with a body is said, with its place, before anything reaches the database."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient

from talktime.api.bodies import AdvisorBody, CreditBody, StartBody, decode_body
from talktime.api.problems import FAULTS_MAX, Refusal
from talktime.meter.state import RateCard, Tariff
from talktime.meter.units import MICRO
from tests.api.requests import AUTH, CARD, CHAT, CREDIT, START, Json, fault_of, problem_of

KEYED = {**AUTH, "Idempotency-Key": "k1"}
JSON = {"Content-Type": "application/json"}
LONG = "x" * 128

PATHS_WITH_BODY = [
    ("PUT", "/v1/advisors/a1", CARD),
    ("POST", "/v1/users/u1/credits", CREDIT),
    ("POST", f"{CHAT}/start", START),
]


@pytest.mark.parametrize("value", [".", "..", "", "a b", "a/b", "a\x00", "é", LONG + "x", "a\n", 5, None, ["a"]])
def test_an_advisor_id_in_a_body_is_held_to_the_same(client: TestClient[Litestar], value: Json) -> None:
    fault = fault_of(client.post(f"{CHAT}/start", headers=AUTH, json={"advisor_id": value}))

    assert fault["pointer"] == "/advisor_id"
    assert "1 to 128 characters" in fault["detail"]


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "_body"), PATHS_WITH_BODY)
@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "a JSON body is required"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b"{", "is not JSON"),
        (b"{}x", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b'{"a": Infinity}', "is not JSON"),
        (b'{"a": 01}', "is not JSON"),
        (b'{"a": "\x00"}', "is not JSON"),
        (b'{"a": "\\ud800"}', "is not JSON"),
        (b'{"\xff": 1}', "is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
        (b'{"a":' * 12_000, "is nested too deeply"),
        (b"[" * 60_000, "must be a JSON object"),
        (b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "is nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused(
    client: TestClient[Litestar], method: str, path: str, _body: Json, content: bytes, detail: str
) -> None:
    fault = fault_of(client.request(method, path, headers={**KEYED, **JSON}, content=content))

    assert fault["pointer"] == ""
    assert fault["detail"].startswith(detail)


@pytest.mark.parametrize(("method", "path", "body"), PATHS_WITH_BODY)
def test_unknown_members_are_refused(client: TestClient[Litestar], method: str, path: str, body: Json) -> None:
    fault = fault_of(client.request(method, path, headers=KEYED, json={**body, "a/b~c": None}))

    assert fault == {"detail": "is not known here", "pointer": "/a~1b~0c"}


@pytest.mark.parametrize(("method", "path", "body"), PATHS_WITH_BODY)
def test_an_empty_object_lacks_what_is_required(
    client: TestClient[Litestar], method: str, path: str, body: dict[str, Json]
) -> None:
    found = problem_of(client.request(method, path, headers=KEYED, json={}), 400, "invalid-input")["errors"]

    assert [{"detail": "is required", "pointer": f"/{name}"} for name in body] == found


@pytest.mark.parametrize(("method", "path", "body"), PATHS_WITH_BODY)
@pytest.mark.parametrize("value", [True, [], {}, 10**400])
def test_no_member_takes_a_wrong_type(
    client: TestClient[Litestar], method: str, path: str, body: dict[str, Json], value: Json
) -> None:
    wrong = json.dumps(dict.fromkeys(body, value)).encode()
    found = problem_of(client.request(method, path, headers={**KEYED, **JSON}, content=wrong), 400, "invalid-input")

    assert [f"/{name}" for name in body] == [fault["pointer"] for fault in found["errors"]]


def test_everything_that_is_wrong_is_said_at_once(client: TestClient[Litestar]) -> None:
    body = {"kind": "gift", "amount": 5, "memo": "a\x00", "more": 1}
    found = problem_of(client.post("/v1/users/u1/credits", headers=KEYED, json=body), 400, "invalid-input")["errors"]

    assert {fault["pointer"]: fault["detail"] for fault in found} == {
        "/kind": "must be one of purchase, grant, compensation, refund, correction",
        "/amount": 'must be a string that holds a decimal number, such as "12.5"',
        "/memo": "must not hold control characters",
        "/more": "is not known here",
    }


def test_a_member_does_not_hide_behind_its_namesake(client: TestClient[Litestar]) -> None:
    for first in (b"5", b'"a1"'):
        content = b'{"advisor_id": ' + first + b', "advisor_id": "a1"}'
        fault = fault_of(client.post(f"{CHAT}/start", headers={**AUTH, **JSON}, content=content))
        assert fault == {"pointer": "", "detail": "holds a member twice"}


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("0", "must be more than 0"),
        ("0.000000", "must be more than 0"),
        ("-0", "must be more than 0"),
        ("-5", "must be more than 0"),
        ("1.0000001", "must not have more than 6 decimals"),
        ("-1.0000001", "must not have more than 6 decimals"),
        ("0.0000000", "must not have more than 6 decimals"),
        ("1000000000.000001", "must be at most 1000000000.000000"),
        ("99999999999999999999", "must be at most 1000000000.000000"),
        ("9" * 21, "must be a plain decimal number"),
        ("9" * 60_000, "must be a plain decimal number"),
        ("NaN", "must be a plain decimal number"),
        ("sNaN", "must be a plain decimal number"),
        ("Infinity", "must be a plain decimal number"),
        ("-inf", "must be a plain decimal number"),
        ("1e3", "must be a plain decimal number"),
        ("+1", "must be a plain decimal number"),
        ("1,5", "must be a plain decimal number"),
        ("1_0", "must be a plain decimal number"),
        (" 1", "must be a plain decimal number"),
        ("1\n", "must be a plain decimal number"),
        ("1.", "must be a plain decimal number"),
        (".5", "must be a plain decimal number"),
        ("٣", "must be a plain decimal number"),
        ("0x10", "must be a plain decimal number"),
        ("", "must be a plain decimal number"),
        (5, "must be a string"),
        (5.5, "must be a string"),
        (None, "must be a string"),
    ],
)
def test_amounts_are_positive_decimal_strings(client: TestClient[Litestar], value: Json, detail: str) -> None:
    fault = fault_of(client.post("/v1/users/u1/credits", headers=KEYED, json={**CREDIT, "amount": value}))

    assert fault["pointer"] == "/amount"
    assert fault["detail"].startswith(detail)


@pytest.mark.parametrize("value", ["0.000001", "1000000000", "1000000000.000000", "007", "12.345678"])
def test_the_limits_of_amounts_are_amounts(client: TestClient[Litestar], value: str) -> None:
    response = client.post("/v1/users/u1/credits", headers=KEYED, json={**CREDIT, "amount": value})

    problem_of(response, 503, "unavailable")


@pytest.mark.parametrize(
    "memo", ["x" * 501, "a\x00b", "a\nb", "\t", "a\x7f", "a\x9f", 5, None, ["a"]], ids=lambda memo: repr(memo)[:9]
)
def test_memos_are_short_lines(client: TestClient[Litestar], memo: Json) -> None:
    fault = fault_of(client.post("/v1/users/u1/credits", headers=KEYED, json={**CREDIT, "memo": memo}))

    assert fault["pointer"] == "/memo"


@pytest.mark.parametrize("memo", ["", "x" * 500, "é" * 500, "🙂" * 500, "Order 4711"], ids=lambda memo: memo[:9])
def test_memos_may_be_any_text(client: TestClient[Litestar], memo: str) -> None:
    response = client.post("/v1/users/u1/credits", headers=KEYED, json={**CREDIT, "memo": memo})

    problem_of(response, 503, "unavailable")


@pytest.mark.parametrize("member", ["free_seconds", "first_seconds", "increment_seconds"])
@pytest.mark.parametrize(
    "number",
    [
        "-1",
        "-0.000001",
        "0.0000001",
        "1.0000000000000000000000000000000000000000001",
        "1." + "9" * 60_000,
        "1e-7",
        "1e999999",
        "1e99999999999999999999",
        "1e-99999999999999999999",
        "31536000.000001",
        "9" * 30,
        '"60"',
        "true",
        "null",
        "[60]",
    ],
    ids=lambda number: number[:20],
)
def test_durations_are_exact_json_numbers(client: TestClient[Litestar], member: str, number: str) -> None:
    content = f'{{"credits_per_minute": "1", "free_seconds": 0, "{member}": {number}}}'
    if member == "free_seconds":
        content = f'{{"credits_per_minute": "1", "free_seconds": {number}}}'
    fault = fault_of(client.put("/v1/advisors/a1", headers={**AUTH, **JSON}, content=content))

    assert fault["pointer"] == f"/{member}"


@pytest.mark.parametrize(
    ("member", "value"), [("free_seconds", 31_536_001), ("first_seconds", 86_401), ("increment_seconds", 86_401)]
)
def test_durations_are_capped(client: TestClient[Litestar], member: str, value: int) -> None:
    fault = fault_of(client.put("/v1/advisors/a1", headers=AUTH, json={**CARD, member: value}))

    assert fault == {"detail": f"must be from 0 to {value - 1}", "pointer": f"/{member}"}


@pytest.mark.parametrize("rate", ["-1", "-0.000001", "1000000.000001", "1.0000001", "NaN", 1, None])
def test_rates_are_decimal_strings_from_0(client: TestClient[Litestar], rate: Json) -> None:
    fault = fault_of(client.put("/v1/advisors/a1", headers=AUTH, json={**CARD, "credits_per_minute": rate}))

    assert fault["pointer"] == "/credits_per_minute"


def test_a_card_is_decoded_exactly() -> None:
    body = decode_body(
        AdvisorBody,
        b'{"credits_per_minute": "1000000", "free_seconds": 0.1, "first_seconds": 60.000001, "increment_seconds": 6e0}',
    )

    assert RateCard(Tariff(1_000_000 * MICRO, 60_000_001, 6 * MICRO), 100_000) == body.card()


def test_blocks_are_0_unless_given() -> None:
    assert RateCard(Tariff(0), 0) == decode_body(AdvisorBody, b'{"credits_per_minute":"0","free_seconds":0}').card()


@given(st.integers(0, 31_536_000 * MICRO))
def test_no_float_lies_between_a_number_and_its_value(us: int) -> None:
    text = f"{us // MICRO}.{us % MICRO:06d}"
    body = decode_body(AdvisorBody, f'{{"credits_per_minute":"0","free_seconds":{text}}}'.encode())

    assert us == body.card().free_us


@given(st.binary())
@example(b'{"kind":"purchase","amount":"1","memo":"\xed\xa0\x80"}')
def test_any_bytes_are_decoded_or_refused(raw: bytes) -> None:
    try:
        decode_body(CreditBody, raw)
    except Refusal as refusal:
        assert refusal.faults  # noqa: PT017 - either outcome is right


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional={"kind": _ANY, "amount": _ANY, "memo": _ANY, "x": _ANY}))
def test_any_json_is_decoded_or_refused(document: dict[str, Json]) -> None:
    try:
        decode_body(CreditBody, json.dumps(document).encode())
    except Refusal as refusal:
        assert refusal.faults  # noqa: PT017 - either outcome is right


# --- around bodies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), PATHS_WITH_BODY)
def test_bodies_are_at_most_1_mib(client: TestClient[Litestar], method: str, path: str, body: Json) -> None:
    content = json.dumps(body).encode().ljust(64 * 1024)
    taken = client.request(method, path, headers={**KEYED, **JSON}, content=content)
    refused = client.request(method, path, headers={**KEYED, **JSON}, content=content + b" ")

    problem_of(taken, 503, "unavailable")
    problem_of(refused, 413, "content-too-large")


def test_bodies_without_a_length_are_counted(client: TestClient[Litestar]) -> None:
    response = client.put("/v1/advisors/a1", headers={**AUTH, **JSON}, content=(b" " * 65_536 for _ in range(17)))

    problem_of(response, 413, "content-too-large")


@pytest.mark.parametrize(("method", "path", "body"), PATHS_WITH_BODY)
@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml", "json"],
)
def test_bodies_are_json(client: TestClient[Litestar], method: str, path: str, body: Json, content_type: str) -> None:
    headers = {**KEYED, "Content-Type": content_type}
    response = client.request(method, path, headers=headers, content=json.dumps(body).encode())

    problem_of(response, 415, "unsupported-media-type")


def test_a_body_without_a_type_is_refused(client: TestClient[Litestar]) -> None:
    response = client.put("/v1/advisors/a1", headers=AUTH, content=json.dumps(CARD).encode())

    problem_of(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("charset", ["iso-8859-1", "utf-16", '"latin-1"', "UTF-7", "ascii"])
def test_json_is_in_utf_8_and_no_other_encoding(client: TestClient[Litestar], charset: str) -> None:
    headers = {**AUTH, "Content-Type": f"application/json; x=y; charset={charset}"}
    response = client.put("/v1/advisors/a1", headers=headers, content=json.dumps(CARD))

    assert "UTF-8" in problem_of(response, 415, "unsupported-media-type")["detail"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf-8"'])
def test_json_may_say_that_it_is_in_utf_8(client: TestClient[Litestar], charset: str) -> None:
    headers = {**AUTH, "Content-Type": f"application/json;charset={charset}"}
    response = client.put("/v1/advisors/a1", headers=headers, content=json.dumps(CARD))

    problem_of(response, 503, "unavailable")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
def test_json_may_be_written_in_any_case(client: TestClient[Litestar], content_type: str) -> None:
    headers = {**AUTH, "Content-Type": content_type}
    response = client.put("/v1/advisors/a1", headers=headers, content=json.dumps(CARD).encode())

    problem_of(response, 503, "unavailable")


@pytest.mark.parametrize("command", ["heartbeat", "pause", "stop"])
def test_commands_without_a_body_take_an_empty_object_and_no_other(client: TestClient[Litestar], command: str) -> None:
    path = f"{CHAT}/{command}"
    problem_of(client.post(path, headers=AUTH, json={}), 503, "unavailable")
    assert fault_of(client.post(path, headers=AUTH, json={"a": 1}))["detail"] == "no body is taken here"
    assert fault_of(client.post(path, headers=AUTH, content=b"garbage"))["detail"] == "no body is taken here"
    problem_of(client.post(path, headers=AUTH, content=b" " * (1 << 21)), 413, "content-too-large")


def test_of_many_faults_only_the_first_are_told() -> None:
    body = json.dumps({f"unknown-{number}": 0 for number in range(2000)}).encode()
    with pytest.raises(Refusal) as caught:
        decode_body(StartBody, body)
    assert FAULTS_MAX == len(caught.value.faults)
    assert str(caught.value).endswith("; and more")
