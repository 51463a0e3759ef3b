"""What the API answers: one struct per JSON object, and how micro-credits and microseconds are written in them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from litestar import Response
from litestar.response.base import ASGIResponse
from litestar.status_codes import HTTP_200_OK
from litestar.types import Message, Receive, Scope, Send, Serializer
from msgspec import Meta, Struct

from talktime.api.headers import encode_headers
from talktime.meter.reading import AccountReading, Reading
from talktime.meter.state import RateCard, Tariff
from talktime.meter.units import MICRO, format_credits, format_seconds
from talktime.operations import SegmentView
from talktime.store.ledger import LedgerEntry

JSON = "application/json"

# Exact: Decimals are written as JSON numbers with all their digits, and no value here is ever a float.
_ENCODER = msgspec.json.Encoder(decimal_format="number")

_INSTANT = {"extra": {"format": "date-time"}, "examples": ["2026-11-20T19:46:10.123456Z"]}
_CREDITS = {"extra": {"pattern": r"^-?[0-9]+\.[0-9]{6}$"}, "examples": ["12.345678"]}


def _instant(description: str) -> Meta:
    return Meta(description=description, extra_json_schema=_INSTANT)


Instant = Annotated[str, _instant("RFC 3339, UTC, microseconds")]
Credits = Annotated[str, Meta(description="Credits, exact to 6 decimals", extra_json_schema=_CREDITS)]
Seconds = Annotated[
    int | Decimal, Meta(description="Seconds, exact", extra_json_schema={"extra": {"type": "number", "one_of": None}})
]


class TariffBody(Struct, frozen=True):
    """A price."""

    credits_per_minute: Credits
    first_seconds: Seconds
    increment_seconds: Seconds


class AdvisorAnswer(Struct, frozen=True):
    """The rate card in force for an advisor."""

    advisor_id: str
    credits_per_minute: Credits
    free_seconds: Seconds
    first_seconds: Seconds
    increment_seconds: Seconds
    default: Annotated[bool, Meta(description="Whether this is the default card: the advisor has none of its own")]


class ReadingBody(Struct, frozen=True):
    """What one chat's clock and its user's balance show at one instant."""

    user_id: str
    chat_id: str
    advisor_id: str
    state: Annotated[str, Meta(description="running, lapsed, paused, exhausted, abandoned or ended")]
    accruing: Annotated[bool, Meta(description="The clock runs now")]
    revision: Annotated[int, Meta(description="Drop a reading whose (revision, as_of) is lower than what you have")]
    as_of: Instant
    server_time: Instant
    elapsed_us: int
    free_used_us: int
    free_left_us: int
    credits_used: Credits
    balance: Annotated[Credits | None, Meta(description="The user's, after all chats; null for advisors")]
    tariff: TariffBody
    count_us: Annotated[int, Meta(description="Paid time in the present count")]
    accrues_until: Annotated[str | None, _instant("Where the clock stops if no further command comes")]
    paid_from: Annotated[str | None, _instant("From when its ticks are paid, if before `accrues_until`; else null")]
    free_until: Annotated[str | None, _instant("The first tick that is not free, if all clocks keep running")]
    exhausts_at: Annotated[
        str | None, _instant("When credits run out, if all clocks keep running; null if never, and for advisors")
    ]
    started_at: Annotated[str, _instant("The chat's first start")]
    stopped_at: Instant | None
    stop_reason: Annotated[str | None, Meta(description="lapsed, exhausted, switched, paused or ended")]
    materialized_through: Annotated[str | None, _instant("What is stored is as of this instant; null for advisors")]
    heartbeat_seconds: Annotated[Seconds, Meta(description="How often to send a heartbeat while the clock runs")]


class BeatResult(Struct, frozen=True, omit_defaults=True):
    """What became of one heartbeat; of one that was refused, why: as its own route would answer."""

    status: Annotated[int, Meta(description="200, or that of the problem")]
    state: Annotated[str | None, Meta(description="The chat's state now; absent if there is no such chat")] = None
    accruing: Annotated[bool | None, Meta(description="The clock runs now; absent if it was refused")] = None
    code: Annotated[str | None, Meta(description="Of the problem, if it was refused")] = None


class BeatResults(Struct, frozen=True):
    """The results of many heartbeats, in the order in which they were sent."""

    results: list[BeatResult]


class AccountAnswer(Struct, frozen=True):
    """A user's account at one instant."""

    user_id: str
    as_of: Instant
    server_time: Instant
    balance: Annotated[Credits, Meta(description="What is left now, after all that is accrued")]
    accrued: Annotated[Credits, Meta(description="The cost so far of the segments that are open")]
    running: Annotated[list[ReadingBody], Meta(description="The chats whose clocks run")]
    exhausts_at: Instant | None
    materialized_through: Instant


