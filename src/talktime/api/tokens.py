"""Tokens (JWTs) of the host product: verified, and for development made.

The algorithm is a setting, never the token's choice. The signature is checked before anything in a token is believed,
and its times by our own clock, with a leeway: the only place in talktime that looks at the wall clock.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jwt
from jwt.algorithms import HMACAlgorithm

from talktime.api.callers import AdvisorCaller, UserCaller
from talktime.api.jwks import KeyFile
from talktime.api.params import is_id
from talktime.api.problems import Refusal, refuse_caller, refuse_credential
from talktime.errors import CannotMint, SettingError
from talktime.settings import SECRET_BYTES_MIN, TokenSettings, kept_secret

TOKEN_BYTES_MAX = 8 * 1024
REMEMBERED_MAX = 100_000

USER, ADVISOR = "user", "advisor"

_NAME = "talktime"
_TYPES = ("jwt", "at+jwt")
_REQUIRED = ["exp", "iss", "aud", "sub"]
_INVALID, _TOO_EARLY, _TOO_LATE = "the token is not valid here", "the token is not valid yet", "the token has expired"


def wall_clock() -> float:
    """Return seconds since 1970: what the times in tokens are compared with."""
    return time.time()  # noqa: TID251 - tokens are made elsewhere, by clocks of the same time, not by the database


class ExpiredToken(Refusal):
    """The refusal of a token that was good until its time was over."""

    def __init__(self, caller: UserCaller | AdvisorCaller) -> None:
        refusal = refuse_credential(_TOO_LATE)
        super().__init__(refusal.kind, refusal.detail, headers=refusal.headers)
        self.caller = caller


class Tokens:
    """Verifies tokens, and remembers those that were valid until they expire or the keys change."""

    def __init__(
        self,
        settings: TokenSettings,
        *,
        now: Callable[[], float] = wall_clock,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the keys.

        Raises:
            SettingError: there is a secret that looks like a public key, or the file of keys cannot be used.
        """
        self._settings = settings
        self._now = now
        self._file = None if settings.jwks is None else KeyFile(settings.jwks, settings.algorithm, ticks=ticks)
        self._generation = 0
        self._remembered: OrderedDict[bytes, tuple[UserCaller | AdvisorCaller, float]] = OrderedDict()
        if settings.secret is not None:
            try:
                HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(settings.secret)
            except jwt.InvalidKeyError:
                # Everybody could know it, and sign with it.
                name = "TALKTIME_TOKEN_SECRET"
                raise SettingError(name, "must be a secret, not a key or a certificate") from None

    def verify(self, token: str) -> UserCaller | AdvisorCaller:
        """Return whose token this is.

        Raises:
            Refusal: it is not valid here, or of nobody who is known here.
        """
        if len(token) > TOKEN_BYTES_MAX or not token.isascii():
            raise refuse_credential(_INVALID)
        if self._file is not None:
            self._file.look()
            if self._file.generation != self._generation:
                self._generation = self._file.generation
                self._remembered.clear()
        digest = hashlib.sha256(token.encode()).digest()
        remembered = self._remembered.get(digest)
        if remembered is None:
            caller, ends_at = self._verify(token)
            self._remembered[digest] = caller, ends_at
            if len(self._remembered) > REMEMBERED_MAX:
                self._remembered.popitem(last=False)
            return caller
        caller, ends_at = remembered
        if self._now() >= ends_at:
            del self._remembered[digest]
            raise ExpiredToken(caller)
        self._remembered.move_to_end(digest)
        return caller

    def _verify(self, token: str) -> tuple[UserCaller | AdvisorCaller, float]:
        settings = self._settings
        try:
            header = jwt.get_unverified_header(token)
            key = self._key_for(header)
            claims = jwt.decode(
                token,
                key,
                algorithms=[settings.algorithm],
                audience=settings.audience,
                issuer=settings.issuer,
                # The times are checked below: there the clock is an argument.
                options={"require": _REQUIRED, "verify_exp": False, "verify_nbf": False, "verify_iat": False},
            )
        except jwt.PyJWTError:
            raise refuse_credential(_INVALID) from None
        subject = claims["sub"]
        if not is_id(subject):
            raise refuse_credential(_INVALID)
        role = claims.get("role", USER)
        caller = AdvisorCaller(subject) if role == ADVISOR else UserCaller(subject)
        ends_at = self._check_times(claims, caller)
        if role not in (USER, ADVISOR):
            raise refuse_caller()
        return caller, ends_at

    def _key_for(self, header: Mapping[str, Any]) -> bytes | jwt.PyJWK:
        kind = header.get("typ", "JWT")
        if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in _TYPES:
            raise refuse_credential(_INVALID)
        if self._file is None:
            assert self._settings.secret is not None  # noqa: S101 - settings hold one or the other
            return self._settings.secret
        key = self._file.find(header.get("kid"))
        if key is None:
            raise refuse_credential(_INVALID)
        return key

    def _check_times(self, claims: Mapping[str, Any], caller: UserCaller | AdvisorCaller) -> float:
        """Check when a token is valid, and return when it ends to be."""
        now, leeway_s = self._now(), self._settings.leeway_s
        times = [claims[name] for name in ("exp", "nbf", "iat") if name in claims]
        if not all(map(_is_time, times)):
            raise refuse_credential(_INVALID)
        ends_at: float = claims["exp"] + leeway_s
        if now >= ends_at:
            raise ExpiredToken(caller)
        if any(claims.get(name, now) > now + leeway_s for name in ("nbf", "iat")):
            raise refuse_credential(_TOO_EARLY)
        return ends_at


def _is_time(value: object) -> bool:
    """Tell whether this is a NumericDate (RFC 7519); JSON, as Python reads it, has numbers that are none."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


# --- for development --------------------------------------------------------------------------------------------------


def mint(settings: TokenSettings, subject: str, *, seconds: int, role: str | None = None) -> str:
    """Make a token that is valid for so many seconds: of the user `subject`, or with the role "advisor" of an advisor.

    Raises:
        CannotMint: the key that signs is elsewhere, or nobody would take such a token.
    """
    if settings.secret is None:
        message = (
            f"{settings.algorithm} tokens are made where the private key is; here are only public keys "
            "(TALKTIME_TOKEN_JWKS)"
        )
        raise CannotMint(message)
    if not is_id(subject) or role not in (None, USER, ADVISOR) or seconds < 1:
        message = "a token is for an id, with the role user or advisor, and for at least a second"
        raise CannotMint(message)
    issued_at = int(wall_clock())
    claims: dict[str, Any] = {
        "iss": settings.issuer,
        "aud": settings.audience,
        "sub": subject,
        "iat": issued_at,
        "exp": issued_at + seconds,
    }
    if role is not None:
        claims["role"] = role
    return jwt.encode(claims, settings.secret, algorithm=settings.algorithm)


def local(home: Path) -> TokenSettings:
    """Return settings for tokens of this machine's own, with the secret kept in `home` and made there at first use.

    Raises:
        SettingError: what is kept there is no such secret.
    """
    path = home / "token_secret"
    secret = kept_secret(path).encode()
    if len(secret) < SECRET_BYTES_MIN:
        name = "TALKTIME_HOME"
        raise SettingError(name, f"{path} is damaged; remove it")
    return TokenSettings(algorithm="HS256", secret=secret, jwks=None, issuer=_NAME, audience=_NAME, leeway_s=10)
