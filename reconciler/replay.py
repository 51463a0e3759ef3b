"""An account's life once more, from moment to moment: who took free time, what was paid, and whether it could be.

It needs no leases and no commands, for the segments say when each clock ran, and that is all that it believes of them
besides their tariff and their count. Between two moments (a beginning, an end, a credit) the same clocks run. The free
ticks of an advisor go round among its clocks in the order of seniority until none is left; all others are paid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reconciler.differences import Findings, Total, instant
from talktime.meter.state import Allowance, Chat, Segment, StopReason, Tariff
from talktime.meter.units import format_credits


@dataclass(slots=True, kw_only=True)
class Stretch:
    """A segment while it is gone through; `reason` is None for an open one. `free_us` and `ran_us` grow."""

    chat_id: str
    advisor_id: str
    started_at: int
    ended_at: int
    reason: StopReason | None
    tariff: Tariff
    count_us: int
    stored_free_us: int
    free_us: int = 0
    ran_us: int = 0

    @property
    def cost(self) -> int:
        """Micro-credits so far."""
        return self.tariff.cost(self._count_now) - self.tariff.cost(self.count_us)

    @property
    def next_price(self) -> int:
        """Micro-credits for one more tick, if it is paid."""
        return self.tariff.cost(self._count_now + 1) - self.tariff.cost(self._count_now)

    @property
    def _count_now(self) -> int:
        return self.count_us + self.ran_us - self.free_us


def closed(segment: Segment) -> Stretch:
    """Return the stretch of a segment."""
    return Stretch(
        chat_id=segment.chat_id,
        advisor_id=segment.advisor_id,
        started_at=segment.started_at,
        ended_at=segment.ended_at,
        reason=segment.reason,
        tariff=segment.tariff,
        count_us=segment.count_us,
        stored_free_us=segment.free_us,
    )


def still_open(chat: Chat, opened_at: int, at: int) -> Stretch:
    """Return the stretch of a running chat's open segment as of the instant `at`."""
    return Stretch(
        chat_id=chat.chat_id,
        advisor_id=chat.advisor_id,
        started_at=opened_at,
        ended_at=at,
        reason=None,
        tariff=chat.tariff,
        count_us=chat.opened_count_us,
        stored_free_us=at - opened_at - (chat.count_us - chat.opened_count_us),
    )


@dataclass(slots=True)
class Pair:
    """What the chats of a user with one advisor add up to; `opening_us` of its free time was used before it began here.

    `free_us` is all of it.
    """

    began_at: int
    opening_us: int = 0
    free_us: int = 0
    paid: bool = False