class LedgerEntryBody(Struct, frozen=True):
    """One line of an account's ledger; what takes credits is negative."""

    number: int
    kind: Annotated[str, Meta(description="purchase, grant, compensation, refund, correction, opening or charge")]
    amount: Credits
    balance_after: Credits
    happened_at: Instant
    recorded_at: Instant
    memo: str
    chat_id: str | None
    segment_started_at: Instant | None


class SegmentBody(Struct, frozen=True):
    """One stretch in which a chat's clock ran; `ended_at` and `stop_reason` are null while it does."""

    started_at: Instant
    ended_at: Instant | None
    stop_reason: str | None
    elapsed_us: int
    free_us: int
    paid_us: int
    cost: Credits
    tariff: TariffBody


_NEXT = Meta(description="The `cursor` of the next page; null on the last one")


class ReadingPage(Struct, frozen=True):
    """A page of readings, the chat started last first."""

    items: list[ReadingBody]
    next: Annotated[str | None, _NEXT]


class LedgerPage(Struct, frozen=True):
    """A page of the ledger, newest first."""

    items: list[LedgerEntryBody]
    next: Annotated[str | None, _NEXT]


class SegmentPage(Struct, frozen=True):
    """A page of a chat's segments, oldest first."""

    items: list[SegmentBody]
    next: Annotated[str | None, _NEXT]


class Health(Struct, frozen=True):
    """That all is well."""

    status: str


class JsonResponse(Response[Any]):
    """A response whose content is written with exact numbers."""

    def render(self, content: Any, media_type: str, enc_hook: Serializer | None = None) -> bytes:  # noqa: ANN401, ARG002 - as Litestar has it
        """Write the content as JSON; what is bytes already stays as it is."""
        return content if isinstance(content, bytes) else encoded(content)

    def to_asgi_response(self, app: Any, request: Any, **given: Any) -> ASGIResponse:  # noqa: ANN401 - as Litestar has it
        """Return the answer as it is sent. Most have neither cookies nor work to do afterwards."""
        if self.cookies or self.background or given.get("cookies") or given.get("background"):
            return super().to_asgi_response(app, request, **given)
        headers = {
            "Content-Type": self.media_type or JSON,
            **(given.get("headers") or {}),
            **self.headers,
        }
        status = self.status_code or given.get("status_code") or HTTP_200_OK
        return ReadyAnswer(status, encode_headers(headers), self.render(self.content, ""))


