"""Problem documents (RFC 9457): which error has which status, code and title, in one table; and the answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from msgspec import UNSET, Struct, UnsetType

from talktime import errors
from talktime.api.headers import complete, encode_headers
from talktime.api.schemas import JsonResponse, ReadingBody, reading_body
from talktime.meter.reading import Reading

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"

FAULTS_MAX = 20
"""An answer must not cost many times what the request did."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem. Its code and title never vary, so that clients can rely on them."""

    status: int
    code: str
    title: str


INVALID_INPUT = Kind(400, "invalid-input", "The request is not valid")
UNAUTHORIZED = Kind(401, "unauthorized", "Authentication is required")
FORBIDDEN = Kind(403, "forbidden", "This is not allowed")
NOT_FOUND = Kind(404, "not-found", "There is no such path")
METHOD_NOT_ALLOWED = Kind(405, "method-not-allowed", "This path does not take this method")
TIMEOUT = Kind(408, "request-timeout", "The request came too slowly")
TOO_LARGE = Kind(413, "content-too-large", "The body is too large")
UNSUPPORTED_MEDIA_TYPE = Kind(415, "unsupported-media-type", "The body is not of a type that is taken here")
TOO_MANY_REQUESTS = Kind(429, "too-many-requests", "Too many requests")
UNAVAILABLE = Kind(503, "unavailable", "The database does not answer")
OVERLOADED = Kind(503, "overloaded", "Too many requests are waiting")
INTERNAL = Kind(500, "internal-error", "Something went wrong on our side")

FORBIDDEN_DETAIL = "this caller may not do this"
"""All that is said with a 403: whether what was asked for exists is not for this caller to know."""

_CHALLENGE = 'Bearer realm="talktime"'

DOMAIN: Mapping[type[errors.TalktimeError], Kind] = {
    errors.UserNotFound: Kind(404, "user-not-found", "The user has no account"),
    errors.ChatNotFound: Kind(404, "chat-not-found", "The user has no such chat"),
    errors.WrongAdvisor: Kind(409, "wrong-advisor", "The chat belongs to another advisor"),
    errors.ChatNotActive: Kind(409, "chat-not-active", "The chat is over until it is started again"),
    errors.InsufficientBalance: Kind(409, "insufficient-balance", "The balance is too small"),
    errors.BalanceLimitExceeded: Kind(409, "balance-limit-exceeded", "The balance would be too large"),
    errors.IdempotencyKeyReused: Kind(422, "idempotency-key-reused", "The Idempotency-Key belongs to another request"),
    errors.Overloaded: OVERLOADED,
    errors.DatabaseUnavailable: UNAVAILABLE,
}
"""The one place where an error of the domain gets a status."""

FRAMEWORK: Mapping[int, tuple[Kind, str]] = {
    400: (INVALID_INPUT, "the request is not valid"),
    401: (UNAUTHORIZED, "authentication is required"),
    403: (FORBIDDEN, FORBIDDEN_DETAIL),
    404: (NOT_FOUND, "no such path"),
    405: (METHOD_NOT_ALLOWED, "this path does not take this method; see Allow"),
    408: (TIMEOUT, "the body did not come in time"),
    413: (TOO_LARGE, "the body is larger than is taken here"),
    415: (UNSUPPORTED_MEDIA_TYPE, "the body must be application/json, in UTF-8"),
    429: (TOO_MANY_REQUESTS, "more requests than this caller is allowed; see Retry-After"),
}
"""What Litestar refuses, or what goes before it, by status: the kind, and what is said of it."""


class Fault(Struct, frozen=True, omit_defaults=True):
    """One thing that is wrong with a request, and where: in the body, the path or query, or a header."""

    detail: str
    pointer: str | UnsetType = UNSET
    parameter: str | UnsetType = UNSET
    header: str | UnsetType = UNSET


