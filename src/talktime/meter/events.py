"""What is told of an account: from its state before and after a change, what happened in between, and exactly when.

A change is the passing of time, and perhaps a command at the end of it. Nothing is told twice and nothing is left out,
however often the account was advanced in between: the passing of time composes, and so does what is told of it.

Credits are low while a clock runs and they would last for no longer than a given time if all running clocks beat. That
is told when it begins, and not again until a clock ran while they were not: while all stand still, nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from talktime.meter.advance import advance, foretell
from talktime.meter.state import Account, Chat, ChatState, Credit, StopReason


class Told(StrEnum):
    """What can be told. Of those that happen at the same instant because time passes, the ones above come first."""

    LAPSED = "chat.lapsed"
    ABANDONED = "chat.abandoned"
    FREE_TIME_EXHAUSTED = "free_time.exhausted"
    CREDITED = "account.credited"
    SWITCHED = "chat.switched"
    ENDED = "chat.ended"
    STARTED = "chat.started"
    EXHAUSTED = "chat.exhausted"
    BALANCE_LOW = "balance.low"


_RANK = {told: rank for rank, told in enumerate(Told)}


class Notice(NamedTuple):
    """One thing that happened to an account at the instant `occurred_at`, and the figures as they were then.

    Of a chat: its revision and its totals; `switched_to` is the chat that was started instead. `free_time.exhausted` is
    of a pair, and names the advisor. `balance` is told with credits that came in or were taken, and with low ones.
    """

    told: Told
    occurred_at: int
    chat_id: str | None = None
    advisor_id: str | None = None
    revision: int | None = None
    elapsed_us: int | None = None
    free_us: int | None = None
    cost: int | None = None
    switched_to: str | None = None
    balance: int | None = None
    exhausts_at: int | None = None
    credit: Credit | None = None


def tell(
    before: Account, after: Account, *, low_at: int | None, low_us: int, exhausts_at: int | None = None
) -> tuple[list[Notice], int | None]:
    """Return what happened between two states of an account, in order, and since when its credits are known to be low.

    `after` is `before` advanced, or what at most one command made of it. `low_at` is what this returned before; credits
    are low if they last for no longer than `low_us`. Who knows when those of `before` run out, if all its running
    clocks beat, may say so, to save finding it out.
    """
    passed = advance(before, after.at) if _was_commanded(before, after) else after
    stopped = [
        chat for chat in passed.chats.values() if _runs(before.chats.get(chat.chat_id)) and chat.opened_at is None
    ]
    stops = {chat.stopped_at or 0 for chat in stopped}
    low, low_at = _low(before, stops, after.at, low_at=low_at, low_us=low_us, exhausts_at=exhausts_at)
    notices = [*map(_of_stop, stopped), *_of_abandoned(before, passed), *_of_free_time(before, passed), *low]
    notices.sort(key=lambda notice: (notice.occurred_at, _RANK[notice.told], notice.chat_id or notice.advisor_id or ""))
    if passed is not after:
        low, low_at = _low(after, (), after.at, low_at=low_at, low_us=low_us, exhausts_at=None)
        commanded = [*_of_credits(passed, after), *_of_command(passed, after)]
        commanded.sort(key=lambda notice: (_RANK[notice.told], notice.chat_id or ""))
        notices += commanded + low
    return notices, low_at


def _was_commanded(before: Account, after: Account) -> bool:
    """Whether more than time has passed. What a command does to a chat, its revision counts."""
    if any(isinstance(entry, Credit) for entry in after.journal[len(before.journal) :]):
        return True
    chats = ((before.chats.get(chat.chat_id), chat) for chat in after.chats.values())
    return any(had is None or had.revision != chat.revision for had, chat in chats)


def _runs(chat: Chat | None) -> bool:
    return chat is not None and chat.opened_at is not None


def _of_chat(told: Told, at: int, chat: Chat, *, switched_to: str | None = None) -> Notice:
    return Notice(
        told,
        at,
        chat.chat_id,
        chat.advisor_id,
        revision=chat.revision,
        elapsed_us=chat.elapsed_us,
        free_us=chat.free_us,
        cost=chat.cost,
        switched_to=switched_to,
    )


# --- the passing of time ----------------------------------------------------------------------------------------------


def _of_stop(chat: Chat) -> Notice:
    """Tell of a clock that time alone has stopped: its totals stand still since then."""
    told = Told.LAPSED if chat.stop_reason is StopReason.LAPSED else Told.EXHAUSTED
    return _of_chat(told, chat.stopped_at or 0, chat)


def _of_abandoned(before: Account, passed: Account) -> Iterator[Notice]:
    for chat in passed.chats.values():
        if chat.state is ChatState.ABANDONED and before.chats[chat.chat_id].state is not ChatState.ABANDONED:
            yield _of_chat(Told.ABANDONED, chat.abandoned_at, chat)


def _of_free_time(before: Account, passed: Account) -> Iterator[Notice]:
    for advisor_id, allowance in passed.allowances.items():
        had = before.allowances[advisor_id]
        if allowance.left_us == 0 and had.left_us > 0:
            # Free ticks come first, so the clock that took the most of them took the last one.
            took_us = max(
                passed.chats[chat.chat_id].free_us - chat.free_us
                for chat in before.chats.values()
                if chat.advisor_id == advisor_id
            )
            yield Notice(Told.FREE_TIME_EXHAUSTED, before.at + took_us, advisor_id=advisor_id)


def _low(
    account: Account, stops: Iterable[int], to: int, *, low_at: int | None, low_us: int, exhausts_at: int | None
) -> tuple[list[Notice], int | None]:
    """Tell of credits that get low from the account's instant through `to`; clocks stop only at the instants `stops`.

    Between them the instant at which credits run out stays as it is: time alone does not move it.
    """
    notices: list[Notice] = []
    if not any(map(_runs, account.chats.values())):
        return notices, low_at
    for at, until in pairwise([*sorted({account.at, *stops}), to + 1]):
        if at > account.at or exhausts_at is None:
            forecasts = foretell(advance(account, at), beating=True).values()
            if not forecasts:
                continue
            ends = (forecast.stops_at for forecast in forecasts if forecast.stops_at is not None)
            exhausts_at = min(ends, default=None)
        low_from = None if exhausts_at is None else max(at, exhausts_at - low_us)
        if low_from != at:
            low_at = None
        if low_from is not None and low_from < until and low_at is None:
            low_at = low_from
            balance = advance(account, low_from).balance
            notices.append(Notice(Told.BALANCE_LOW, low_from, balance=balance, exhausts_at=exhausts_at))
    return notices, low_at


# --- commands, at the instant of the account --------------------------------------------------------------------------


def _of_credits(passed: Account, after: Account) -> Iterator[Notice]:
    for entry in after.journal[len(passed.journal) :]:
        if isinstance(entry, Credit):
            yield Notice(Told.CREDITED, entry.credited_at, balance=after.balance, credit=entry)


def _of_command(passed: Account, after: Account) -> Iterator[Notice]:
    started = [chat for chat in after.chats.values() if _runs(chat) and not _runs(passed.chats.get(chat.chat_id))]
    for chat in after.chats.values():
        had = passed.chats.get(chat.chat_id)
        if chat.state is ChatState.ENDED and had is not None and had.state is not ChatState.ENDED:
            yield _of_chat(Told.ENDED, after.at, chat)
        elif chat.state is ChatState.EXHAUSTED and (
            had is None or had.state is not ChatState.EXHAUSTED or had.stopped_at != chat.stopped_at
        ):
            # It stopped, or was not let start.
            yield _of_chat(Told.EXHAUSTED, after.at, chat)
        elif _runs(had) and chat.state is ChatState.PAUSED and chat.stop_reason is StopReason.SWITCHED:
            yield _of_chat(Told.SWITCHED, after.at, chat, switched_to=started[0].chat_id)
    for chat in started:
        yield _of_chat(Told.STARTED, after.at, chat)