class ReadyAnswer(ASGIResponse):
    """Two messages, and nothing else to decide; Litestar's own takes a tenth of a reading's time."""

    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        sized = [*headers, (b"content-length", b"%d" % len(body))]
        self._messages: tuple[Message, Message] = (
            {"type": "http.response.start", "status": status, "headers": sized},
            {"type": "http.response.body", "body": body, "more_body": False},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as in ASGI
        """Send it."""
        for message in self._messages:
            await send(message)


def encoded(content: object) -> bytes:
    """Write a struct as JSON, with exact numbers."""
    return _ENCODER.encode(content)


def format_instant(at: int) -> str:
    """Write an instant as RFC 3339 in UTC, always with 6 decimals and Z."""
    second, us = divmod(at, MICRO)
    return f"{_format_second(second)}.{us:06d}Z"


@lru_cache(maxsize=4096)
def _format_second(second: int) -> str:
    # A page of readings names the same few seconds over and over.
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _instant_or_null(at: int | None) -> str | None:
    return None if at is None else format_instant(at)


@lru_cache(maxsize=1024)
def _tariff_body(tariff: Tariff) -> TariffBody:
    return TariffBody(format_credits(tariff.rate), format_seconds(tariff.first_us), format_seconds(tariff.increment_us))


def advisor_answer(advisor_id: str, card: RateCard, *, default: bool) -> AdvisorAnswer:
    """Write a rate card."""
    tariff = _tariff_body(card.tariff)
    return AdvisorAnswer(
        advisor_id=advisor_id,
        credits_per_minute=tariff.credits_per_minute,
        free_seconds=format_seconds(card.free_us),
        first_seconds=tariff.first_seconds,
        increment_seconds=tariff.increment_seconds,
        default=default,
    )


def reading_body(reading: Reading, heartbeat_us: int, *, for_advisor: bool = False) -> ReadingBody:
    """Write a reading. An advisor does not see what the user has, when it will be gone, nor what else the user does."""
    return ReadingBody(
        user_id=reading.user_id,
        chat_id=reading.chat_id,
        advisor_id=reading.advisor_id,
        state=reading.state.value,
        accruing=reading.accruing,
        revision=reading.revision,
        as_of=format_instant(reading.as_of),
        server_time=format_instant(reading.server_time),
        elapsed_us=reading.elapsed_us,
        free_used_us=reading.free_used_us,
        free_left_us=reading.free_left_us,
        credits_used=format_credits(reading.credits_used),
        balance=None if for_advisor else format_credits(reading.balance),
        tariff=_tariff_body(reading.tariff),
        count_us=reading.count_us,
        accrues_until=_instant_or_null(reading.accrues_until),
        paid_from=_instant_or_null(reading.paid_from),
        free_until=_instant_or_null(reading.free_until),
        exhausts_at=None if for_advisor else _instant_or_null(reading.exhausts_at),
        started_at=format_instant(reading.started_at),
        stopped_at=_instant_or_null(reading.stopped_at),
        stop_reason=None if reading.stop_reason is None else reading.stop_reason.value,
        materialized_through=None if for_advisor else format_instant(reading.materialized_through),
        heartbeat_seconds=format_seconds(heartbeat_us),
    )


def account_answer(account: AccountReading, heartbeat_us: int) -> AccountAnswer:
    """Write an account."""
    return AccountAnswer(
        user_id=account.user_id,
        as_of=format_instant(account.as_of),
        server_time=format_instant(account.server_time),
        balance=format_credits(account.balance),
        accrued=format_credits(account.accrued),
        running=[reading_body(reading, heartbeat_us) for reading in account.running],
        exhausts_at=_instant_or_null(account.exhausts_at),
        materialized_through=format_instant(account.materialized_through),
    )


def ledger_entry_body(entry: LedgerEntry) -> LedgerEntryBody:
    """Write a ledger entry; its idempotency key stays here."""
    return LedgerEntryBody(
        number=entry.number,
        kind=entry.kind,
        amount=format_credits(entry.amount),
        balance_after=format_credits(entry.balance_after),
        happened_at=format_instant(entry.happened_at),
        recorded_at=format_instant(entry.recorded_at),
        memo=entry.memo,
        chat_id=entry.chat_id,
        segment_started_at=_instant_or_null(entry.segment_started_at),
    )


def segment_body(segment: SegmentView) -> SegmentBody:
    """Write a segment."""
    return SegmentBody(
        started_at=format_instant(segment.started_at),
        ended_at=_instant_or_null(segment.ended_at),
        stop_reason=None if segment.stop_reason is None else segment.stop_reason.value,
        elapsed_us=segment.elapsed_us,
        free_us=segment.free_us,
        paid_us=segment.paid_us,
        cost=format_credits(segment.cost),
        tariff=_tariff_body(segment.tariff),
    )
