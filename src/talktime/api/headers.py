"""Headers that browsers are to see: with every answer, and with every page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from talktime.api.requests import id_header

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


def completing(app: ASGIApp) -> ASGIApp:
    """Return an application whose answers, those of no route too, have the headers that this one's lack, and an id."""

    async def completed(scope: Scope, receive: Receive, send: Send) -> None:
        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                message["headers"] = [*headers, *complete(headers), id_header(scope)]
            await send(message)

        await app(scope, receive, say)

    return completed


def encode_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as ASGI has them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
