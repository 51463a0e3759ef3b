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
two cumulative costs. One paying chat's exhaustion is the inverse of its cost; that of several is found by bisection
over integers. The number of jumps is bounded by the number of running chats and advisors, whatever the time between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from talktime.meter.state import ENDLESS, RESUMABLE, TRANSITIONS, Account, Allowance, Chat, Event, halt, seniority
from talktime.meter.units import END_OF_TIME_US


class Forecast(NamedTuple):
    """Where a running clock stops, or None if it never does, and its free time until then."""

    stops_at: int | None
    free_us: int


def advance(account: Account, to: int) -> Account:
    """Return the state of `account` at the instant `to`.

    Composes: ``advance(advance(s, a), b) == advance(s, b)`` for ``a <= b``. An instant before the account's own returns
    the state as it is, so a clock that steps back never takes time back.
    """
    return account if to < account.at else _Course(account).advanced(account, to)


def foretell(account: Account, *, beating: bool) -> dict[str, Forecast]:
    """Return what will become of an account's running chats, by chat id, if no command comes.

    If they are `beating`, their leases do not end; they may run on for ever.
    """
    course = _Course(account)
    return course.foretold_beating() if beating else course.foretold()


def look_ahead(account: Account, to: int) -> tuple[Account, Mapping[str, Forecast], Mapping[str, Forecast]]:
    """Return the state at `to`, and from there what `foretell` says: as the leases stand, and if all chats beat.

    An instant before the account's own stands for that.
    """
    course = _Course(account)
    view = course.advanced(account, max(to, account.at))
    if len(course.clocks) != 1:
        return view, foretell(view, beating=False), foretell(view, beating=True)
    # A single clock is stopped by its lease or, as if it had none, by its credits; and free ticks come first.
    [clock] = course.clocks
    chat_id, lease_end = clock.chat.chat_id, clock.lease_end
    beating = course.foretold_beating()
    ends_at, free_us = beating[chat_id]
    stops_at = lease_end if ends_at is None else min(ends_at, lease_end)
    leased = Forecast(stops_at, min(free_us, stops_at - view.at))
    return view, {chat_id: beating[chat_id] if stops_at > END_OF_TIME_US else leased}, beating


def _used(allowances: Mapping[str, Allowance], left: Mapping[str, int]) -> dict[str, Allowance]:
    return {
        advisor: Allowance(allowance.granted_us, allowance.granted_us - left[advisor])
        for advisor, allowance in allowances.items()
    }


class _Clock:
    """A running chat while it is advanced: what its ticks add up to."""

    __slots__ = ("advisor_id", "chat", "cost", "cost_before", "count_us", "free_us", "lease_end", "tariff")

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.advisor_id = chat.advisor_id
        self.lease_end = chat.lease_end
        self.tariff = chat.tariff
        self.count_us = chat.count_us
        self.cost = self.cost_before = chat.tariff.cost(chat.count_us)
        self.free_us = 0

    def cost_of(self, ticks: int) -> int:
        """Micro-credits for the next `ticks` paid microseconds."""
        return self.tariff.cost(self.count_us + ticks) - self.cost

    def ticks_within(self, balance: int) -> int:
        """For how many paid microseconds a balance is enough."""
        return self.tariff.count_within(self.cost + balance) - self.count_us

    def pay(self, ticks: int) -> int:
        """Let so many paid microseconds pass, and return what they cost."""
        spent = self.cost_of(ticks)
        self.count_us += ticks
        self.cost += spent
        return spent

    def chat_now(self) -> Chat:
        """The chat with the ticks added that have passed."""
        chat = self.chat
        return chat.with_totals(
            count_us=self.count_us,
            elapsed_us=chat.elapsed_us + self.free_us + self.count_us - chat.count_us,
            free_us=chat.free_us + self.free_us,
            cost=chat.cost + self.cost - self.cost_before,
        )


Stop: TypeAlias = tuple[_Clock, int, Event]
"""A clock that stopped, when, and why."""


