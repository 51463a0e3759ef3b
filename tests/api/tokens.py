"""Tokens as a host product, or somebody who is up to no good, would make them."""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from time import monotonic

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from talktime.api.tokens import wall_clock
from talktime.settings import TokenSettings
from tests.api.requests import Json

SECRET = "the-secret-of-the-host-product-for-tests"
ISSUER = "https://login.example"
# For a live application, as an environment.
VARIABLES = {"TALKTIME_TOKEN_SECRET": SECRET, "TALKTIME_TOKEN_ISSUER": ISSUER}

HS256 = TokenSettings(
    algorithm="HS256", secret=SECRET.encode(), jwks=None, issuer=ISSUER, audience="talktime", leeway_s=10
)

NOW = 1_800_000_000
"""The present in tests that tell the verifier what time it is."""


def claims_for(subject: str, *, at: float = NOW, **others: Json) -> dict[str, Json]:
    """Return claims that are right, for ten minutes."""
    at = int(at)
    return {"iss": ISSUER, "aud": "talktime", "sub": subject, "iat": at, "exp": at + 600, **others}


def live_token(subject: str, **others: Json) -> str:
    """Return a token that is valid now."""
    return jwt.encode(claims_for(subject, at=wall_clock(), **others), SECRET, algorithm="HS256")


def bearer(token: str) -> dict[str, str]:
    """Return the header with a credential."""
    return {"Authorization": f"Bearer {token}"}


def b64(raw: bytes) -> str:
    """Return base64url without padding."""
    return urlsafe_b64encode(raw).decode().rstrip("=")


def by_hand(header: Json, claims: Json, secret: bytes = SECRET.encode(), hash_name: str = "sha256") -> str:
    """Make a token with any header and any payload, signed with HMAC."""
    signed = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{signed}.{b64(hmac.digest(secret, signed.encode(), getattr(hashlib, hash_name)))}"


# --- key pairs --------------------------------------------------------------------------------------------------------


@cache
def rsa_key(name: str, bits: int = 2048) -> RSAPrivateKey:
    """Return a key pair of this name, the same throughout a run."""
    return rsa.generate_private_key(65_537, bits)


@cache
def ec_key(name: str, curve: type[ec.EllipticCurve] = ec.SECP256R1) -> EllipticCurvePrivateKey:
    """Return a key pair of this name, the same throughout a run."""
    return ec.generate_private_key(curve())


def public(key: RSAPrivateKey | EllipticCurvePrivateKey, **members: Json) -> dict[str, Json]:
    """Return the public half as it stands in a JWKS file."""
    if isinstance(key, RSAPrivateKey):
        return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), **members} | {"key_ops": ["verify"]}
    return {**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), **members}


def write_keys(path: Path, *keys: Mapping[str, Json]) -> None:
    """Put keys in place of a file at once, as those who change one that is in use should."""
    fresh = path.with_name(f"{path.name}.{monotonic()}")
    fresh.write_text(json.dumps({"keys": list(keys)}))
    fresh.replace(path)


def key_settings(path: Path, algorithm: str = "RS256") -> TokenSettings:
    """Return settings with a file of keys."""
    return TokenSettings(algorithm=algorithm, secret=None, jwks=path, issuer=ISSUER, audience="talktime", leeway_s=10)


def signed_by(
    key: RSAPrivateKey | EllipticCurvePrivateKey, key_id: str | None, subject: str = "u1", *, at: float = NOW
) -> str:
    """Return a token with a signature of this key."""
    headers = {} if key_id is None else {"kid": key_id}
    algorithm = "RS256" if isinstance(key, RSAPrivateKey) else "ES256"
    return jwt.encode(claims_for(subject, at=at), key, algorithm=algorithm, headers=headers)
