"""What the API takes: bodies, ids, query parameters and headers, each with what may be wrong with it.

Bodies are decoded straight into structs whose fields are types of our own, so a value is exact and valid once it is
there. Where that fails, the body is gone through again, member by member, to say all that is wrong and where.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import cache
from typing import Any, ClassVar, TypeVar
from urllib.parse import parse_qsl

import msgspec
from litestar import Request
from litestar.exceptions import ClientException, InternalServerException
from litestar.openapi.spec import OpenAPIType, Schema
from msgspec import Struct

from talktime.api.problems import UNSUPPORTED_MEDIA_TYPE, Fault, Refusal, refuse_input
from talktime.meter.state import ChatState, CreditKind, RateCard, Tariff
from talktime.meter.units import (
    MAX_AMOUNT,
    MAX_BLOCK_US,
    MAX_FREE_US,
    MAX_RATE,
    MICRO,
    format_credits,
    parse_credits,
    parse_seconds,
)

T = TypeVar("T", bound=Struct)

BODY_BYTES_MAX = 1024 * 1024
MEMO_LENGTH_MAX = 500
PAGE_DEFAULT = 50
PAGE_MAX = 200
IDEMPOTENCY_KEY = "Idempotency-Key"

ID_SCHEMA: dict[str, Any] = {"pattern": r"^[A-Za-z0-9\-_.:@+=~|]{1,128}$", "minLength": 1, "maxLength": 128}
KEY_SCHEMA: dict[str, Any] = {"pattern": "^[ -~]{1,255}$", "minLength": 1, "maxLength": 255}

_ID = re.compile(r"[A-Za-z0-9\-_.:@+=~|]{1,128}")
_ID_RULE = "must be 1 to 128 characters out of letters, digits and -_.:@+=~|, and neither . nor .."
_KEY = re.compile(r"[ -~]{1,255}")
_TOO_FINE = re.compile(r"-?\d+\.\d{7,}", re.ASCII)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# More digits than this would be rounded in arithmetic, and a value too fine would pass for a whole one.
_DIGITS_MAX = 28


# --- the values in bodies ---------------------------------------------------------------------------------------------


class Id(str):
    """An id of the host product."""

    __slots__ = ()
    schema: ClassVar = Schema(type=OpenAPIType.STRING, pattern=ID_SCHEMA["pattern"], min_length=1, max_length=128)

    @classmethod
    def parse(cls, value: object) -> Id:
        """Take an id; ValueError if it is none."""
        if not isinstance(value, str) or not _is_id(value):
            raise ValueError(_ID_RULE)
        return cls(value)


class Memo(str):
    """A line of text."""

    __slots__ = ()
    schema: ClassVar = Schema(type=OpenAPIType.STRING, max_length=MEMO_LENGTH_MAX, examples=["Order 4711"])

    @classmethod
    def parse(cls, value: object) -> Memo:
        """Take a memo; ValueError if it is none."""
        if not isinstance(value, str):
            raise ValueError("must be a string")  # noqa: TRY004 - the decoder turns it into a fault with its place
        if len(value) > MEMO_LENGTH_MAX:
            raise ValueError(f"must be at most {MEMO_LENGTH_MAX} characters, not {len(value)}")
        if _CONTROL.search(value):
            raise ValueError("must not hold control characters")
        return cls(value)


class Rate(int):
    """Micro-credits per minute, from a decimal string."""

    __slots__ = ()
    schema: ClassVar = Schema(
        type=OpenAPIType.STRING,
        pattern=r"^[0-9]{1,20}(\.[0-9]{1,6})?$",
        description=f"Credits as a decimal string, from 0 to {MAX_RATE // MICRO}",
        examples=["1.5"],
    )

    @classmethod
    def parse(cls, value: object) -> Rate:
        """Take a rate; ValueError if it is none."""
        rate = _credits(value)
        if not 0 <= rate <= MAX_RATE:
            raise ValueError(f"must be from 0 to {format_credits(MAX_RATE)}")
        return cls(rate)


class Amount(int):
    """Micro-credits to add or take, from a decimal string."""

    __slots__ = ()
    schema: ClassVar = Schema(
        type=OpenAPIType.STRING,
        pattern=r"^[0-9]{1,20}(\.[0-9]{1,6})?$",
        description=f"Credits as a decimal string, more than 0 and at most {MAX_AMOUNT // MICRO}; the kind says "
        "whether they come in or are taken",
        examples=["25"],
    )

    @classmethod
    def parse(cls, value: object) -> Amount:
        """Take an amount; ValueError if it is none."""
        amount = _credits(value)
        if amount <= 0:
            raise ValueError("must be more than 0")
        if amount > MAX_AMOUNT:
            raise ValueError(f"must be at most {format_credits(MAX_AMOUNT)}")
        return cls(amount)


class FreeTime(int):
    """Microseconds of free time, from a number of seconds."""

    __slots__ = ()
    schema: ClassVar = Schema(type=OpenAPIType.NUMBER, minimum=0, maximum=MAX_FREE_US // MICRO, examples=[180])

    @classmethod
    def parse(cls, value: object) -> FreeTime:
        """Take a duration; ValueError if it is none."""
        return cls(_duration(value, MAX_FREE_US))


class Block(int):
    """Microseconds of a first block or an increment, from a number of seconds."""

    __slots__ = ()
    schema: ClassVar = Schema(type=OpenAPIType.NUMBER, minimum=0, maximum=MAX_BLOCK_US // MICRO, examples=[60])

    @classmethod
    def parse(cls, value: object) -> Block:
        """Take a duration; ValueError if it is none."""
        return cls(_duration(value, MAX_BLOCK_US))


VALUES = (Id, Memo, Rate, Amount, FreeTime, Block)
"""The types above: each parses what JSON holds, and knows its schema."""


def _credits(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError('must be a string that holds a decimal number, such as "12.5"')  # noqa: TRY004 - as in Memo
    if _TOO_FINE.fullmatch(value):
        raise ValueError("must not have more than 6 decimals")
    return parse_credits(value)


def _duration(value: object, us_max: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise ValueError("must be a number of seconds")  # noqa: TRY004 - as in Memo
    if isinstance(value, Decimal) and len(value.as_tuple().digits) > _DIGITS_MAX:
        raise ValueError("must not be finer than a microsecond (6 decimals)")
    seconds = Decimal(value)
    if not seconds.is_finite() or not 0 <= seconds <= us_max // MICRO:
        raise ValueError(f"must be from 0 to {us_max // MICRO} seconds")
    return parse_seconds(seconds)


# --- bodies -----------------------------------------------------------------------------------------------------------


class AdvisorBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A rate card: a tariff, and the free time granted to a user at the first start with this advisor."""

    credits_per_minute: Rate
    free_seconds: FreeTime
    first_seconds: Block = Block(0)
    increment_seconds: Block = Block(0)

    def card(self) -> RateCard:
        """Return the rate card."""
        tariff = Tariff(int(self.credits_per_minute), int(self.first_seconds), int(self.increment_seconds))
        return RateCard(tariff, int(self.free_seconds))


class CreditBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Credits to add (purchase, grant, compensation) or to take (refund, correction)."""

    kind: CreditKind
    amount: Amount
    memo: Memo = Memo("")


class StartBody(Struct, frozen=True, forbid_unknown_fields=True):
    """With whom the chat is."""

    advisor_id: Id


class ApiRequest(Request[Any, Any, Any]):
    """A request whose JSON is decoded into the struct that its handler takes."""

    async def body(self) -> bytes:
        """Return the whole body."""
        try:
            return await super().body()
        except InternalServerException:
            # Litestar blames the server for a client that went away in the middle of its body.
            raise ClientException(detail="the body ended early") from None

    async def json(self) -> Any:  # noqa: ANN401 - as Litestar has it
        """Return the body as the handler's struct.

        Raises:
            Refusal: it is not JSON, or not such a struct; all that is wrong with it, and where.
        """
        if self.content_type[0].lower() != "application/json":
            raise Refusal(UNSUPPORTED_MEDIA_TYPE, "the body must be application/json")
        return decode_body(self.route_handler.opt["body"], await self.body())


def decode_body(shape: type[T], raw: bytes) -> T:
    """Decode a body.

    Raises:
        Refusal: all that is wrong with it, and where.
    """
    try:
        return _decoder(shape).decode(raw)
    # msgspec's errors and UnicodeDecodeError are ValueErrors; deep nesting is a RecursionError.
    except (ValueError, RecursionError):
        raise refuse_input(*_faults(shape, raw)) from None


@cache
def _decoder(shape: Any) -> msgspec.json.Decoder[Any]:  # noqa: ANN401 - any annotation that msgspec knows
    # Numbers with decimals are handed over as Decimals: no float lies between the text and the value.
    return msgspec.json.Decoder(shape, dec_hook=_parse_value, float_hook=_exact)


def _exact(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        # The exponent is beyond what a Decimal holds.
        return Decimal("Infinity")


def _parse_value(type_: type[Any], value: object) -> object:
    return type_.parse(value)


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _faults(shape: type[Struct], raw: bytes) -> list[Fault]:
    try:
        document = _OBJECT.decode(raw)
    except msgspec.ValidationError:
        return [Fault("must be a JSON object", pointer="")]
    except RecursionError:
        return [Fault("is nested too deeply", pointer="")]
    except UnicodeDecodeError:
        return [Fault("is not UTF-8", pointer="")]
    except ValueError as error:
        return [Fault(f"is not JSON: {error}", pointer="")]
    fields = {field.encode_name: field for field in msgspec.structs.fields(shape)}
    faults = [
        Fault("is required", pointer=f"/{name}")
        for name, field in fields.items()
        if field.required and name not in document
    ]
    for name, value in document.items():
        pointer = f"/{name.replace('~', '~0').replace('/', '~1')}"
        if name not in fields:
            faults.append(Fault("is not known here", pointer=pointer))
        elif fault := _fault_in(fields[name].type, bytes(value), pointer):
            faults.append(fault)
    # Decoding failed, so something is wrong, though no member is: then the wrong one was shadowed by its namesake.
    return faults or [Fault("holds a member twice", pointer="")]


_PLACE = re.compile(r" - at `\$(.*)`$", re.DOTALL)


def _fault_in(type_: Any, raw: bytes, pointer: str) -> Fault | None:  # noqa: ANN401 - as in _decoder
    try:
        _decoder(type_).decode(raw)
    except UnicodeDecodeError:
        return Fault("is not UTF-8", pointer=pointer)
    except ValueError as error:
        if isinstance(type_, type) and issubclass(type_, Enum):
            return Fault(f"must be one of {', '.join(member.value for member in type_)}", pointer=pointer)
        text = str(error)
        place = _PLACE.search(text)
        if place is None:
            return Fault(text, pointer=pointer)
        steps = re.findall(r"[^.\[\]]+", place[1])
        return Fault(text[: place.start()], pointer="/".join((pointer, *steps)))
    return None


# --- paths, queries and headers ---------------------------------------------------------------------------------------


def _is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None and text not in (".", "..")


def check_ids(**ids: str) -> None:
    """Check the ids in a path.

    Raises:
        Refusal: at least one is none.
    """
    faults = [Fault(_ID_RULE, parameter=name) for name, text in ids.items() if not _is_id(text)]
    if faults:
        raise refuse_input(*faults)


async def check_request(request: Request[Any, Any, Any]) -> None:
    """Check what no single parameter can tell: Litestar's hook before parameters are read.

    A handler's `opt` says which query parameters it knows (`query`), and whether it takes an idempotency key (`key`:
    "required" or "optional").

    Raises:
        Refusal: something is wrong with the path, the query or a header.
    """
    scope, opt = request.scope, request.route_handler.opt
    if b"%2f" in (scope.get("raw_path") or b"").lower():
        # The server decoded it, so that the ids may have fallen apart elsewhere than the caller thinks.
        raise refuse_input(Fault("must not hold an encoded slash", parameter="path"))
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


# A cursor names its list, so that one of another list is not taken for a place in this one.
_NUMBER_KEY = re.compile(r"-?\d{1,18}", re.ASCII)
_CHATS_KEY = re.compile(rf"(-?\d{{1,18}}):({_ID.pattern})", re.ASCII)


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
    if not _NUMBER_KEY.fullmatch(key):
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
    if match is None:
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
