"""Headers that browsers are to see: with every answer, and with every page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from litestar.types import Message, Scope

PAGE_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
        "Cache-Control": "no-store",
    }
)
"""What goes with every HTML page, beside its own Content-Security-Policy."""

_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
# A policy that comes with the script of a worker binds the worker: the page's own is enough.
_WITHOUT_POLICY = (b"text/javascript", b"text/css")


def complete(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return what an answer's headers lack: where it says nothing of its own, it is not kept, framed or guessed at."""
    given = {name.lower(): value for name, value in headers}
    lacking = [header for header in _ALWAYS if header[0] not in given]
    if _POLICY[0] not in given and not given.get(b"content-type", b"").startswith(_WITHOUT_POLICY):
        lacking.append(_POLICY)
    return lacking


async def complete_answer(message: Message, _: Scope) -> None:
    """Add to an answer the headers that it lacks: of every route, also where there is none."""
    if message["type"] == "http.response.start":
        headers = list(message.get("headers", ()))
        message["headers"] = [*headers, *complete(headers)]
