"""The old tables' rows as values, and how their figures are read and added up."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation, localcontext
from typing import NamedTuple

from talktime.meter.units import MICRO


class OldUser(NamedTuple):
    """A row of the old users: figures as the database writes them."""

    user_id: str | None
    credits: str | None


class OldRecord(NamedTuple):
    """A time record: figures as the database writes them, times in seconds; instants in microseconds since 1970."""

    record_id: str | None
    user_id: str | None
    advisor_id: str | None
    chat_id: str | None
    duration: str | None
    credits_used: str | None
    free_time_used: str | None
    allocation: str | None
    is_active: bool
    recorded_at: int | None
    heartbeat_at: int | None


class OldChat(NamedTuple):
    """A row of the old chats."""

    chat_id: str | None
    user_id: str | None
    advisor_id: str | None
    duration: str | None


class Figures(NamedTuple):
    """What is added up before and after: microseconds and micro-credits."""

    elapsed_us: int = 0
    free_us: int = 0
    cost: int = 0
    credits: int = 0

    def plus(self, other: Figures) -> Figures:
        """Add, figure by figure."""
        return Figures(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


NOTHING = Figures()


class Listed(NamedTuple):
    """Something that was not taken over as it is: which row, why, and the figures that were left out."""

    user_id: str
    row: str
    reason: str
    figures: Figures


def scaled(text: str, scale: int) -> int | None:
    """Return a decimal number in integer parts, rounded half to even; None if it is none, or out of all bounds."""
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        return None
    if not value.is_finite() or value.adjusted() > 15:  # noqa: PLR2004 - beyond 64 bits, whatever it is measured in
        return None
    with localcontext(prec=60):
        return int((value * scale).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def listed_without_user(row: OldUser | OldRecord | OldChat, *, second_us: int) -> Listed:
    """List a row that names no user, with its figures as they are written; what is no number counts as 0."""

    def read(text: str | None, scale: int) -> int:
        return scaled(text or "0", scale) or 0

    if isinstance(row, OldUser):
        name, figures = "user", Figures(credits=read(row.credits, MICRO))
    elif isinstance(row, OldChat):
        name, figures = f"chat {row.chat_id}", Figures(elapsed_us=read(row.duration, second_us))
    else:
        name = f"record {row.record_id}"
        figures = Figures(
            elapsed_us=read(row.duration, second_us),
            free_us=read(row.free_time_used, second_us),
            cost=read(row.credits_used, MICRO),
        )
    return Listed("", name, "it names no user", figures)
