"""Who is calling. Asked of everything under /v1, before the path, the query and the body are looked at.

So far there is one kind of caller, a service with the service key. A further kind (users and advisors with tokens of
the host product) is a further class in `Caller`, recognized in `Gate.identify`; what a caller may do is decided where
`request.auth` is read.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from litestar import Request

from talktime.api.problems import UNAUTHORIZED, Refusal

SECURITY_SCHEME = "bearer"
"""The name of the scheme in the OpenAPI document."""


@dataclass(frozen=True, slots=True)
class ServiceCaller:
    """A program of the host product with the service key; it may do everything."""


Caller = ServiceCaller

_SERVICE = ServiceCaller()


class Gate:
    """Tells callers apart by their bearer credential."""

    def __init__(self, service_key: str) -> None:
        self._service_digest = _digest(service_key.encode())

    def admit(self, request: Request[Any, Any, Any]) -> None:
        """Let a request in, with its caller as `request.auth`.

        Raises:
            Refusal: no credential, or one that is not known.
        """
        request.scope["auth"] = self.identify(request.scope["headers"])

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Return who is calling.

        Raises:
            Refusal: no credential, or one that is not known.
        """
        credential = _bearer_credential(headers)
        # Digests have one length, so the comparison tells nothing of the key's.
        if not hmac.compare_digest(_digest(credential), self._service_digest):
            raise Refusal(UNAUTHORIZED, "the bearer credential is not known here")
        return _SERVICE


def _bearer_credential(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) == 1:
        scheme, _, credential = given[0].strip().partition(b" ")
        if scheme.lower() == b"bearer" and credential.strip():
            return credential.strip()
    raise Refusal(UNAUTHORIZED, "send the service key as `Authorization: Bearer <key>`")


def _digest(credential: bytes) -> bytes:
    return hashlib.sha256(credential).digest()
