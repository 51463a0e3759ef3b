"""The file of public keys: what it may hold, and what happens when it changes under a running service."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from litestar.testing import TestClient

from talktime.api import jwks
from talktime.api.app import create_app
from talktime.api.callers import UserCaller
from talktime.api.problems import Refusal
from talktime.api.tokens import Tokens, wall_clock
from talktime.errors import SettingError
from talktime.settings import load_settings
from talktime.store.database import Database
from tests.api.conftest import CLOSED_PORT
from tests.api.requests import Json, problem_of
from tests.api.tokens import ISSUER, NOW, bearer, ec_key, key_settings, public, rsa_key, signed_by, write_keys

A, B = rsa_key("a"), rsa_key("b")
PUBLIC_A, PUBLIC_B = public(A, kid="a"), public(B, kid="b")
USER = UserCaller("u1")


class Ticks:
    """Seconds that pass as the test says."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    write_keys(path, PUBLIC_A)
    return path


@pytest.fixture
def tokens(path: Path, ticks: Ticks) -> Tokens:
    return Tokens(key_settings(path), now=lambda: NOW, ticks=ticks)


def refused(tokens: Tokens, token: str) -> None:
    with pytest.raises(Refusal, match="the token is not valid here"):
        tokens.verify(token)


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_a_token_is_verified_with_the_key_that_it_names(path: Path) -> None:
    write_keys(path, PUBLIC_A, PUBLIC_B)
    tokens = Tokens(key_settings(path), now=lambda: NOW)

    assert [USER, USER] == [tokens.verify(signed_by(key, name)) for key, name in ((A, "a"), (B, "b"))]
    refused(tokens, signed_by(A, "b"))
    refused(tokens, signed_by(A, "c"))
    refused(tokens, signed_by(A, ""))
    refused(tokens, signed_by(rsa_key("c"), "a"))


def test_a_token_that_names_no_key_is_taken_where_there_is_but_one(path: Path, tokens: Tokens) -> None:
    assert USER == tokens.verify(signed_by(A, None))
    refused(tokens, signed_by(B, None))

    write_keys(path, PUBLIC_A, PUBLIC_B)
    refused(Tokens(key_settings(path), now=lambda: NOW), signed_by(A, None))


def test_a_key_without_an_id_is_for_tokens_without_one(path: Path) -> None:
    write_keys(path, public(A))
    tokens = Tokens(key_settings(path), now=lambda: NOW)

    assert USER == tokens.verify(signed_by(A, None))
    refused(tokens, signed_by(A, "a"))


def test_elliptic_curves_are_taken_with_es256(path: Path) -> None:
    key = ec_key("a")
    write_keys(path, public(key, kid="a", use="sig", alg="ES256"))
    tokens = Tokens(key_settings(path, "ES256"), now=lambda: NOW)

    assert USER == tokens.verify(signed_by(key, "a"))
    refused(tokens, signed_by(ec_key("b"), "a"))
    refused(tokens, signed_by(A, "a"))


