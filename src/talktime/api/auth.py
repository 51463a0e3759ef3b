"""Who is calling. Asked of everything under /v1, before the path, the query and the body are looked at.

There is one scheme, Bearer. What stands behind it is told apart by its form: the environment's service key, a service
key of the database (`tt_...`), or a token (three parts with dots between). Only for a key of the database is the
database asked.

A request is counted once it is known whose it is; `talktime.api.limits` says how many are taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from litestar import Request
from litestar.types import Scope

from talktime.api.callers import AdvisorCaller, Caller, ServiceCaller, UserCaller, check_access
from talktime.api.keyring import KeyRing
from talktime.api.limits import Limits
from talktime.api.problems import UNAUTHORIZED, Refusal, refuse_credential
from talktime.api.tokens import ExpiredToken, Tokens
from talktime.keys import KEY_PREFIX, digest_of
from talktime.settings import UserMay

SECURITY_SCHEME = "bearer"
"""The name of the scheme in the OpenAPI document."""

_SERVICE = ServiceCaller()
_TOKEN_DOTS = 2


class Gate:
    """Tells callers apart by their bearer credential, and lets each where it may go."""

    def __init__(self, keys: KeyRing, tokens: Tokens | None, user_may: UserMay, limits: Limits) -> None:
        self.limits = limits
        self._keys = keys
        self._tokens = tokens
        self._user_may = user_may

    async def admit(self, request: Request[Any, Any, Any]) -> None:
        """Let a request in, with its caller as `request.auth`, and count it.

        Raises:
            Refusal: no credential, one that is not valid, a caller who may not do this, or one request too many.
            DatabaseUnavailable: the database cannot be asked whether a service key is in force.
        """
        scope = request.scope
        caller = scope["auth"] = await self._admitted(scope)
        check_access(caller, request.route_handler.opt, scope["path_params"], self._user_may)

    async def _admitted(self, scope: Scope) -> Caller:
        try:
            credential = _bearer_credential(scope["headers"])
            digest = await self.find_key(credential)
            person = self._verify(credential) if digest is None else None
        except ExpiredToken as expired:
            # No guess: the host product signed it. Pages learn so that they need the next one, each on its own account.
            self.limits.count_expired(expired.caller)
            raise
        except Refusal:
            self.limits.count_refused(scope)
            raise
        if person is not None:
            self.limits.count_person(person)
            return person
        assert digest is not None  # noqa: S101 - it is the one or the other
        self.limits.count_service(digest)
        return _SERVICE

    async def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Return who is calling, without counting it.

        Raises:
            Refusal: no credential, or one that is not valid.
            DatabaseUnavailable: the database cannot be asked whether a service key is in force.
        """
        credential = _bearer_credential(headers)
        return _SERVICE if await self.find_key(credential) is not None else self._verify(credential)

    def _verify(self, credential: str) -> UserCaller | AdvisorCaller:
        if self._tokens is not None and credential.count(".") == _TOKEN_DOTS:
            return self._tokens.verify(credential)
        raise refuse_credential()

    async def find_key(self, credential: str) -> bytes | None:
        """Return the digest of a service key in force, the environment's or one of the database; else None.

        Raises:
            DatabaseUnavailable: the database cannot be asked.
        """
        digest = digest_of(credential)
        if self._keys.is_environment(digest):
            return digest
        if credential.startswith(KEY_PREFIX) and await self._keys.find(digest) is not None:
            return digest
        return None

    async def key_name(self, digest: bytes) -> str | None:
        """Return the name of the key in force that has this digest.

        Raises:
            DatabaseUnavailable: the database cannot be asked.
        """
        return await self._keys.find(digest)


def _bearer_credential(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) == 1:
        scheme, _, credential = given[0].strip().partition(b" ")
        if scheme.lower() == b"bearer" and credential.strip():
            return credential.strip().decode("latin-1")
    raise Refusal(UNAUTHORIZED, "send a service key or a token as `Authorization: Bearer <credential>`")
