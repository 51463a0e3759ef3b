"""The console at /console: who gets in, and what is said when something goes wrong. Its pages are in ``views``.

Everything below /console asks for a session, but the sign-in page; and every form of a session brings its token along.
Both are checked here, before any handler runs.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from litestar import Request, Response, Router, get, post
from litestar.exceptions import HTTPException, NotFoundException
from litestar.params import FromPath, FromQuery

from talktime import errors, keys
from talktime.api.problems import Refusal
from talktime.web import views
from talktime.web.rendering import redirect, render
from talktime.web.sessions import (
    COOKIE,
    HOME,
    SIGN_IN,
    Session,
    check_csrf,
    check_same_site,
    cookie_of,
    find_session,
    form_of,
    open_session,
    safe_target,
    service_of,
    sign_in_url,
)

if TYPE_CHECKING:
    from talktime.api.auth import Gate
    from talktime.api.limits import Limits

logger = logging.getLogger(__name__)

FORM_BYTES_MAX = 16 * 1024
"""Nobody has to sign in to send the form with which one does."""

_SENTENCES = {
    400: ("This is not understood", "The link or the form is not one of this console's."),
    403: ("This is not allowed", "Nothing was changed. Open the page again, and send the form from there."),
    404: ("There is no such page", "Check the address, or look for the user."),
    408: ("This came too slowly", "Nothing was changed. Try again."),
    413: ("This is too much", "Nothing was changed."),
    429: ("Too many attempts", "Wait a moment, and try again."),
    500: ("Something went wrong on our side", "It has been logged."),
    503: (
        "The database does not answer",
        "Try again in a moment. If you have just sent a form, reload this page to send it again: it counts once.",
    ),
}
_PASSING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def console_router() -> Router:
    """Return the routes of the console."""
    return Router(
        HOME,
        route_handlers=[sign_in_page, sign_in, sign_out, unknown, *views.HANDLERS],
        before_request=admit,
        request_max_body_size=FORM_BYTES_MAX,
        exception_handlers={
            HTTPException: answer_framework_error,
            Refusal: answer_refusal,
            errors.TalktimeError: answer_domain_error,
            Exception: answer_unexpected,
        },
    )


async def admit(request: Request[Any, Any, Any]) -> Response[str] | None:
    """Let a request in with its session as `request.auth`, or send it to the sign-in page.

    Raises:
        PermissionDeniedException: a form lacks the session's token.
        Refusal: there were too many cookies that name no session.
        DatabaseUnavailable: the database cannot be asked.
    """
    if request.route_handler.opt.get("public"):
        request.scope["auth"] = None
        return None
    cookie, limits = request.cookies.get(COOKIE), _limits_of(request)
    if cookie:
        limits.count_cookie(cookie, request.scope)
    session = request.scope["auth"] = await find_session(request)
    if session is None:
        if cookie:
            limits.forget_cookie(cookie)
        return redirect(sign_in_url(request))
    limits.remember_cookie(session.token)
    if request.method != "GET":
        check_csrf(session, await form_of(request))
    return None


# --- signing in and out -----------------------------------------------------------------------------------------------


@get("/sign-in", public=True, include_in_schema=False)
async def sign_in_page(next: FromQuery[str | None] = None) -> Response[str]:  # noqa: A002 - its name in the query
    """Ask for a service key."""
    return render("sign-in.html", session=None, target=safe_target(next), refused=False)


@post("/sign-in", public=True, include_in_schema=False)
async def sign_in(request: Request[Any, Any, Any]) -> Response[str]:
    """Open a session for the holder of a service key."""
    check_same_site(request)
    form = await form_of(request)
    target = safe_target(form.get("next"))
    cookie = await open_session(request, form.get("key", "").strip())
    if cookie is None:
        _limits_of(request).count_refused(request.scope)
        return render("sign-in.html", status=HTTPStatus.FORBIDDEN, session=None, target=target, refused=True)
    _limits_of(request).remember_cookie(str(cookie.value))
    response = redirect(target)
    response.set_cookie(cookie)
    return response


def _limits_of(request: Request[Any, Any, Any]) -> Limits:
    return cast("Gate", request.app.state["gate"]).limits


@post("/sign-out", include_in_schema=False)
async def sign_out(request: Request[Any, Any, Any]) -> Response[str]:
    """Close the session."""
    session: Session = request.auth
    await keys.close_session(service_of(request).database, session.token)
    _limits_of(request).forget_cookie(session.token)
    response = redirect(SIGN_IN)
    response.set_cookie(cookie_of(request, "", 0))
    return response


# --- errors -----------------------------------------------------------------------------------------------------------


@get(
    [
        "/{rest:path}",
        "/users/{user_id:str}/{rest:path}",
        "/users/{user_id:str}/chats/{chat_id:str}/{rest:path}",
    ],
    include_in_schema=False,
)
async def unknown(rest: FromPath[str]) -> Response[str]:  # noqa: ARG001 - whatever it is
    """Say that there is no such page."""
    raise NotFoundException


def error_page(request: Request[Any, Any, Any], status: int, sentence: str | None = None) -> Response[str]:
    """Return the page that tells of an error."""
    title, default = _SENTENCES[status]
    headers = {"Retry-After": "1"} if status in _PASSING else {}
    if status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"  # the rest of the form is not read
    session = request.scope.get("auth")
    return render(
        "error.html",
        status=status,
        headers=headers,
        session=session if isinstance(session, Session) else None,
        query="",
        title=title,
        sentence=sentence or default,
    )


def answer_framework_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[str]:
    """Answer what the framework, or a page, refused."""
    if error.status_code not in _SENTENCES or error.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
        return answer_unexpected(request, error)
    return error_page(request, error.status_code)


def answer_refusal(request: Request[Any, Any, Any], refusal: Refusal) -> Response[str]:
    """Answer a link whose place in a list is none, and what comes too slowly or too often."""
    return error_page(request, refusal.kind.status)


def answer_domain_error(request: Request[Any, Any, Any], error: errors.TalktimeError) -> Response[str]:
    """Answer an error of the domain."""
    if isinstance(error, errors.NotFound):
        return error_page(request, HTTPStatus.NOT_FOUND, f"{str(error)[:1].upper()}{str(error)[1:]}.")
    if isinstance(error, errors.DatabaseUnavailable):
        return error_page(request, HTTPStatus.SERVICE_UNAVAILABLE)
    return answer_unexpected(request, error)


def answer_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[str]:
    """Answer what should not have happened: the log tells all, the page nothing."""
    logger.error("unexpected error in %s %s", request.method, request.scope.get("path_template", "?"), exc_info=error)
    return error_page(request, HTTPStatus.INTERNAL_SERVER_ERROR)