UNUSABLE: dict[str, Mapping[str, Json]] = {
    "for encryption": {**PUBLIC_B, "use": "enc"},
    "for signing": {**PUBLIC_B, "key_ops": ["sign"]},
    "for another algorithm": {**PUBLIC_B, "alg": "RS512"},
    "too short": public(rsa_key("short", 1024), kid="b"),
    "of another kind": public(ec_key("b"), kid="b"),
    "on another curve": public(ec_key("c", ec.SECP384R1), kid="b"),
    "of no kind": {"kid": "b"},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_keys_for_something_else_are_passed_over(path: Path, name: str) -> None:
    write_keys(path, UNUSABLE[name], PUBLIC_A)
    tokens = Tokens(key_settings(path), now=lambda: NOW)

    assert USER == tokens.verify(signed_by(A, "a"))
    refused(tokens, signed_by(B, "b"))
    write_keys(path, UNUSABLE[name])
    with pytest.raises(SettingError, match="no key that can be used for RS256"):
        Tokens(key_settings(path))


def test_a_curve_that_is_not_es256s_is_no_key_for_it(path: Path) -> None:
    write_keys(path, public(ec_key("c", ec.SECP384R1), kid="c"))
    with pytest.raises(SettingError, match="no key that can be used for ES256"):
        Tokens(key_settings(path, "ES256"))


WRONG: dict[str, Json] = {
    "not JSON": "{",
    "not UTF-8": "\udcff",
    "deep": "[" * 100_000,
    "a list": [PUBLIC_A],
    "no list": {"keys": PUBLIC_A},
    "no objects": {"keys": ["a"]},
    "empty": {"keys": []},
    "one id twice": {"keys": [PUBLIC_A, {**PUBLIC_B, "kid": "a"}]},
    "two without id": {"keys": [public(A), public(B)]},
    "a number as id": {"keys": [{**PUBLIC_A, "kid": 5}]},
    "a private key": {"keys": [PUBLIC_B, {**RSAAlgorithm.to_jwk(A, as_dict=True), "kid": "a"}]},
    "a private key of another kind": {"keys": [PUBLIC_A, ECAlgorithm.to_jwk(ec_key("a"), as_dict=True)]},
    "a secret": {"keys": [PUBLIC_A, {"kty": "oct", "k": "c2VjcmV0"}]},
    "a secret without it": {"keys": [PUBLIC_A, {"kty": "oct"}]},
    "no modulus": {"keys": [{**PUBLIC_A, "n": None}]},
    "a modulus that is a number": {"keys": [{**PUBLIC_A, "n": 5}]},
    "a modulus that is nothing": {"keys": [{**PUBLIC_A, "n": ""}]},
    "an even exponent": {"keys": [{**PUBLIC_A, "e": "Ag"}]},
    "not base64": {"keys": [{**PUBLIC_A, "n": "é"}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_used_is_refused_at_the_start(path: Path, name: str) -> None:
    content = WRONG[name]
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(SettingError, match=f"^TALKTIME_TOKEN_JWKS: {path} ") as refusal:
        create_app(load_settings(variables(path)), lambda: Database(CLOSED_PORT))
    assert "\n" not in str(refusal.value)
    assert "c2VjcmV0" not in str(refusal.value)


def test_a_point_that_is_not_on_the_curve_is_refused(path: Path) -> None:
    one, other = public(ec_key("a"), kid="a"), public(ec_key("b"))
    write_keys(path, {**one, "y": other["y"]})
    with pytest.raises(SettingError, match="damaged EC key"):
        Tokens(key_settings(path, "ES256"))


def test_a_file_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(SettingError, match="cannot be read"):
            Tokens(key_settings(missing))


# --- how it changes ---------------------------------------------------------------------------------------------------


def test_a_key_that_was_put_into_the_file_is_taken_at_once(tokens: Tokens, path: Path) -> None:
    write_keys(path, PUBLIC_A, PUBLIC_B)

    assert [USER, USER] == [tokens.verify(signed_by(key, name)) for key, name in ((B, "b"), (A, "a"))]


def test_unknown_keys_make_the_file_be_looked_at_once_a_second(tokens: Tokens, path: Path, ticks: Ticks) -> None:
    refused(tokens, signed_by(B, "b"))
    write_keys(path, PUBLIC_A, PUBLIC_B)
    ticks.now += 0.999
    refused(tokens, signed_by(B, "b"))
    ticks.now += 0.001

    assert USER == tokens.verify(signed_by(B, "b"))


def test_a_key_that_was_taken_out_of_the_file_is_refused_within_five_seconds(
    tokens: Tokens, path: Path, ticks: Ticks
) -> None:
    token = signed_by(A, "a")
    tokens.verify(token)
    write_keys(path, PUBLIC_B)
    ticks.now += 4.999
    assert USER == tokens.verify(token)
    ticks.now += 0.001
    refused(tokens, token)


def test_a_file_that_is_as_it_was_keeps_what_is_remembered(path: Path, ticks: Ticks) -> None:
    now = float(NOW)
    tokens = Tokens(key_settings(path), now=lambda: now, ticks=ticks)
    token = signed_by(A, "a")
    tokens.verify(token)
    now -= 60  # by which a token that is not remembered is not valid yet
    ticks.now += 10

    assert USER == tokens.verify(token)
    write_keys(path, PUBLIC_A, PUBLIC_B)
    ticks.now += 5
    with pytest.raises(Refusal, match="not valid yet"):
        tokens.verify(token)


@pytest.mark.parametrize("content", ["", "{", '{"keys": []}', None])
def test_a_broken_file_is_told_once_and_the_keys_from_before_stay(
    tokens: Tokens, path: Path, ticks: Ticks, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    token = signed_by(A, "a")
    tokens.verify(token)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    for _ in range(3):
        ticks.now += 5
        assert USER == tokens.verify(token)
        refused(tokens, signed_by(B, "b"))
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the keys from before stay in force" in record.getMessage()

    write_keys(path, PUBLIC_B)
    ticks.now += 5
    refused(tokens, token)
    assert USER == tokens.verify(signed_by(B, "b"))


def test_a_file_that_could_not_be_read_once_is_read_when_it_can_be(tokens: Tokens, path: Path, ticks: Ticks) -> None:
    write_keys(path, PUBLIC_B)
    whole, when = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(b"{" * len(whole))
    ticks.now += 5
    assert USER == tokens.verify(signed_by(A, "a"))

    path.write_bytes(whole)  # as long as before, and of the same time: nothing but its content tells
    os.utime(path, ns=(when, when))
    ticks.now += 5
    refused(tokens, signed_by(A, "a"))
    assert USER == tokens.verify(signed_by(B, "b"))


def variables(path: Path) -> dict[str, str]:
    return {
        "TALKTIME_TOKEN_JWKS": str(path),
        "TALKTIME_TOKEN_ALGORITHM": "RS256",
        "TALKTIME_TOKEN_ISSUER": ISSUER,
    }


def test_keys_are_changed_under_a_running_service(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "LOOK_AGAIN_S", 0)
    old, new = signed_by(A, "a", at=wall_clock()), signed_by(B, "b", at=wall_clock())
    # The database is away: who gets past the gate is answered with 503.
    with TestClient(create_app(load_settings(variables(path)), lambda: Database(CLOSED_PORT))) as client:

        def status(token: str) -> tuple[int, str]:
            response = client.get("/v1/users/u1/account", headers=bearer(token))
            return response.status_code, problem_of(response, response.status_code, response.json()["code"])["code"]

        in_force, unknown = (503, "unavailable"), (401, "unauthorized")
        assert (in_force, unknown) == (status(old), status(new))
        write_keys(path, PUBLIC_A, PUBLIC_B)
        assert (in_force, in_force) == (status(old), status(new))
        write_keys(path, PUBLIC_B)
        assert (unknown, in_force) == (status(old), status(new))
