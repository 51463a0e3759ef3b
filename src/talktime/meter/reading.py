"""Readings: an account's state at an instant -> what is shown, and what can be foretold.

A reading holds all that a client needs to go on by itself; `show` is how. The JavaScript client does the same, and both
are held against the same file of vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from talktime.errors import ChatNotFound
from talktime.meter.advance import Forecast, advance, look_ahead
from talktime.meter.state import Account, ChatState, StopReason, Tariff
from talktime.meter.units import END_OF_TIME_US


class Reading(NamedTuple):
    """What one chat's clock and its user's balance show at the instant `as_of`.

    Totals are of the chat, over all its segments; `balance` is the account's. `accrues_until` is where the clock stops
    if no command comes; `paid_from` is from when its ticks are paid, if before that. `free_until` and `exhausts_at`
    hold if all running chats keep beating; None means never, or past the year 9999. `server_time` is the raw clock.
    """

    user_id: str
    chat_id: str
    advisor_id: str
    state: ChatState
    revision: int
    as_of: int
    server_time: int
    elapsed_us: int
    free_used_us: int
    free_left_us: int
    credits_used: int
    balance: int
    tariff: Tariff
    count_us: int
    accrues_until: int | None
    paid_from: int | None
    free_until: int | None
    exhausts_at: int | None
    started_at: int
    stopped_at: int | None
    stop_reason: StopReason | None
    materialized_through: int

    @property
    def accruing(self) -> bool:
        """Whether the clock runs now."""
        return self.state is ChatState.RUNNING


class AccountReading(NamedTuple):
    """What an account shows at the instant `as_of`; `accrued` is the cost so far of its open segments."""

    user_id: str
    as_of: int
    server_time: int
    balance: int
    accrued: int
    running: tuple[Reading, ...]
    exhausts_at: int | None
    materialized_through: int


class Shown(NamedTuple):
    """What a page shows of a chat at one instant: microseconds and micro-credits."""

    elapsed_us: int
    free_left_us: int
    credits_used: int
    balance: int


def show(reading: Reading, at: int) -> Shown:
    """Go on from a reading to the instant `at` without asking anybody.

    With ``x = min(at, accrues_until)``, elapsed is ``elapsed_us + max(0, x - as_of)``, and credits are ``credits_used +
    C(count_us + d) - C(count_us)`` with ``d = max(0, x - paid_from)``, where ``C`` is the tariff's cost; nothing is
    added where `paid_from` is None, and a clock that stands still stays as it is. The chat's own time and credits are
    what `advance` says. Free time and balance lack what the user's other chats take; the next reading has it.
    """
    ran_us = paid_us = 0
    free_left_us = reading.free_left_us
    if reading.accrues_until is not None:
        x = min(at, reading.accrues_until)
        ran_us = max(0, x - reading.as_of)
        if reading.paid_from is not None and x > reading.paid_from:
            paid_us = x - reading.paid_from
            free_left_us = 0  # nobody pays while the allowance lasts
        else:
            free_left_us -= ran_us
    spent = reading.tariff.cost(reading.count_us + paid_us) - reading.tariff.cost(reading.count_us)
    return Shown(
        elapsed_us=reading.elapsed_us + ran_us,
        free_left_us=free_left_us,
        credits_used=reading.credits_used + spent,
        balance=reading.balance - spent,
    )


def read(account: Account, chat_id: str, now: int) -> Reading:
    """Return the reading of one chat at `now` (or at the account's own instant, if the clock stepped back).

    Raises:
        ChatNotFound: the account holds no such chat.
    """
    if chat_id not in account.chats:
        raise ChatNotFound(account.user_id, chat_id)
    return read_many(account, [chat_id], now)[0]


def read_many(account: Account, chat_ids: Iterable[str], now: int) -> list[Reading]:
    """Return the readings of several chats of one account, at one instant."""
    view, *forecasts = look_ahead(account, now)
    return [_read_one(view, chat_id, forecasts, now, account.at) for chat_id in chat_ids]


def read_account(account: Account, now: int) -> AccountReading:
    """Return the balance, what is accrued, and the readings of all running chats, in order of chat id."""
    view = advance(account, max(now, account.at))
    chats = [view.chats[chat_id] for chat_id in sorted(view.chats) if view.chats[chat_id].state is ChatState.RUNNING]
    running = read_many(account, [chat.chat_id for chat in chats], now)
    return AccountReading(
        user_id=account.user_id,
        as_of=view.at,
        server_time=now,
        balance=view.balance,
        accrued=sum(chat.accrued for chat in chats),
        running=tuple(running),
        exhausts_at=min((r.exhausts_at for r in running if r.exhausts_at is not None), default=None),
        materialized_through=account.at,
    )


def _read_one(
    view: Account,
    chat_id: str,
    forecasts: Iterable[Mapping[str, Forecast]],
    now: int,
    materialized_through: int,
) -> Reading:
    chat = view.chats[chat_id]
    accrues_until = paid_from = free_until = exhausts_at = None
    if chat.state is ChatState.RUNNING:
        leased, beating = (forecast[chat_id] for forecast in forecasts)
        accrues_until = leased.stops_at
        # Free ticks come first, paid ones after: the allowance never grows back.
        turns_paid = view.at + leased.free_us
        paid_from = turns_paid if accrues_until is not None and turns_paid < accrues_until else None
        turns_paid = view.at + beating.free_us
        free_until = turns_paid if view.at < turns_paid < END_OF_TIME_US else None
        exhausts_at = beating.stops_at
    return Reading(
        user_id=view.user_id,
        chat_id=chat.chat_id,
        advisor_id=chat.advisor_id,
        state=chat.state,
        revision=chat.revision,
        as_of=view.at,
        server_time=now,
        elapsed_us=chat.elapsed_us,
        free_used_us=chat.free_us,
        free_left_us=view.allowances[chat.advisor_id].left_us,
        credits_used=chat.cost,
        balance=view.balance,
        tariff=chat.tariff,
        count_us=chat.count_us,
        accrues_until=accrues_until,
        paid_from=paid_from,
        free_until=free_until,
        exhausts_at=exhausts_at,
        started_at=chat.started_at,
        stopped_at=chat.stopped_at,
        stop_reason=chat.stop_reason,
        materialized_through=materialized_through,
    )