class ProblemBody(Struct, frozen=True, omit_defaults=True):
    """A problem document."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[Fault] | UnsetType = UNSET
    reading: ReadingBody | UnsetType = UNSET


class Refusal(Exception):
    """A request that the API itself turns down."""

    def __init__(
        self, kind: Kind, detail: str, faults: Sequence[Fault] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        self.kind = kind
        self.detail = detail
        self.faults = faults
        self.headers = headers
        super().__init__(detail)


def refuse_input(*faults: Fault) -> Refusal:
    """Return the refusal of a request with these faults, of which the first `FAULTS_MAX` are told."""
    told = faults[:FAULTS_MAX]
    details = [f"{_place_of(fault)}{fault.detail}" for fault in told]
    if len(faults) > len(told):
        details.append("and more")
    return Refusal(INVALID_INPUT, "; ".join(details), told)


def refuse_credential(detail: str = "the bearer credential is not valid here") -> Refusal:
    """Return the refusal of a request whose credential lets nobody in. The detail never holds the credential."""
    return Refusal(UNAUTHORIZED, detail, headers={"WWW-Authenticate": f'{_CHALLENGE}, error="invalid_token"'})


def refuse_caller() -> Refusal:
    """Return the refusal of a caller that is known, and may not do this; it is always the same."""
    return Refusal(FORBIDDEN, FORBIDDEN_DETAIL)


def refuse_flood() -> Refusal:
    """Return the refusal of a request that is one too many."""
    return Refusal(*FRAMEWORK[429])


def _place_of(fault: Fault) -> str:
    place = fault.pointer or fault.parameter or fault.header
    return f"{place}: " if place else ""


def type_of(kind: Kind) -> str:
    """Return the `type` of a problem document."""
    return f"urn:talktime:problem:{kind.code}"


def problem(
    kind: Kind,
    detail: str,
    *,
    faults: Sequence[Fault] = (),
    reading: ReadingBody | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response[Any]:
    """Return the response that tells of a problem."""
    body = _document(kind, detail, errors=list(faults) or UNSET, reading=UNSET if reading is None else reading)
    return JsonResponse(
        body, status_code=kind.status, headers={**_headers_of(kind), **(headers or {})}, media_type=PROBLEM_JSON
    )


@dataclass(frozen=True, slots=True)
class RawProblem:
    """A problem as it is sent where the framework has no part in it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def raw_problem(kind: Kind, detail: str, headers: Mapping[str, str] | None = None) -> RawProblem:
    """Return what tells of a problem where the framework has no part in it."""
    body = msgspec.json.encode(_document(kind, detail))
    also = {"Content-Type": PROBLEM_JSON, "Content-Length": str(len(body)), **_headers_of(kind), **(headers or {})}
    sent = encode_headers(also)
    return RawProblem(kind.status, [*sent, *complete(sent)], body)


def _document(kind: Kind, detail: str, **members: Any) -> ProblemBody:  # noqa: ANN401 - those of the struct
    return ProblemBody(
        type=type_of(kind), title=kind.title, status=kind.status, code=kind.code, detail=detail, **members
    )


def _headers_of(kind: Kind) -> dict[str, str]:
    headers = {"Cache-Control": "no-store"}
    if kind is UNAUTHORIZED:
        headers["WWW-Authenticate"] = _CHALLENGE
    if kind in (TOO_MANY_REQUESTS, UNAVAILABLE, OVERLOADED):
        headers["Retry-After"] = "1"
    return headers


def answer_refusal(_: Request[Any, Any, Any], error: Refusal) -> Response[Any]:
    """Answer a request that the API turned down."""
    return problem(error.kind, error.detail, faults=error.faults, headers=error.headers)


def kind_of(error: Exception) -> Kind:
    """Return what kind of problem an error is."""
    return next((DOMAIN[cls] for cls in type(error).__mro__ if cls in DOMAIN), INTERNAL)


def answer_domain_error(request: Request[Any, Any, Any], error: errors.TalktimeError) -> Response[Any]:
    """Answer an error of the domain."""
    kind = kind_of(error)
    if kind is INTERNAL:
        return answer_unexpected(request, error)
    reading = None
    if isinstance(error, errors.ChatNotActive) and isinstance(error.reading, Reading):
        reading = reading_body(error.reading, request.app.state["heartbeat_us"])
    return problem(kind, str(error) or kind.title, reading=reading)


def answer_framework_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Answer an error that Litestar raised; its texts vary and quote the request, so ours stand in for them."""
    if error.status_code not in FRAMEWORK:
        return answer_unexpected(request, error)
    kind, detail = FRAMEWORK[error.status_code]
    if isinstance(error, ValidationException):
        # Handlers take strings, and bodies that are decoded already: only an absent body gets as far as here.
        return answer_refusal(request, refuse_input(Fault("a JSON body is required", pointer="")))
    return problem(kind, detail, headers=error.headers)


def answer_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer what should not have happened: the log tells all, the client learns nothing."""
    # The route, not the path: ids stay out of the log.
    route = request.scope.get("path_template", "?")
    logger.error("unexpected error in %s %s", request.method, route, exc_info=error)
    return problem(INTERNAL, "an unexpected error; it has been logged")
