"""What readings must show, and how the API writes figures."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from tests.meter import reference
from tests.meter.reference import BEYOND, Reference

HORIZON_US = 40
"""How far the reference looks ahead for what would happen if all chats kept beating."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def figures(account: Reference, chat_id: str, now: int) -> dict[str, object]:
    """Return what a reading of a chat must show."""
    shown = account.reading(now, chat_id, horizon_us=HORIZON_US)
    chat = account.chats[chat_id]
    also = {"chat_id": chat_id, "advisor_id": chat.advisor_id, "server_time": now, "materialized_through": account.at}
    return {**shown, **also}


def boundaries(account: Reference, now: int) -> list[tuple[int, str]]:
    """Return the instants after this one at which something ends for a chat, as far as is seen, with the chat's id."""
    view = account.copy()
    view.advance(max(now, view.at))
    found: list[tuple[object, str]] = []
    for chat_id, chat in view.chats.items():
        found.append((chat.last_sign_at + chat.abandon_after_us, chat_id))
        if chat.state == "running":
            shown = view.reading(now, chat_id, horizon_us=HORIZON_US)
            found += [(shown[name], chat_id) for name in ("accrues_until", "paid_from", "free_until", "exhausts_at")]
    return [(at, chat_id) for at, chat_id in found if isinstance(at, int) and at > now]


_AS_IT_IS = ("chat_id", "advisor_id", "state", "accruing", "revision", "stop_reason")
_MICROSECONDS = ("elapsed_us", "free_used_us", "free_left_us", "count_us")
_CREDITS = ("credits_used", "balance")
_INSTANTS = (
    *("as_of", "server_time", "accrues_until", "paid_from", "free_until", "exhausts_at"),
    *("started_at", "stopped_at", "materialized_through"),
)


def reading_mismatch(expected: Mapping[str, object], body: Mapping[str, Any]) -> str | None:
    """Say in what a reading differs from what is expected; None if in nothing."""
    shown: dict[str, object] = {
        **{name: body[name] for name in (*_AS_IT_IS, *_MICROSECONDS)},
        **{name: micro(body[name]) for name in _CREDITS},
        **{name: instant(body[name]) for name in _INSTANTS},
        "tariff": tariff_of(body),
    }
    as_of = shown["as_of"]
    assert isinstance(as_of, int)
    differing = {
        name: (value, shown[name])
        for name, value in expected.items()
        if value != shown[name] and not (value is BEYOND and _is_beyond(name, shown, as_of))
    }
    if not differing:
        return None
    told = ", ".join(f"{name} is {is_} and must be {value}" for name, (value, is_) in sorted(differing.items()))
    return f"chat {body['chat_id']}: {told}"


def _is_beyond(name: str, shown: Mapping[str, object], as_of: int) -> bool:
    value, tariff = shown[name], shown["tariff"]
    if value is None:
        assert isinstance(tariff, reference.Tariff)
        return name == "exhausts_at" and tariff.rate == 0  # else it comes, if late
    return isinstance(value, int) and value > as_of + HORIZON_US


def tariff_of(body: Mapping[str, Any]) -> reference.Tariff:
    """Read the tariff of a reading or of a line of a receipt."""
    tariff = body["tariff"]
    blocks_us = (int(Decimal(str(tariff[name])) * 1_000_000) for name in ("first_seconds", "increment_seconds"))
    return reference.Tariff(micro(tariff["credits_per_minute"]), *blocks_us)


def seconds(us: int) -> str:
    """Write microseconds as decimal seconds."""
    return f"{Decimal(us) / 1_000_000:f}"


def amount(micro_credits: int) -> str:
    """Write micro-credits as the API does."""
    return f"{Decimal(micro_credits) / 1_000_000:.6f}"


def micro(text: str) -> int:
    """Read an amount as the API writes it."""
    whole, decimals = text.split(".")
    assert len(decimals) == 6
    return int(whole + decimals)


def instant(text: str | None) -> int | None:
    """Read an instant as the API writes it, as microseconds."""
    if text is None:
        return None
    assert text.endswith("Z")
    return (datetime.fromisoformat(text) - EPOCH) // timedelta(microseconds=1)
