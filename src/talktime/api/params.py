"""Ids in paths, query parameters, cursors and headers, and what may be wrong with them."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from typing import Annotated, Any
from urllib.parse import parse_qsl

from litestar import Request
from litestar.openapi.spec import OpenAPIType
from litestar.params import HeaderParameter, PathParameter, QueryParameter

from talktime.api.problems import Fault, Refusal, refuse_input
from talktime.meter.state import ChatState
from talktime.meter.units import END_OF_TIME_US

PAGE_DEFAULT = 50
PAGE_MAX = 200
IDEMPOTENCY_KEY = "Idempotency-Key"

ID_SCHEMA: dict[str, Any] = {"pattern": r"^(?!\.\.?$)[A-Za-z0-9_.:@+=~|-]{1,128}$", "min_length": 1, "max_length": 128}
KEY_SCHEMA: dict[str, Any] = {"pattern": "^[ -~]{1,255}$", "min_length": 1, "max_length": 255}

ID_RULE = "must be 1 to 128 characters out of letters, digits and -_.:@+=~|, and neither . nor .."

AdvisorId = Annotated[str, PathParameter(description="The advisor's id", schema_extra=ID_SCHEMA)]
UserId = Annotated[str, PathParameter(description="The user's id", schema_extra=ID_SCHEMA)]
ChatId = Annotated[str, PathParameter(description="The chat's id, unique for this user", schema_extra=ID_SCHEMA)]
Limit = Annotated[
    str | None,
    QueryParameter(
        description="How many items a page has at most",
        schema_extra={
            "type": OpenAPIType.INTEGER,
            "one_of": None,
            "minimum": 1,
            "maximum": PAGE_MAX,
            "default": PAGE_DEFAULT,
        },
    ),
]
Cursor = Annotated[
    str | None,
    QueryParameter(
        description="The `next` of the page before", schema_extra={"type": OpenAPIType.STRING, "one_of": None}
    ),
]
State = Annotated[
    str | None,
    QueryParameter(
        name="state",
        description="Only chats in this state, as it is now",
        schema_extra={"type": OpenAPIType.STRING, "one_of": None, "enum": [state.value for state in ChatState]},
    ),
]
CreditKey = Annotated[
    str,
    HeaderParameter(
        name=IDEMPOTENCY_KEY,
        description="Names this credit for ever, once per user: repeating it changes nothing and gives the same answer",
        schema_extra=KEY_SCHEMA,
    ),
]
StartKey = Annotated[
    str | None,
    HeaderParameter(
        name=IDEMPOTENCY_KEY,
        description="Names this start: repeating the chat's latest start changes nothing, so that a delayed duplicate "
        "does not restart a paused clock",
        schema_extra={"type": OpenAPIType.STRING, "one_of": None, **KEY_SCHEMA},
    ),
]

_ID = re.compile(r"[A-Za-z0-9_.:@+=~|-]{1,128}")
_LIMIT = re.compile(r"\d{1,9}", re.ASCII)
_KEY = re.compile(r"[ -~]{1,255}")


def is_id(text: str) -> bool:
    """Tell whether this is an id of the host product."""
    return _ID.fullmatch(text) is not None and text not in (".", "..")


def check_ids(**ids: str) -> None:
    """Check the ids in a path.

    Raises:
        Refusal: at least one is none.
    """
    faults = [Fault(ID_RULE, parameter=name) for name, text in ids.items() if not is_id(text)]
    if faults:
        raise refuse_input(*faults)


def check_path(request: Request[Any, Any, Any]) -> None:
    """Refuse encoded and doubled slashes: the path falls apart elsewhere than the caller thinks.

    Raises:
        Refusal: there is one.
    """
    raw = (request.scope.get("raw_path") or b"").lower()
    if b"%2f" in raw:
        raise refuse_input(Fault("must not hold an encoded slash", parameter="path"))
    # The framework would take two slashes for one, and so a path with an empty id for that of something else.
    if b"//" in raw:
        raise refuse_input(Fault("must not hold an empty part", parameter="path"))


def check_request(request: Request[Any, Any, Any]) -> None:
    """Check what no single parameter can tell.

    A handler's `opt` says which query parameters it knows (`query`), and whether it takes an idempotency key (`key`:
    "required" or "optional").

    Raises:
        Refusal: something is wrong with the path, the query or a header.
    """
    check_path(request)
    scope, opt = request.scope, request.route_handler.opt
    faults = []
    if scope["query_string"]:
        known = opt.get("query", ())
        given = Counter(name for name, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        faults += [Fault("is not known here", parameter=name) for name in given if name not in known]
        faults += [Fault("is given twice", parameter=name) for name, n in given.items() if n > 1 and name in known]
    if "key" in opt:
        keys = request.headers.getall(IDEMPOTENCY_KEY, [])
        if not keys and opt["key"] == "required":
            faults.append(Fault("is required", header=IDEMPOTENCY_KEY))
        if len(keys) > 1:
            faults.append(Fault("is given twice", header=IDEMPOTENCY_KEY))
        elif keys and not _KEY.fullmatch(keys[0]):
            faults.append(Fault("must be 1 to 255 printable ASCII characters", header=IDEMPOTENCY_KEY))
    if faults:
        raise refuse_input(*faults)


def parse_state(text: str | None) -> ChatState | None:
    """Take the state to select by.

    Raises:
        Refusal: there is no such state.
    """
    if text is None:
        return None
    try:
        return ChatState(text)
    except ValueError:
        raise refuse_input(Fault(f"must be one of {', '.join(ChatState)}", parameter="state")) from None


def parse_limit(text: str | None) -> int:
    """Take how many items a page is to have at most.

    Raises:
        Refusal: it is no such number.
    """
    if text is None:
        return PAGE_DEFAULT
    if not _LIMIT.fullmatch(text) or not 1 <= int(text) <= PAGE_MAX:
        raise refuse_input(Fault(f"must be an integer from 1 to {PAGE_MAX}", parameter="limit"))
    return int(text)


# A cursor names its list, so that one of another list is not taken for a place in this one.
_NUMBER_KEY = re.compile(r"\d{1,18}", re.ASCII)
_CHATS_KEY = re.compile(rf"(\d{{1,18}}):({_ID.pattern})", re.ASCII)


def write_cursor(listing: str, key: int | None) -> str | None:
    """Make the opaque cursor for the page that begins at `key`; None if there is none."""
    return None if key is None else _encode(f"{listing}:{key}")


def read_cursor(listing: str, cursor: str | None) -> int | None:
    """Return the key in a cursor.

    Raises:
        Refusal: it is no cursor of this list.
    """
    if cursor is None:
        return None
    key = _decode(listing, cursor)
    if not _NUMBER_KEY.fullmatch(key) or int(key) > END_OF_TIME_US:
        raise _bad_cursor()
    return int(key)


def write_chats_cursor(key: tuple[int, str] | None) -> str | None:
    """Make the opaque cursor for a page of chats; None if there is none."""
    return None if key is None else _encode(f"chats:{key[0]}:{key[1]}")


def read_chats_cursor(cursor: str | None) -> tuple[int, str] | None:
    """Return the key in a cursor of chats.

    Raises:
        Refusal: it is no such cursor.
    """
    if cursor is None:
        return None
    match = _CHATS_KEY.fullmatch(_decode("chats", cursor))
    if match is None or not is_id(match[2]) or int(match[1]) > END_OF_TIME_US:
        raise _bad_cursor()
    return int(match[1]), match[2]


def _encode(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode(listing: str, cursor: str) -> str:
    try:
        text = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        raise _bad_cursor() from None
    # Only what was written here is read: base64 has several spellings of the same bytes.
    if not text.startswith(f"{listing}:") or _encode(text) != cursor:
        raise _bad_cursor()
    return text.removeprefix(f"{listing}:")


def _bad_cursor() -> Refusal:
    return refuse_input(Fault("must be the `next` of an earlier page of this list", parameter="cursor"))
