"""The bodies that the API takes, and what may be wrong with them.

They are decoded straight into structs whose fields are types of our own, so a value is exact and valid once it is
there. Where that fails, the body is gone through again, member by member, to say all that is wrong and where.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import cache
from typing import Any, ClassVar, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import ClientException, InternalServerException
from litestar.openapi.spec import OpenAPIType, Schema
from msgspec import Struct

from talktime.api.many_beats import AnyBeats, Beat, BeatsBody, decode_beats
from talktime.api.params import ID_RULE, ID_SCHEMA, is_id
from talktime.api.problems import FAULTS_MAX, FRAMEWORK, Fault, Refusal, refuse_input
from talktime.meter.state import CreditKind, RateCard, Tariff
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

BODY_BYTES_MAX = 64 * 1024
BEATS_BYTES_MAX = 4 * 1024 * 1024
BODY_SECONDS_MAX = 10
"""How long a client may take to send its body, once its headers are there."""
MEMO_LENGTH_MAX = 500

_NO_STRING = "must be a string"
_NO_DECIMAL = 'must be a string that holds a decimal number, such as "12.5"'
_NO_NUMBER = "must be a number"
_TOO_FINE = re.compile(r"-?\d+\.\d{7,}", re.ASCII)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# More digits than this would be rounded in arithmetic, and a value too fine would pass for a whole one.
_DIGITS_MAX = 28


def _seconds_schema(us_max: int, example: int) -> Schema:
    # Nothing is computed with this float: it is a word of the document.
    return Schema(type=OpenAPIType.NUMBER, minimum=0, maximum=us_max // MICRO, multiple_of=0.000001, examples=[example])


# --- the values in bodies ---------------------------------------------------------------------------------------------


class Id(str):
    """An id of the host product."""

    __slots__ = ()
    schema: ClassVar = Schema(type=OpenAPIType.STRING, examples=["a1"], **ID_SCHEMA)

    @classmethod
    def parse(cls, value: object) -> Id:
        """Take an id."""
        if not isinstance(value, str) or not is_id(value):
            raise ValueError(ID_RULE)
        return cls(value)


class Memo(str):
    """A line of text."""

    __slots__ = ()
    schema: ClassVar = Schema(type=OpenAPIType.STRING, max_length=MEMO_LENGTH_MAX, examples=["Order 4711"])

    @classmethod
    def parse(cls, value: object) -> Memo:
        """Take a memo."""
        if not isinstance(value, str):
            raise TypeError(_NO_STRING)
        _require(f"must be at most {MEMO_LENGTH_MAX} characters", holds=len(value) <= MEMO_LENGTH_MAX)
        _require("must not hold control characters", holds=_CONTROL.search(value) is None)
        return cls(value)


class Rate(int):
    """Micro-credits per minute, from a decimal string."""

    __slots__ = ()
    schema: ClassVar = Schema(
        type=OpenAPIType.STRING,
        pattern=r"^[0-9]{1,7}(\.[0-9]{1,6})?$",
        description=f"Credits as a decimal string, from 0 to {MAX_RATE // MICRO}",
        examples=["1.5"],
    )

    @classmethod
    def parse(cls, value: object) -> Rate:
        """Take a rate."""
        rate = _credits(value)
        _require(f"must be from 0 to {format_credits(MAX_RATE)}", holds=0 <= rate <= MAX_RATE)
        return cls(rate)


class Amount(int):
    """Micro-credits to add or take, from a decimal string."""

    __slots__ = ()
    schema: ClassVar = Schema(
        type=OpenAPIType.STRING,
        pattern=r"^(?!0*(\.0*)?$)[0-9]{1,10}(\.[0-9]{1,6})?$",
        description=f"Credits as a decimal string, more than 0 and at most {MAX_AMOUNT // MICRO}; the kind says "
        "whether they come in or are taken",
        examples=["25"],
    )

    @classmethod
    def parse(cls, value: object) -> Amount:
        """Take an amount."""
        amount = _credits(value)
        _require("must be more than 0", holds=amount > 0)
        _require(f"must be at most {format_credits(MAX_AMOUNT)}", holds=amount <= MAX_AMOUNT)
        return cls(amount)


class FreeTime(int):
    """Microseconds of free time, from a number of seconds."""

    __slots__ = ()
    schema: ClassVar = _seconds_schema(MAX_FREE_US, 180)

    @classmethod
    def parse(cls, value: object) -> FreeTime:
        """Take a duration."""
        return cls(_duration(value, MAX_FREE_US))


class Block(int):
    """Microseconds of a first block or an increment, from a number of seconds."""

    __slots__ = ()
    schema: ClassVar = _seconds_schema(MAX_BLOCK_US, 60)

    @classmethod
    def parse(cls, value: object) -> Block:
        """Take a duration."""
        return cls(_duration(value, MAX_BLOCK_US))


VALUES = (Id, Memo, Rate, Amount, FreeTime, Block)
"""The types above. Each knows its schema, and parses what JSON holds; ValueError or TypeError if that is none."""


def _require(rule: str, *, holds: bool) -> None:
    if not holds:
        raise ValueError(rule)


def _credits(value: object) -> int:
    if not isinstance(value, str):
        raise TypeError(_NO_DECIMAL)
    _require("must not have more than 6 decimals", holds=_TOO_FINE.fullmatch(value) is None)
    return parse_credits(value)


def _duration(value: object, us_max: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise TypeError(_NO_NUMBER)
    seconds = Decimal(value)
    seconds_max = us_max // MICRO
    _require(f"must be from 0 to {seconds_max}", holds=seconds.is_finite() and 0 <= seconds <= seconds_max)
    _require("must not be finer than a microsecond (6 decimals)", holds=len(seconds.as_tuple().digits) <= _DIGITS_MAX)
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


BODIES = (AdvisorBody, CreditBody, StartBody, BeatsBody, Beat)
"""All bodies, and what is in them."""


class ApiRequest(Request[Any, Any, Any]):
    """A request whose JSON is decoded into the struct that its handler takes."""

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            Refusal: it did not come in time.
        """
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                return await super().body()
        except TimeoutError:
            # What is still to come is not read: the connection ends with the answer.
            raise Refusal(*FRAMEWORK[408], headers={"Connection": "close"}) from None
        except InternalServerException:
            # Litestar blames the server for a client that went away in the middle of its body.
            raise ClientException(detail="the body ended early") from None

    async def json(self) -> Any:  # noqa: ANN401 - as Litestar has it
        """Return the body as the handler's struct.

        Raises:
            Refusal: it is not JSON, or not such a struct; all that is wrong with it, and where.
        """
        media_type, parameters = self.content_type
        if media_type != "application/json" or parameters.get("charset", "utf-8").lower() != "utf-8":
            raise Refusal(*FRAMEWORK[415])
        shape, raw = self.route_handler.opt["body"], await self.body()
        if shape is not BeatsBody:
            return decode_body(shape, raw)
        beats = decode_beats(raw)
        if beats is None:
            raise refuse_input(*_faults(AnyBeats, raw))
        return beats


async def check_no_body(request: Request[Any, Any, Any]) -> None:
    """Refuse a body where none is taken; an empty object is none.

    Raises:
        Refusal: there is one.
    """
    if says_no_body(request.scope["headers"]):
        return
    if (await request.body()).strip() not in (b"", b"{}"):
        raise refuse_input(Fault("no body is taken here", pointer=""))


def says_no_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether the head of a request says that nothing follows it; to wait for what follows takes longer."""
    return not any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers
    )


def decode_body(shape: type[T], raw: bytes) -> T:
    """Decode a body.

    Raises:
        Refusal: all that is wrong with it, and where.
    """
    try:
        body: T = _decoder(shape).decode(raw)
    # msgspec's errors and UnicodeDecodeError are ValueErrors; deep nesting is a RecursionError.
    except (ValueError, RecursionError):
        raise refuse_input(*_faults(shape, raw)) from None
    # msgspec would take the last of two members of one name; with money, neither is meant.
    json.loads(raw, object_pairs_hook=_check_names)
    return body


def _check_names(members: list[tuple[str, object]]) -> None:
    if len(members) != len({name for name, _ in members}):
        raise refuse_input(Fault("holds a member twice", pointer=""))


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
        if len(faults) > FAULTS_MAX:
            break
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