class Replay:
    """Goes through the moments of an account in order of time."""

    def __init__(self, pairs: Mapping[str, Pair], allowances: Mapping[str, Allowance], findings: Findings) -> None:
        self.switched_by_nobody: Stretch | None = None
        """The first stretch that ended in a switch while no other was begun."""
        self._findings = findings
        self._left_us: dict[str, int] = defaultdict(int)
        self._used_us: dict[str, Total] = {}
        for advisor_id, allowance in allowances.items():
            pair = pairs.get(advisor_id, Pair(0))
            self._used_us[advisor_id] = Total(allowance.used_us, pair.began_at, pair.opening_us)
            # Where a tick was paid all free time had been used, so it says more than what it is said to have been.
            used_up = pair.paid and pair.free_us == allowance.used_us
            granted_us = allowance.used_us if used_up else allowance.granted_us
            self._left_us[advisor_id] = granted_us - pair.opening_us
        self._at = 0
        self._settled = 0  # credits less the cost of what has ended
        self._running: dict[str, Stretch] = {}  # in the order of seniority, for so they began
        self._was_short = False

    def moment(self, at: int, begun: Sequence[Stretch] = (), amounts: Sequence[int] = ()) -> None:
        """Go on to an instant, at which clocks began, in the order of chat ids, and credits came in or were taken."""
        at = max(at, self._at)  # an instant that was tampered with may lie before what came before it
        while (end := min((s.ended_at for s in self._running.values() if s.reason), default=at)) < at:
            self._moment(end, (), ())
        self._moment(at, begun, amounts)

    def finish(self, at: int) -> int:
        """Go on to the instant of the account, check what is left then, and return the balance."""
        last = max((s.ended_at for s in self._running.values()), default=at)
        self.moment(max(last, at, self._at))
        balance = left = self._balance()
        for stretch in self._running.values():
            self._free_time(stretch, at)
            if self._takes_free_tick(stretch, self._left_us):
                continue
            left -= stretch.next_price
            if left < 0:
                name = f"chat {stretch.chat_id!r}: state"
                self._findings.add(name, "running", "exhausted: the balance cannot pay its next tick", at)
                break
        for advisor_id, used_us in self._used_us.items():
            if used_us.stored != used_us.derived:
                name = f"allowance with advisor {advisor_id!r}: used_us"
                self._findings.add(name, used_us.stored, used_us.derived, used_us.agreed_at)
        return balance

    def _moment(self, at: int, begun: Sequence[Stretch], amounts: Sequence[int]) -> None:
        before = self._at
        self._pass_ticks(at)
        # What ran before this instant was paid from what was there before it.
        balance = self._balance()
        self._never_short(balance, before, at)
        ended = [s for s in self._running.values() if s.reason and s.ended_at <= at]
        for stretch in ended:
            self._free_time(stretch, stretch.ended_at)
            if stretch.reason is StopReason.EXHAUSTED:
                # In this one instant a purchase came after it at the earliest; credits may have been taken before it.
                self._exhausted(stretch, balance + sum(amount for amount in amounts if amount < 0))
            elif stretch.reason is StopReason.SWITCHED and all(s.chat_id == stretch.chat_id for s in begun):
                self.switched_by_nobody = self.switched_by_nobody or stretch
        for stretch in ended:
            del self._running[stretch.chat_id]
            self._settled -= stretch.cost
        self._settled += sum(amounts)
        self._never_short(self._balance(), before, at)
        for stretch in begun:
            overlapped = self._running.pop(stretch.chat_id, None)
            self._settled -= overlapped.cost if overlapped else 0
            self._running[stretch.chat_id] = stretch

    def _pass_ticks(self, at: int) -> None:
        ticks = at - self._at
        self._at = at
        sharers: dict[str, list[Stretch]] = defaultdict(list)
        for stretch in self._running.values():
            sharers[stretch.advisor_id].append(stretch)
            stretch.ran_us += ticks
        for advisor_id, stretches in sharers.items():
            rounds, rest = divmod(self._left_us[advisor_id], len(stretches))
            for rank, stretch in enumerate(stretches):
                free_us = min(ticks, rounds + (rank < rest))
                stretch.free_us += free_us
                self._left_us[advisor_id] -= free_us

    def _balance(self) -> int:
        return self._settled - sum(stretch.cost for stretch in self._running.values())

    def _never_short(self, balance: int, before: int, at: int) -> None:
        if balance < 0 and not self._was_short:
            self._was_short = True  # from here on it would be short again and again
            self._findings.add(f"balance at {instant(at)}", format_credits(balance), "at least 0.000000", before)

    def _free_time(self, stretch: Stretch, since: int) -> None:
        """Check the free time of a stretch that has ended, or is as of the account's instant."""
        if stretch.advisor_id in self._used_us:
            self._used_us[stretch.advisor_id].add(stretch.stored_free_us, since)
        if stretch.free_us != stretch.stored_free_us:
            name = f"segment of {instant(stretch.started_at)}" if stretch.reason else "open segment"
            name = f"chat {stretch.chat_id!r}: {name}: free_us"
            self._findings.add(name, stretch.stored_free_us, stretch.free_us, since)

    def _exhausted(self, stretch: Stretch, balance: int) -> None:
        """Check that what its seniors left could not pay for the next tick of a stretch, and that it was not free."""
        left_us = dict(self._left_us)
        for senior in self._running.values():
            if senior is stretch:
                break
            # Those whose lease ended there were gone. Another stop there may have come later.
            if senior.ended_at <= self._at and senior.reason is StopReason.LAPSED:
                continue
            if self._takes_free_tick(senior, left_us):
                continue
            if senior.ended_at > self._at or senior.reason is not StopReason.EXHAUSTED:
                balance -= senior.next_price
        if self._takes_free_tick(stretch, left_us) or stretch.next_price <= balance:
            name = f"chat {stretch.chat_id!r}: segment of {instant(stretch.started_at)}: reason"
            derived = "another: the next tick was free, or the balance could pay"
            self._findings.add(name, "exhausted", derived, stretch.ended_at)

    @staticmethod
    def _takes_free_tick(stretch: Stretch, left_us: dict[str, int]) -> bool:
        if left_us.get(stretch.advisor_id, 0) <= 0:
            return False
        left_us[stretch.advisor_id] -= 1
        return True
