"""`advance`: an account's state at an instant -> its state at a later instant.

The meaning is a process, one microsecond tick at a time. At the instant ``t``, in this order:

1. a running chat whose lease has ended stops (``lapsed``);
2. a lapsed, paused or exhausted chat without a sign of life for ``abandon_after`` becomes ``abandoned``;
3. in order of seniority each running chat takes this tick from its advisor's allowance if any is left;
   the tick of every other running chat is paid;
4. in the same order each chat whose paid tick costs something pays from what the balance still holds,
   or, if that is too little, stops at ``t`` (``exhausted``);
5. the tick passes: one microsecond for each chat still running.

``advance(account, to)`` is all five steps for every tick before ``to``, then steps 1 to 4 at ``to`` itself, where
3 and 4 only decide who could not go on. The code jumps from boundary to boundary instead: between two of them the
same chats run and each either takes free ticks only or pays for each tick, so the cost of the jump is a difference of
two cumulative costs, and the boundary of exhaustion is found by bisection over integers. The number of jumps is
bounded by the number of running chats and advisors, whatever the time between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from talktime.meter.state import RESUMABLE, TRANSITIONS, Account, Allowance, Chat, ChatState, Event, halt, seniority


class _Clock:
    """A running chat while it is advanced: what its ticks add up to."""

    __slots__ = ("advisor_id", "chat", "count_us", "free_us", "lease_end", "tariff")

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.advisor_id = chat.advisor_id
        self.lease_end = chat.lease_end
        self.tariff = chat.tariff
        self.count_us = chat.count_us
        self.free_us = 0

    def cost_of(self, ticks: int) -> int:
        """Micro-credits for the next `ticks` paid microseconds."""
        return self.tariff.cost(self.count_us + ticks) - self.tariff.cost(self.count_us)

    def chat_now(self) -> Chat:
        """The chat with the ticks added that have passed."""
        chat = self.chat
        paid_us = self.count_us - chat.count_us
        return replace(
            chat,
            count_us=self.count_us,
            elapsed_us=chat.elapsed_us + self.free_us + paid_us,
            free_us=chat.free_us + self.free_us,
            cost=chat.cost + self.tariff.cost(self.count_us) - self.tariff.cost(chat.count_us),
        )


def advance(account: Account, to: int) -> Account:
    """Return the state of `account` at the instant `to`.

    Composes: ``advance(advance(s, a), b) == advance(s, b)`` for ``a <= b``. An instant before the account's own returns
    the state as it is, so a clock that steps back never takes time back.
    """
    t = account.at
    if to < t:
        return account
    clocks = [_Clock(c) for c in sorted((c for c in account.chats.values() if c.opened_at is not None), key=seniority)]
    left = {advisor: allowance.left_us for advisor, allowance in account.allowances.items()}
    balance = account.balance
    chats = dict(account.chats)
    journal = list(account.journal)

    def drop(stopping: list[_Clock], event: Event) -> None:
        for clock in stopping:
            clocks.remove(clock)
            chats[clock.chat.chat_id], segment = halt(clock.chat_now(), t, event)
            if segment is not None:
                journal.append(segment)

    while True:
        drop([clock for clock in clocks if clock.lease_end <= t], Event.LAPSE)
        drop(_unable_to_pay(clocks, left, balance), Event.EXHAUST)
        if t == to or not clocks:
            break
        free, paid, ticks = _stretch(clocks, left)
        ticks = min(ticks, to - t, *(clock.lease_end - t for clock in clocks))
        spent = _total(paid, ticks)
        if spent > balance:
            # The last tick count that the balance can pay; whoever cannot pay the next one stops at its begin.
            ticks = bisect_right(range(ticks), balance, key=lambda n: _total(paid, n)) - 1
            spent = _total(paid, ticks)
        balance -= spent
        for clock in free:
            clock.free_us += ticks
            left[clock.advisor_id] -= ticks
        for clock in paid:
            clock.count_us += ticks
        t += ticks

    chats |= {clock.chat.chat_id: clock.chat_now() for clock in clocks}
    return replace(
        account,
        at=to,
        balance=balance,
        allowances=_used(account.allowances, left),
        chats=_abandoned(chats, to),
        journal=tuple(journal),
    )


def _used(allowances: Mapping[str, Allowance], left: Mapping[str, int]) -> dict[str, Allowance]:
    return {
        advisor: Allowance(allowance.granted_us, allowance.granted_us - left[advisor])
        for advisor, allowance in allowances.items()
    }


def _abandoned(chats: Mapping[str, Chat], at: int) -> dict[str, Chat]:
    """Step 2, once at the end: an abandonment changes nothing for anybody else, so it is no boundary."""
    return {
        chat_id: replace(chat, state=TRANSITIONS[Event.ABANDON][chat.state])
        if chat.state in RESUMABLE and chat.abandoned_at <= at
        else chat
        for chat_id, chat in chats.items()
    }


def without_leases(account: Account) -> Account:
    """Return the same account as if every running chat kept beating for ever."""
    chats = {
        chat.chat_id: replace(chat, lease_us=1 << 62) if chat.state is ChatState.RUNNING else chat
        for chat in account.chats.values()
    }
    return replace(account, chats=chats)


def _unable_to_pay(clocks: Iterable[_Clock], left: dict[str, int], balance: int) -> list[_Clock]:
    """Steps 3 and 4 for the next tick, without taking anything: who would have to pay for it and cannot."""
    left = dict(left)
    unable = []
    for clock in clocks:
        if left[clock.advisor_id] > 0:
            left[clock.advisor_id] -= 1
            continue
        price = clock.cost_of(1)
        if price > balance:
            unable.append(clock)
        else:
            balance -= price
    return unable


def _stretch(clocks: Iterable[_Clock], left: dict[str, int]) -> tuple[list[_Clock], list[_Clock], int]:
    """Split running clocks into those with free and those with paid ticks, and say for how many ticks that holds."""
    sharers = Counter(clock.advisor_id for clock in clocks)
    available = dict(left)
    free, paid = [], []
    ticks = 1 << 62
    for clock in clocks:
        if available[clock.advisor_id] > 0:
            available[clock.advisor_id] -= 1
            free.append(clock)
            # Too few ticks left for all sharers: the seniors get them, in a stretch of a single tick.
            ticks = min(ticks, max(1, left[clock.advisor_id] // sharers[clock.advisor_id]))
        else:
            paid.append(clock)
    return free, paid, ticks


def _total(paid: Iterable[_Clock], ticks: int) -> int:
    """Micro-credits that the next `ticks` cost all paying clocks together; monotone in `ticks`."""
    return sum(clock.cost_of(ticks) for clock in paid)
