"""Templates, and how amounts, instants and durations are written on pages."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2
import msgspec
import pendulum
from litestar import MediaType, Response
from markupsafe import Markup

from talktime.api.schemas import reading_body
from talktime.meter.state import ChatState, CreditKind, StopReason, Tariff
from talktime.meter.units import MICRO, format_credits, format_seconds
from talktime.store.tables import EPOCH
from talktime.web.assets import PAGE_HEADERS

if TYPE_CHECKING:
    from talktime.meter.reading import Reading

TEMPLATES = Path(__file__).parent / "templates"

STOP_WORDS = {
    StopReason.LAPSED: "No heartbeat came, so the clock stopped by itself",
    StopReason.EXHAUSTED: "The credits ran out",
    StopReason.SWITCHED: "Another chat was started",
    StopReason.PAUSED: "Paused",
    StopReason.ENDED: "Ended",
}
STATE_WORDS = {
    ChatState.RUNNING: "running",
    ChatState.LAPSED: "lapsed",
    ChatState.PAUSED: "paused",
    ChatState.EXHAUSTED: "exhausted",
    ChatState.ABANDONED: "abandoned",
    ChatState.ENDED: "ended",
}
KIND_WORDS = {
    CreditKind.PURCHASE: "Purchase",
    CreditKind.GRANT: "Grant",
    CreditKind.COMPENSATION: "Compensation",
    CreditKind.REFUND: "Refund",
    CreditKind.CORRECTION: "Correction",
}

MINUS = "\N{MINUS SIGN}"
_DECIMALS_MIN = 2
_TENTHS_BELOW_US = 10 * MICRO


# --- amounts ----------------------------------------------------------------------------------------------------------


def _digits(amount: int) -> tuple[str, str]:
    """Split an amount without its sign: whole credits with separators and two decimals, and the decimals after them."""
    whole, decimals = format_credits(abs(amount)).split(".")
    return f"{int(whole):,}.{decimals[:_DECIMALS_MIN]}", decimals[_DECIMALS_MIN:].rstrip("0")


def credits_exact(amount: int, *, signed: bool = False) -> Markup:
    """Write an amount with all its decimals but trailing zeros, and at least two."""
    first, rest = _digits(amount)
    sign = MINUS if amount < 0 else "+" if signed else ""
    return Markup('<data class="amount" value="{0}" title="{0}">{1}{2}<span class="rest">{3}</span></data>').format(
        format_credits(amount), sign, first, rest
    )


def credits_short(amount: int, show: str | None = None) -> Markup:
    """Write an amount cut to two decimals; the exact one is its title.

    Where it ticks, `show` says which figure of the reading around it this is.
    """
    first, _ = _digits(amount)
    ticking = Markup(' data-show="{}"').format(show) if show else ""
    return Markup('<data value="{0}" title="{0}"{1}>{2}{3}</data>').format(
        format_credits(amount), ticking, MINUS if amount < 0 else "", first
    )


def price(tariff: Tariff) -> Markup:
    """Write a tariff: the price of a minute and, unless it is exact, the blocks in which time is sold."""
    if tariff.rate == 0:
        return Markup("<span>free of charge</span>")
    blocks = ""
    if tariff.first_us or tariff.increment_us:
        first, increment = format_seconds(tariff.first_us), format_seconds(tariff.increment_us)
        blocks = f", in blocks of {first} s and then {increment} s"
        if tariff.increment_us == 0:
            blocks = f", at least {first} s"
        elif tariff.first_us in (0, tariff.increment_us):
            blocks = f", in blocks of {increment} s"
    return Markup("<span>{} a minute{}</span>").format(credits_exact(tariff.rate), blocks)


# --- time -------------------------------------------------------------------------------------------------------------


def iso(instant: int) -> str:
    """Write an instant as RFC 3339 in UTC, with microseconds."""
    return f"{(EPOCH + timedelta(microseconds=instant)).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def when(instant: int) -> Markup:
    """Write an instant to the second in UTC; the page's script puts it into the viewer's zone."""
    text = iso(instant)
    return Markup('<time datetime="{}">{} UTC</time>').format(text, text[:19].replace("T", " "))


def words(us: int) -> str:
    """Write a duration as a person says it, in whole seconds from one second on."""
    if us < MICRO:
        return "less than a second" if us else "0 seconds"
    return str(pendulum.duration(seconds=us // MICRO).in_words())


def compact(us: int) -> str:
    """Write a duration as ``m:ss`` or ``h:mm:ss``, in whole seconds."""
    minutes, seconds = divmod(us // MICRO, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def ticking(us: int, show: str) -> Markup:
    """Write a duration that the page's script lets tick: `show` says which figure of the reading around it this is."""
    return Markup('<span data-show="{}">{}</span>').format(show, compact(us))


def brief(us: int) -> str:
    """Write a duration for comparing: milliseconds below a second, then seconds, then minutes and seconds."""
    if us < MICRO:
        return f"{us // 1000} ms"
    if us < _TENTHS_BELOW_US:
        return f"{us // MICRO}.{us % MICRO // 100_000} s"
    minutes, seconds = divmod(us // MICRO, 60)
    return f"{minutes:,} min {seconds} s" if minutes else f"{seconds} s"


# --- pages ------------------------------------------------------------------------------------------------------------


def reading_json(reading: Reading, heartbeat_us: int) -> str:
    """Write a reading as the API does, for the JavaScript client."""
    return msgspec.json.encode(reading_body(reading, heartbeat_us)).decode()


def user_url(user_id: str) -> str:
    """Return the path of a user's page."""
    return f"/console/users/{quote(user_id, safe='')}"


def chat_url(user_id: str, chat_id: str) -> str:
    """Return the path of a chat's page."""
    return f"{user_url(user_id)}/chats/{quote(chat_id, safe='')}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(
        brief=brief,
        compact=compact,
        credits=credits_exact,
        price=price,
        short=credits_short,
        ticking=ticking,
        when=when,
        words=words,
    )
    environment.globals.update(
        chat_url=chat_url,
        iso=iso,
        user_url=user_url,
        kind_words=KIND_WORDS,
        state_words=STATE_WORDS,
        stop_words=STOP_WORDS,
        reading_json=reading_json,
    )
    return environment


def render(template: str, *, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> Response[str]:  # noqa: ANN401 - templates take anything
    """Return a page."""
    text = _environment().get_template(template).render(**values)
    return Response(text, status_code=status, media_type=MediaType.HTML, headers={**PAGE_HEADERS, **(headers or {})})


def redirect(target: str) -> Response[str]:
    """Send the browser to a page of ours, with a GET."""
    return Response("", status_code=303, media_type=MediaType.HTML, headers={**PAGE_HEADERS, "Location": target})
