"""Tokens: what is taken, what is not, and for how long it is remembered."""

from __future__ import annotations

import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient

from talktime.api import tokens
from talktime.api.app import create_app
from talktime.api.callers import AdvisorCaller, UserCaller
from talktime.api.problems import Refusal
from talktime.api.tokens import Tokens, local, mint, wall_clock
from talktime.errors import CannotMint, SettingError
from talktime.settings import load_settings
from talktime.store.database import Database
from tests.api.conftest import CLOSED_PORT
from tests.api.requests import Json, problem_of
from tests.api.tokens import (
    HS256,
    ISSUER,
    NOW,
    SECRET,
    VARIABLES,
    b64,
    bearer,
    by_hand,
    claims_for,
    key_settings,
    live_token,
    public,
    rsa_key,
    signed_by,
    write_keys,
)

HEADER = {"alg": "HS256", "typ": "JWT"}
GONE = object()


class Time:
    """What time it is, as the test says."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def verifier(time: Time) -> Tokens:
    return Tokens(HS256, now=time)


def with_claims(**changes: Json) -> str:
    claims = {**claims_for("u1"), **changes}
    return by_hand(HEADER, {name: value for name, value in claims.items() if value is not GONE})


def refused(verifier: Tokens, token: str, detail: str = "the token is not valid here", status: int = 401) -> None:
    with pytest.raises(Refusal) as refusal:
        verifier.verify(token)
    assert (status, detail) == (refusal.value.kind.status, refusal.value.detail)


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "caller"),
    [
        ({}, UserCaller("u1")),
        ({"role": "user"}, UserCaller("u1")),
        ({"role": "advisor"}, AdvisorCaller("u1")),
        ({"sub": "Az09-_.:@+=~|"}, UserCaller("Az09-_.:@+=~|")),
        ({"sub": "x" * 128}, UserCaller("x" * 128)),
        ({"aud": ["other", "talktime"]}, UserCaller("u1")),
        ({"iat": GONE}, UserCaller("u1")),
        ({"exp": NOW - 9.5}, UserCaller("u1")),
        ({"nbf": NOW + 10, "iat": NOW + 10}, UserCaller("u1")),
        ({"exp": 10**400}, UserCaller("u1")),
        ({"name": "more", "roles": ["admin"]}, UserCaller("u1")),
    ],
)
def test_a_token_that_is_right_says_who_is_calling(verifier: Tokens, changes: Json, caller: object) -> None:
    assert caller == verifier.verify(with_claims(**changes))


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt"])
def test_a_token_of_a_usual_type_is_taken(verifier: Tokens, kind: str) -> None:
    assert UserCaller("u1") == verifier.verify(by_hand({**HEADER, "typ": kind}, claims_for("u1")))
    assert UserCaller("u1") == verifier.verify(by_hand({"alg": "HS256", "kid": "any"}, claims_for("u1")))


# --- what is not ------------------------------------------------------------------------------------------------------

WRONG_CLAIMS: dict[str, Json] = {
    **{f"no {name}": {name: GONE} for name in ("exp", "iss", "aud", "sub")},
    **{f"{name} null": {name: None} for name in ("exp", "iss", "aud", "sub", "nbf", "iat")},
    **{f"{name} a text": {name: str(NOW + 60)} for name in ("exp", "nbf", "iat")},
    **{f"{name} true": {name: True} for name in ("exp", "nbf", "iat")},
    **{f"{name} infinite": {name: math.inf} for name in ("exp", "nbf", "iat")},
    **{f"{name} no number": {name: math.nan} for name in ("exp", "nbf", "iat")},
    **{f"{name} a list": {name: [NOW + 60]} for name in ("exp", "nbf", "iat")},
    "another issuer": {"iss": "https://login.example.evil"},
    "a list of issuers": {"iss": [ISSUER]},
    "another audience": {"aud": "other"},
    "a part of the audience": {"aud": "talk"},
    "other audiences": {"aud": ["other", "talktime2"]},
    "no audiences": {"aud": []},
    "audiences of any kind": {"aud": ["talktime", 5]},
    "an audience that is an object": {"aud": {"talktime": True}},
    "an empty subject": {"sub": ""},
    "a subject with a space": {"sub": "u 1"},
    "a subject with a slash": {"sub": "u1/chats"},
    "dots": {"sub": ".."},
    "a long subject": {"sub": "x" * 129},
    "a number": {"sub": 5},
    "a subject with a line end": {"sub": "u1\n"},
}
WRONG_HEADERS: dict[str, Json] = {
    "another type": {"typ": "logout+jwt"},
    "a number as type": {"typ": 5},
    "no type": {"typ": None},
    "something critical": {"crit": ["exp"], "exp": 1},
    "a payload elsewhere": {"crit": ["b64"], "b64": False},
    "a number as key id": {"kid": 5},
    "another algorithm in name": {"alg": "HS512"},
    "an algorithm with a key pair": {"alg": "RS256"},
    "an unknown algorithm": {"alg": "hs256"},
    "algorithms": {"alg": ["HS256"]},
    "no algorithm": {"alg": None},
}
ALG_NONE, EMPTY = b'{"alg":"none"}', b"{}"
FORGED = {
    "nothing signed by nobody": f"{b64(ALG_NONE)}.{b64(EMPTY)}.",
    "none signed": by_hand({"alg": "none", "typ": "JWT"}, claims_for("u1")),
    "None signed": by_hand({"alg": "None", "typ": "JWT"}, claims_for("u1")),
    "none unsigned": by_hand({"alg": "none", "typ": "JWT"}, claims_for("u1")).rpartition(".")[0] + ".",
    "unsigned": with_claims().rpartition(".")[0] + ".",
    "another secret": by_hand(HEADER, claims_for("u1"), b"x" * 32),
    "no secret": by_hand(HEADER, claims_for("u1"), b""),
    "HS512": by_hand({"alg": "HS512", "typ": "JWT"}, claims_for("u1"), hash_name="sha512"),
    "another subject": ".".join(
        [with_claims().split(".")[0], with_claims(sub="u2").split(".")[1], with_claims().split(".")[2]]
    ),
    "cut off": with_claims()[:-1],
    "longer": with_claims() + "A",
    "a payload that is a list": by_hand(HEADER, [claims_for("u1")]),
    "a header that is a list": by_hand([HEADER], claims_for("u1")),
    "deep": f"{b64(b'[' * 5000)}.{b64(EMPTY)}.x",
    "empty": "..",
    "letters": "a.b.c",
    "not ASCII": with_claims() + "\u00e9",
    "long": with_claims(more="x" * tokens.TOKEN_BYTES_MAX),
}
WRONG = {
    **{name: with_claims(**changes) for name, changes in WRONG_CLAIMS.items()},
    **{name: by_hand({**HEADER, **changes}, claims_for("u1")) for name, changes in WRONG_HEADERS.items()},
    **FORGED,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_token_that_is_wrong_is_refused(verifier: Tokens, name: str) -> None:
    refused(verifier, WRONG[name])


def test_a_token_may_be_of_8_kib(verifier: Tokens) -> None:
    room = tokens.TOKEN_BYTES_MAX - len(with_claims(more=""))
    longest = with_claims(more="x" * (room * 3 // 4))

    assert tokens.TOKEN_BYTES_MAX - 4 < len(longest) <= tokens.TOKEN_BYTES_MAX
    assert UserCaller("u1") == verifier.verify(longest)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"exp": NOW - 10}, "the token has expired"),
        ({"exp": 0}, "the token has expired"),
        ({"exp": -(10**400)}, "the token has expired"),
        ({"nbf": NOW + 10.5}, "the token is not valid yet"),
        ({"iat": NOW + 11}, "the token is not valid yet"),
    ],
)
def test_a_token_out_of_its_time_is_told_so(verifier: Tokens, changes: Json, detail: str) -> None:
    refused(verifier, with_claims(**changes), detail)


def test_only_one_who_has_the_secret_is_told_that_a_token_has_expired(verifier: Tokens) -> None:
    refused(verifier, by_hand(HEADER, claims_for("u1", exp=NOW - 60), b"x" * 32))
    refused(verifier, with_claims(exp=NOW - 60, iss="another"))


@pytest.mark.parametrize("role", ["admin", "service", "User", "", None, True, ["advisor"], {"advisor": True}])
def test_a_role_that_is_not_known_may_nothing(verifier: Tokens, role: Json) -> None:
    refused(verifier, with_claims(role=role), "this caller may not do this", 403)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def answer_to(token: str) -> object:
    """Return the caller, or the status with which a token is refused."""
    try:
        return Tokens(HS256, now=lambda: NOW).verify(token)
    except Refusal as refusal:
        return refusal.kind.status


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("iss", "aud", "sub", "exp", "nbf", "iat", "jti", "role"), JSON)),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("typ", "kid", "crit", "cty", "b64", "zip"), JSON)),
)
def test_whatever_a_signed_token_holds_it_is_taken_or_refused(claims: Json, header: Json) -> None:
    token = by_hand({**HEADER, **header}, {**claims_for("u1"), **claims})
    subject = claims.get("sub", "u1")

    assert answer_to(token) in (UserCaller(subject), AdvisorCaller(subject), 401, 403)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_whatever_looks_like_a_token_is_refused(header: str, payload: str, signature: str) -> None:
    assert 401 == answer_to(f"{header}.{payload}.{signature}")


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_a_public_key_is_not_taken_for_a_secret(tmp_path: Path, encoding: Encoding) -> None:
    path, key = tmp_path / "keys.json", rsa_key("a")
    write_keys(path, public(key, kid="a"))
    verifier = Tokens(key_settings(path), now=lambda: NOW)
    known = key.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)

    for algorithm in ("HS256", "RS256"):
        refused(verifier, by_hand({"alg": algorithm, "typ": "JWT", "kid": "a"}, claims_for("u1"), known))
    assert UserCaller("u1") == verifier.verify(signed_by(key, "a"))


def test_a_public_key_cannot_be_set_as_the_secret() -> None:
    pem = rsa_key("a").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    with pytest.raises(SettingError, match="^TALKTIME_TOKEN_SECRET: ") as refusal:  # noqa: RUF043 - an anchor
        Tokens(replace(HS256, secret=pem))
    assert pem.decode().splitlines()[1] not in str(refusal.value)


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_a_token_that_was_valid_is_not_verified_again(verifier: Tokens, time: Time) -> None:
    remembered, other = with_claims(nbf=NOW), with_claims(nbf=NOW, jti="other")
    verifier.verify(remembered)
    # By a clock that was set back neither is valid yet. Only one of them is still asked for it.
    time.now = NOW - 60

    assert UserCaller("u1") == verifier.verify(remembered)
    refused(verifier, other, "the token is not valid yet")


def test_a_token_is_remembered_until_it_expires_and_not_longer(verifier: Tokens, time: Time) -> None:
    token = with_claims(exp=NOW + 60)
    verifier.verify(token)
    time.now = NOW + 69.999
    assert UserCaller("u1") == verifier.verify(token)
    for _ in range(2):
        time.now = NOW + 70
        refused(verifier, token, "the token has expired")


def test_of_too_many_tokens_the_one_used_longest_ago_is_forgotten(
    verifier: Tokens, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED_MAX", 2)
    a, b, c = (with_claims(nbf=NOW, jti=name) for name in "abc")
    for token in (a, b, a, c):
        verifier.verify(token)
    time.now = NOW - 60

    assert [UserCaller("u1")] * 2 == [verifier.verify(token) for token in (a, c)]
    refused(verifier, b, "the token is not valid yet")


def test_a_token_that_was_refused_is_looked_at_again(verifier: Tokens, time: Time) -> None:
    token = with_claims(nbf=NOW + 60)
    refused(verifier, token, "the token is not valid yet")
    time.now = NOW + 60

    assert UserCaller("u1") == verifier.verify(token)


# --- over HTTP --------------------------------------------------------------------------------------------------------

ACCOUNT = "/v1/users/u1/account"


def client_with(**variables: str) -> TestClient[Litestar]:
    """Return a client of an application whose database is away: who gets past the gate is answered with 503."""
    return TestClient(create_app(load_settings(variables), lambda: Database(CLOSED_PORT)))


@pytest.fixture(scope="module")
def live() -> Any:  # noqa: ANN401 - a generator of a client
    with client_with(**VARIABLES) as client:
        yield client


def test_a_valid_token_reaches_the_database(live: TestClient[Litestar]) -> None:
    problem_of(live.get(ACCOUNT, headers=bearer(live_token("u1"))), 503, "unavailable")


@pytest.mark.parametrize(
    ("token", "detail"),
    [
        (live_token("u1", exp=1), "the token has expired"),
        (live_token("u1", iss="another"), "the token is not valid here"),
        (FORGED["none unsigned"], "the token is not valid here"),
        (FORGED["deep"], "the token is not valid here"),
        ("a.b.c.d", "the bearer credential is not valid here"),
        ("tt_a.b.c"[3:] + "~", "the token is not valid here"),
        ("nothing-we-know", "the bearer credential is not valid here"),
    ],
)
def test_a_refused_token_is_challenged_and_not_repeated(live: TestClient[Litestar], token: str, detail: str) -> None:
    response = live.get(ACCOUNT, headers=bearer(token))

    assert detail == problem_of(response, 401, "unauthorized")["detail"]
    assert 'Bearer realm="talktime", error="invalid_token"' == response.headers["www-authenticate"]
    assert token not in response.text


def test_without_settings_for_tokens_none_is_taken() -> None:
    with client_with() as client:
        response = client.get(ACCOUNT, headers=bearer(live_token("u1")))

    problem_of(response, 401, "unauthorized")


def test_a_token_whose_role_is_not_known_is_forbidden(live: TestClient[Litestar]) -> None:
    response = live.get(ACCOUNT, headers=bearer(live_token("u1", role="admin")))

    assert "this caller may not do this" == problem_of(response, 403, "forbidden")["detail"]
    assert "www-authenticate" not in response.headers


# --- made here --------------------------------------------------------------------------------------------------------


def test_a_minted_token_is_taken_for_as_long_as_was_said() -> None:
    token = mint(HS256, "u1", seconds=60)
    made_at = jwt.decode(token, options={"verify_signature": False})["iat"]

    assert abs(wall_clock() - made_at) < 5
    assert UserCaller("u1") == Tokens(HS256).verify(token)
    assert UserCaller("u1") == Tokens(HS256, now=lambda: made_at + 69.9).verify(token)
    refused(Tokens(HS256, now=lambda: made_at + 70), token, "the token has expired")


@pytest.mark.parametrize(
    ("role", "caller"), [(None, UserCaller("x")), ("user", UserCaller("x")), ("advisor", AdvisorCaller("x"))]
)
def test_a_minted_token_has_its_role(role: str | None, caller: object) -> None:
    assert caller == Tokens(HS256).verify(mint(HS256, "x", seconds=60, role=role))


@pytest.mark.parametrize(("subject", "seconds", "role"), [("a b", 60, None), ("a", 0, None), ("a", 60, "admin")])
def test_a_token_that_nobody_would_take_is_not_minted(subject: str, seconds: int, role: str | None) -> None:
    with pytest.raises(CannotMint):
        mint(HS256, subject, seconds=seconds, role=role)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_with_public_keys_alone_nothing_is_minted(algorithm: str) -> None:
    with pytest.raises(CannotMint, match=f"{algorithm}.*only public keys"):
        mint(key_settings(Path("keys.json"), algorithm), "u1", seconds=60)


def test_a_home_keeps_one_secret_for_tokens(tmp_path: Path) -> None:
    first, again = local(tmp_path / "home"), local(tmp_path / "home")

    assert first == again
    assert ("HS256", "talktime", "talktime", None) == (first.algorithm, first.issuer, first.audience, first.jwks)
    assert 0o600 == stat.S_IMODE((tmp_path / "home" / "token_secret").stat().st_mode)
    assert UserCaller("u1") == Tokens(again).verify(mint(first, "u1", seconds=60))
    refused(Tokens(local(tmp_path / "other")), mint(first, "u1", seconds=60))


def test_a_damaged_secret_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "token_secret").write_text("short\n")

    with pytest.raises(SettingError, match="token_secret is damaged"):
        local(tmp_path)


def test_the_secret_of_the_environment_is_the_one_that_counts() -> None:
    settings = load_settings(VARIABLES).tokens

    assert settings == HS256
    assert SECRET not in repr(settings)
