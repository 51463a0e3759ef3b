"""Sessions of the console: a cookie that names one, and the token that a form has to bring along.

A session is opened with a service key, and is over when it is closed, after 8 hours, or when the key is revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, quote, unquote

from litestar.datastructures import Cookie
from litestar.exceptions import ClientException, PermissionDeniedException

from talktime import keys

if TYPE_CHECKING:
    from litestar import Request

    from talktime.api.auth import Gate
    from talktime.operations import Service

HOME = "/console"
SIGN_IN = f"{HOME}/sign-in"
COOKIE = "talktime_console"
SESSION_SECONDS = 8 * 60 * 60
CSRF_FIELD = "csrf"

_CSRF_PURPOSE = b"talktime console form"
_FORM_FIELDS_MAX = 20
_TARGET = re.compile(r"/console(?:[/?][!-~]*)?")


@dataclass(frozen=True, slots=True)
class Session:
    """A session, and the name of the key that it was opened with."""

    token: str = field(repr=False)
    key_name: str

    @property
    def csrf(self) -> str:
        """What a form of this session has to send along: nobody can tell it without the cookie."""
        return hmac.new(self.token.encode(), _CSRF_PURPOSE, hashlib.sha256).hexdigest()


def service_of(request: Request[Any, Any, Any]) -> Service:
    """Return the application's service."""
    return cast("Service", request.app.state["service"])


def _gate_of(request: Request[Any, Any, Any]) -> Gate:
    return cast("Gate", request.app.state["gate"])


async def find_session(request: Request[Any, Any, Any]) -> Session | None:
    """Return the session that the request's cookie names, if it is in force.

    Raises:
        DatabaseUnavailable: the database cannot be asked.
    """
    token = request.cookies.get(COOKIE)
    if not token:
        return None
    digest = await keys.find_session(service_of(request).database, token)
    if digest is None:
        return None
    name = await _gate_of(request).key_name(digest)
    return None if name is None else Session(token, name)


async def open_session(request: Request[Any, Any, Any], credential: str) -> Cookie | None:
    """Open a session with a service key and return its cookie; None if no such key is in force.

    Raises:
        DatabaseUnavailable: the database cannot be asked.
    """
    digest = await _gate_of(request).find_key(credential)
    if digest is None:
        return None
    database = service_of(request).database
    if before := request.cookies.get(COOKIE):
        await keys.close_session(database, before)
    token = await keys.open_session(database, digest, seconds=SESSION_SECONDS)
    return cookie_of(request, token, SESSION_SECONDS)


def cookie_of(request: Request[Any, Any, Any], token: str, seconds: int) -> Cookie:
    """Return the cookie of a session, which no script and no other site can use."""
    return Cookie(
        key=COOKIE,
        value=token,
        max_age=seconds,
        path=HOME,
        # As a proxy that ends TLS says it, too; whoever lies about that keeps the cookie from nobody else.
        secure="https" in (request.url.scheme, request.headers.get("X-Forwarded-Proto")),
        httponly=True,
        samesite="strict",
    )


async def form_of(request: Request[Any, Any, Any]) -> dict[str, str]:
    """Return the fields of a form; of two with one name, the last.

    Raises:
        ClientException: that is no form.
    """
    raw = await request.body()
    try:
        return dict(parse_qsl(raw.decode("ascii"), keep_blank_values=True, max_num_fields=_FORM_FIELDS_MAX))
    except ValueError:
        raise ClientException from None


def check_csrf(session: Session, form: dict[str, str]) -> None:
    """Refuse a form that was not made for this session.

    Raises:
        PermissionDeniedException: the token is missing or wrong.
    """
    if not hmac.compare_digest(session.csrf.encode(), form.get(CSRF_FIELD, "").encode(errors="replace")):
        raise PermissionDeniedException


def check_same_site(request: Request[Any, Any, Any]) -> None:
    """Refuse a request that a page of another origin made, as far as the browser tells.

    Raises:
        PermissionDeniedException: another origin made it.
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None and site not in ("same-origin", "none"):
        raise PermissionDeniedException
    # Not the scheme: where a proxy ends TLS, it is not seen here.
    if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
        raise PermissionDeniedException


def sign_in_url(request: Request[Any, Any, Any]) -> str:
    """Return the sign-in page's URL, which leads back to the page that was asked for."""
    if request.method != "GET":
        return SIGN_IN
    query = request.scope["query_string"].decode("latin-1")
    target = quote(request.scope["path"]) + (f"?{query}" if query else "")
    return SIGN_IN if target == HOME else f"{SIGN_IN}?next={quote(target, safe='')}"


def safe_target(text: str | None) -> str:
    """Return where to go after signing in: the text, if it is a path of the console, else the console's first page."""
    if text is None or not _TARGET.fullmatch(text):
        return HOME
    # Browsers resolve dots, also encoded ones, and would leave the console.
    steps = unquote(text.partition("?")[0]).split("/")
    return HOME if "\\" in text or {".", ".."} & set(steps) else text