class _Course:
    """What the passing of time changes in an account: its running clocks in order of seniority, free time, balance."""

    __slots__ = ("_took_free", "_turns", "at", "balance", "clocks", "left")

    def __init__(self, account: Account) -> None:
        running = [chat for chat in account.chats.values() if chat.opened_at is not None]
        if len(running) > 1:
            running.sort(key=seniority)
        self.clocks = [_Clock(chat) for chat in running]
        self.left = {advisor: allowance.left_us for advisor, allowance in account.allowances.items()}
        self.balance = account.balance
        self.at = account.at
        self._turns: _Turns | None = None
        self._took_free = False

    def advanced(self, account: Account, to: int) -> Account:
        """Let time pass until the instant `to`, and return the account that this is the course of as it is then."""
        stops = self.run(to)
        chats = dict(account.chats)
        journal = account.journal
        for clock, at, event in stops:
            chats[clock.chat.chat_id], segment = halt(clock.chat_now(), at, event)
            if segment is not None:
                journal = (*journal, segment)
        for clock in self.clocks:
            chats[clock.chat.chat_id] = clock.chat_now()
        # Step 2, once at the end: an abandonment changes nothing for anybody else, so it is no boundary.
        for chat_id, chat in chats.items():
            if chat.state in RESUMABLE and chat.abandoned_at <= to:
                chats[chat_id] = chat._replace(state=TRANSITIONS[Event.ABANDON][chat.state])
        allowances = _used(account.allowances, self.left) if self._took_free else account.allowances
        return Account(account.user_id, to, self.balance, allowances, chats, journal)

    def foretold_beating(self) -> dict[str, Forecast]:
        """Let all time pass as if every clock had heartbeats for ever, and return what becomes of each."""
        for clock in self.clocks:
            clock.lease_end = ENDLESS
        return self.foretold()

    def foretold(self) -> dict[str, Forecast]:
        """Let all time pass, and return what becomes of each clock."""
        free_before = {clock.chat.chat_id: clock.free_us for clock in self.clocks}
        ends = [(clock, at) for clock, at, _ in self.run(END_OF_TIME_US)] + [(clock, None) for clock in self.clocks]
        return {clock.chat.chat_id: Forecast(at, clock.free_us - free_before[clock.chat.chat_id]) for clock, at in ends}

    def run(self, to: int) -> list[Stop]:
        """Let time pass until the instant `to`; return the clocks that stopped, in order."""
        stops: list[Stop] = []
        while self.clocks:
            self._turns = self._turns or self._take_turns(stops)
            if self.at == to or not self.clocks:
                break
            if not self._pass_time(to, self._turns):
                self._turns = None
        self.at = to
        return stops

    def _take_turns(self, stops: list[Stop]) -> _Turns:
        """Steps 1, 3 and 4 at this instant, and stop those that cannot have the next tick; nothing is taken yet."""
        at, left, balance = self.at, self.left, self.balance
        turns = _Turns()
        running: list[_Clock] = []
        lapsed: list[Stop] = []
        unable: list[Stop] = []
        # In order of seniority, and whoever stops takes nothing from those behind; so the three steps are one pass.
        for clock in self.clocks:
            if clock.lease_end <= at:
                lapsed.append((clock, at, Event.LAPSE))
                continue
            sharing = turns.sharers.get(clock.advisor_id, 0)
            if left[clock.advisor_id] > sharing:
                turns.sharers[clock.advisor_id] = sharing + 1
                turns.free.append(clock)
            else:
                price = clock.cost_of(1)
                if price > balance:
                    unable.append((clock, at, Event.EXHAUST))
                    continue
                balance -= price
                turns.paid.append(clock)
            running.append(clock)
        self.clocks = running
        stops += lapsed
        stops += unable
        return turns

    def _pass_time(self, to: int, turns: _Turns) -> bool:
        """Let those ticks pass, up to `to`, for which the turns stay as they are; return whether they go on beyond."""
        wanted = to - self.at
        ticks = wanted + 1  # the one at `to` itself, to see whether all can have it
        for clock in self.clocks:
            ticks = min(ticks, clock.lease_end - self.at)
        for advisor_id, sharing in turns.sharers.items():
            # Too few ticks left for all who share: the seniors have them, in a stretch of a single tick.
            ticks = min(ticks, self.left[advisor_id] // sharing)
        if turns.paid:
            ticks = _payable(turns.paid, ticks, self.balance)
        goes_on = ticks > wanted
        ticks -= goes_on
        for advisor_id, sharing in turns.sharers.items():
            self.left[advisor_id] -= ticks * sharing
        for clock in turns.free:
            clock.free_us += ticks
            self._took_free = True
        for clock in turns.paid:
            self.balance -= clock.pay(ticks)
        self.at += ticks
        return goes_on


class _Turns:
    """Who takes the next tick for free, how many they are for each advisor, and who pays for it."""

    __slots__ = ("free", "paid", "sharers")

    def __init__(self) -> None:
        self.free: list[_Clock] = []
        self.sharers: dict[str, int] = {}
        self.paid: list[_Clock] = []


def _payable(paid: list[_Clock], ticks: int, balance: int) -> int:
    """Return how many of the next `ticks` the balance can pay for all these clocks."""
    if len(paid) == 1:
        return min(ticks, paid[0].ticks_within(balance))
    most = min(ticks, *(clock.ticks_within(balance) for clock in paid))
    if _total(paid, most) <= balance:
        return most
    # What an equal share can pay for each of them, all can pay together.
    least = min(clock.ticks_within(balance // len(paid)) for clock in paid)
    return bisect_right(range(most), balance, lo=least, key=lambda n: _total(paid, n)) - 1


def _total(paid: Iterable[_Clock], ticks: int) -> int:
    """Micro-credits that the next `ticks` cost all paying clocks together; monotone in `ticks`."""
    return sum(clock.cost_of(ticks) for clock in paid)
