"""The id of a request, by which its lines in logs are found: the caller's own, if that is plain, else a new one."""

from __future__ import annotations

import logging
import re
import secrets
from itertools import count
from typing import TYPE_CHECKING

from talktime.logs import REQUEST_ID

if TYPE_CHECKING:
    from litestar.types import Scope

HEADER = "X-Request-Id"

_NAME = HEADER.lower().encode()
_IS_SANE = re.compile(rb"[A-Za-z0-9_.:=+/-]{1,128}").fullmatch

# Not secret, but unlike those of other processes. A random one each time would take longer than all else here.
_OF_THIS_PROCESS = secrets.token_hex(6)
_numbers = count(1)

log = logging.getLogger(__name__)


def begin_request(scope: Scope) -> tuple[bytes, bytes]:
    """Give a request its id, in what is logged from now on too, and return the header that tells it."""
    text = None
    for name, value in scope["headers"]:
        if name == _NAME and _IS_SANE(value):
            text = value.decode()
            break
    if text is None:
        text = f"{_OF_THIS_PROCESS}-{next(_numbers):x}"
    REQUEST_ID.set(text)
    header = scope["state"][HEADER] = _NAME, text.encode()
    return header


def id_header(scope: Scope) -> tuple[bytes, bytes]:
    """Return the header that tells a request's id."""
    header: tuple[bytes, bytes] | None = scope["state"].get(HEADER)
    return begin_request(scope) if header is None else header


def log_request(method: str, path: str, status: int, seconds: float) -> None:
    """Write a line of a request that was answered: its route, never its path, for ids stay out of logs."""
    took_ms = round(seconds * 1000, 3)
    log.info(
        "%s %s %d in %g ms",
        method,
        path,
        status,
        took_ms,
        extra={"fields": {"method": method, "route": path, "status": status, "took_ms": took_ms}},
    )
