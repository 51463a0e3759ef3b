"""The metering process, one microsecond tick at a time: state, commands, readings.

This is the oracle that the product is tested against: it is written to be obviously right, not to be fast, and shares
nothing with the product. Time is in integer microseconds, money in integer micro-credits.
"""

from __future__ import annotations

from copy import copy as shallow_copy
from dataclasses import dataclass
from typing import Final

MINUTE_US: Final = 60_000_000
FOREVER_US: Final = 10**30
"""A lease that no test outlives."""


class UnknownChat(Exception):
    """There is no such chat (404)."""


class WrongAdvisor(Exception):
    """The chat belongs to another advisor (409)."""


class ChatNotActive(Exception):
    """A heartbeat for an abandoned or ended chat (409)."""


class InsufficientBalance(Exception):
    """A taking of more than the balance holds (409)."""


class Beyond:
    """The type of `BEYOND`."""

    def __repr__(self) -> str:
        return "BEYOND"


BEYOND: Final = Beyond()
"""A projection that was not decided within the horizon."""


@dataclass(frozen=True, slots=True)
class Tariff:
    """Micro-credits per minute, the first block and the increment."""

    rate: int
    first_us: int
    increment_us: int

    def blocks(self, p: int) -> int:
        """The time that is charged for the paid time `p`."""
        if p == 0:
            return 0
        if p <= self.first_us:
            return self.first_us
        if self.increment_us == 0:
            return p
        increments = -(-(p - self.first_us) // self.increment_us)
        return self.first_us + increments * self.increment_us

    def cost(self, p: int) -> int:
        """C(p), rounded up once."""
        return -(-self.rate * self.blocks(p) // MINUTE_US)


@dataclass(slots=True)
class Segment:
    """A closed stretch `[started_at, ended_at)` in which a chat's clock ran; never empty, never changed."""

    chat_id: str
    advisor_id: str
    started_at: int
    ended_at: int
    reason: str
    free_us: int
    paid_us: int
    cost: int
    count_begin: int
    count_end: int
    tariff: Tariff


@dataclass(slots=True)
class Chat:
    """A chat's record. `elapsed_us`, `free_us`, `cost` are totals over all segments including the open one."""

    chat_id: str
    advisor_id: str
    state: str  # running, lapsed, paused, exhausted, abandoned, ended
    tariff: Tariff
    count_us: int  # the paid time in the present count
    lease_us: int
    abandon_after_us: int
    last_sign_at: int  # the last heartbeat or other sign of life
    revision: int
    started_at: int  # the first start
    stopped_at: int | None
    stop_reason: str | None
    elapsed_us: int
    free_us: int
    cost: int
    open_started_at: int | None  # None: no open segment, and then the next two are 0
    open_count: int  # count_us when the open segment began
    open_free_us: int  # the free time of the open segment, so far
    start_key: str | None


Ticks = list[tuple[Chat, int | None]]
"""The running chats in order of seniority, each with the price of its tick; None: the tick is free."""


def seniority(chat: Chat) -> tuple[int, str]:
    """The sort key of running chats."""
    assert chat.open_started_at is not None
    return chat.open_started_at, chat.chat_id


def in_scope(scope: str, chat: Chat, other: Chat) -> bool:
    """Whether only one of the two chats may run."""
    if other is chat or scope == "none":
        return False
    if scope == "user":
        return True
    if scope == "advisor":
        return other.advisor_id == chat.advisor_id
    raise ValueError(scope)


class Reference:
    """One user's account and chats."""

    def __init__(self, now: int) -> None:
        self.at = now
        self.balance = 0
        self.credited = 0  # net of takings
        self.granted: dict[str, int] = {}  # by advisor
        self.used: dict[str, int] = {}  # by advisor
        self.chats: dict[str, Chat] = {}
        self.segments: list[Segment] = []  # in order of closing; at one instant by step, then by seniority

    def copy(self) -> Reference:
        """A copy to look ahead with. Closed segments never change, so the two share them."""
        other = Reference(self.at)
        other.balance = self.balance
        other.credited = self.credited
        other.granted = dict(self.granted)
        other.used = dict(self.used)
        other.chats = {chat_id: shallow_copy(chat) for chat_id, chat in self.chats.items()}
        other.segments = list(self.segments)
        return other

    # The process

    def advance(self, to: int) -> None:
        """All five steps for every tick before `to`, then steps 1 to 4 at `to` itself. Nothing if `to` is past."""
        if to < self.at:
            return
        while self.at < to:
            self._pass(self._decide())
        self._decide()

    def _decide(self) -> Ticks:
        """Steps 1 to 4 at the instant. They take nothing: what was decided is taken when the tick passes."""
        t = self.at

        # 1. Leases end.
        for chat in self._running():
            if t >= chat.last_sign_at + chat.lease_us:
                self._close(chat, "lapsed", "lapsed")

        # 2. Chats without a sign of life are abandoned.
        for chat in self.chats.values():
            if chat.state in ("lapsed", "paused", "exhausted") and t >= chat.last_sign_at + chat.abandon_after_us:
                chat.state = "abandoned"

        # 3. In order of seniority, ticks are free as far as the allowance goes.
        free_left = {advisor_id: granted - self.used[advisor_id] for advisor_id, granted in self.granted.items()}
        free: list[bool] = []
        running = self._running()
        for chat in running:
            if free_left[chat.advisor_id] > 0:
                free_left[chat.advisor_id] -= 1
                free.append(True)
            else:
                free.append(False)

        # 4. In the same order, paid ticks are paid for, or their chats stop.
        balance_left = self.balance
        ticks: Ticks = []
        for chat, is_free in zip(running, free, strict=True):
            if is_free:
                ticks.append((chat, None))
                continue
            price = chat.tariff.cost(chat.count_us + 1) - chat.tariff.cost(chat.count_us)
            if price > 0 and price > balance_left:
                self._close(chat, "exhausted", "exhausted")
                continue
            balance_left -= price
            ticks.append((chat, price))
        return ticks

    def _pass(self, ticks: Ticks) -> None:
        """Step 5: the tick passes, and what was decided for it is taken."""
        for chat, price in ticks:
            chat.elapsed_us += 1
            if price is None:
                self.used[chat.advisor_id] += 1
                chat.free_us += 1
                chat.open_free_us += 1
            else:
                self.balance -= price
                chat.cost += price
                chat.count_us += 1
        self.at += 1

    def _running(self) -> list[Chat]:
        """The running chats in order of seniority."""
        running = [chat for chat in self.chats.values() if chat.state == "running"]
        if len(running) > 1:
            running.sort(key=seniority)
        return running

    def _open(self, chat: Chat) -> None:
        """The chat's clock starts at the instant."""
        chat.state = "running"
        chat.stopped_at = None
        chat.stop_reason = None
        chat.open_started_at = self.at
        chat.open_count = chat.count_us
        chat.open_free_us = 0

    def _close(self, chat: Chat, state: str, reason: str) -> None:
        """A running chat's clock stops at the instant."""
        assert chat.open_started_at is not None
        if chat.open_started_at < self.at:
            self.segments.append(
                Segment(
                    chat_id=chat.chat_id,
                    advisor_id=chat.advisor_id,
                    started_at=chat.open_started_at,
                    ended_at=self.at,
                    reason=reason,
                    free_us=chat.open_free_us,
                    paid_us=chat.count_us - chat.open_count,
                    cost=chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.open_count),
                    count_begin=chat.open_count,
                    count_end=chat.count_us,
                    tariff=chat.tariff,
                )
            )
        chat.state = state
        chat.stopped_at = self.at
        chat.stop_reason = reason
        chat.open_started_at = None
        chat.open_count = 0
        chat.open_free_us = 0

    # Commands: advance to the instant, apply, steps 1 to 4 once more

    def start(
        self,
        now: int,
        chat_id: str,
        advisor_id: str,
        tariff: Tariff,
        free_us: int,
        *,
        scope: str,
        lease_us: int,
        abandon_after_us: int,
        key: str | None = None,
    ) -> None:
        """`tariff` and `free_us` are what the advisor's rate card says now."""
        self.advance(max(now, self.at))
        chat = self.chats.get(chat_id)
        if chat is not None:
            if chat.advisor_id != advisor_id:
                raise WrongAdvisor(chat_id)
            if key is not None and key == chat.start_key:
                return
        if advisor_id not in self.granted:
            self.granted[advisor_id] = free_us
            self.used[advisor_id] = 0
        if chat is None:
            chat = Chat(
                chat_id=chat_id,
                advisor_id=advisor_id,
                state="exhausted",  # until it opens, below
                tariff=tariff,
                count_us=0,
                lease_us=lease_us,
                abandon_after_us=abandon_after_us,
                last_sign_at=self.at,
                revision=0,
                started_at=self.at,
                stopped_at=None,
                stop_reason=None,
                elapsed_us=0,
                free_us=0,
                cost=0,
                open_started_at=None,
                open_count=0,
                open_free_us=0,
                start_key=None,
            )
            self.chats[chat_id] = chat
        self._sign_of_life(chat)
        self._locked_command(chat, lease_us, abandon_after_us)
        chat.start_key = key
        if chat.state != "running":
            trial = self.copy()
            trial._switch_and_open(trial.chats[chat_id], tariff, scope)
            trial._decide()
            if trial.chats[chat_id].state == "running":
                self._switch_and_open(chat, tariff, scope)
            else:
                self._refuse(chat)
        self._decide()

    def heartbeat(self, now: int, chat_id: str, *, scope: str, lease_us: int, abandon_after_us: int) -> None:
        """The full path, under the account's lock."""
        self.advance(max(now, self.at))
        chat = self._chat(chat_id)
        if chat.state in ("abandoned", "ended"):
            raise ChatNotActive(chat_id)
        self._sign_of_life(chat)
        self._locked_command(chat, lease_us, abandon_after_us)
        if chat.state == "lapsed" and not any(in_scope(scope, chat, other) for other in self._running()):
            trial = self.copy()
            trial._open(trial.chats[chat_id])
            trial._decide()
            if trial.chats[chat_id].state == "running":
                self._open(chat)
            else:
                self._refuse(chat)
        self._decide()

    def fast_heartbeat(self, now: int, chat_id: str) -> bool:
        """The path without the account's lock: looks at what is stored, and does not advance the account."""
        chat = self.chats.get(chat_id)
        if chat is None or chat.state != "running" or now >= chat.last_sign_at + chat.lease_us:
            return False
        chat.last_sign_at = max(chat.last_sign_at, now)
        return True

    def pause(self, now: int, chat_id: str, *, lease_us: int, abandon_after_us: int) -> None:
        """Nothing changes for an abandoned or ended chat."""
        self.advance(max(now, self.at))
        chat = self._chat(chat_id)
        if chat.state in ("abandoned", "ended"):
            return
        self._sign_of_life(chat)
        self._locked_command(chat, lease_us, abandon_after_us)
        if chat.state == "running":
            self._close(chat, "paused", "paused")
        elif chat.state == "lapsed":
            chat.state = "paused"
        self._decide()

    def stop(self, now: int, chat_id: str) -> None:
        """The first stop wins. It is no sign of life."""
        self.advance(max(now, self.at))
        chat = self._chat(chat_id)
        if chat.state == "ended":
            return
        chat.revision += 1
        if chat.state == "running":
            self._close(chat, "ended", "ended")
        else:
            chat.state = "ended"
        self._decide()

    def credit(self, now: int, kind: str, amount: int) -> None:
        """`amount` is positive; the kind says whether it is added or taken."""
        if amount <= 0:
            raise ValueError(amount)
        if kind not in ("purchase", "grant", "compensation", "refund", "correction"):
            raise ValueError(kind)
        self.advance(max(now, self.at))
        if kind in ("refund", "correction"):
            if amount > self.balance:
                raise InsufficientBalance(amount)
            self.balance -= amount
            self.credited -= amount
        else:
            self.balance += amount
            self.credited += amount
        self._decide()

    def _chat(self, chat_id: str) -> Chat:
        if chat_id not in self.chats:
            raise UnknownChat(chat_id)
        return self.chats[chat_id]

    def _sign_of_life(self, chat: Chat) -> None:
        chat.last_sign_at = max(chat.last_sign_at, self.at)

    def _locked_command(self, chat: Chat, lease_us: int, abandon_after_us: int) -> None:
        chat.revision += 1
        chat.lease_us = lease_us
        chat.abandon_after_us = abandon_after_us

    def _switch_and_open(self, chat: Chat, tariff: Tariff, scope: str) -> None:
        """What a start does that finds the chat not running, and is not refused."""
        for other in self._running():
            if in_scope(scope, chat, other):
                self._close(other, "paused", "switched")
                self._sign_of_life(other)
                other.revision += 1
        for other in self.chats.values():
            if other.state == "lapsed" and in_scope(scope, chat, other):
                other.state = "paused"
                self._sign_of_life(other)
                other.revision += 1
        if tariff != chat.tariff:
            chat.tariff = tariff
            chat.count_us = 0
        self._open(chat)

    def _refuse(self, chat: Chat) -> None:
        """The chat, not running, could not run even its first tick."""
        chat.state = "exhausted"
        chat.stopped_at = self.at
        chat.stop_reason = "exhausted"

    # A reading

    def reading(self, now: int, chat_id: str, *, horizon_us: int) -> dict[str, object]:
        """Return the reading, changing nothing.

        `free_until` and `exhausts_at` are looked for from `as_of` to `as_of + horizon_us`, both included; what is not
        decided there is BEYOND.
        """
        view = self.copy()
        view.advance(max(now, view.at))
        chat = view._chat(chat_id)
        accrues_until: int | None = None
        paid_from: int | None = None
        free_until: int | Beyond | None = None
        exhausts_at: int | Beyond | None = None
        if chat.state == "running":
            accrues_until, paid_from = view._as_leases_stand(chat_id)
            free_until, exhausts_at = view._if_all_keep_beating(chat_id, horizon_us)
        return {
            "state": chat.state,
            "accruing": chat.state == "running",
            "revision": chat.revision,
            "as_of": view.at,
            "elapsed_us": chat.elapsed_us,
            "free_used_us": chat.free_us,
            "free_left_us": view.granted[chat.advisor_id] - view.used[chat.advisor_id],
            "credits_used": chat.cost,
            "balance": view.balance,
            "tariff": chat.tariff,
            "count_us": chat.count_us,
            "accrues_until": accrues_until,
            "paid_from": paid_from,
            "free_until": free_until,
            "exhausts_at": exhausts_at,
            "started_at": chat.started_at,
            "stopped_at": chat.stopped_at,
            "stop_reason": chat.stop_reason,
        }

    def _as_leases_stand(self, chat_id: str) -> tuple[int, int | None]:
        """A running chat's `accrues_until` and `paid_from`."""
        future = self.copy()
        chat = future.chats[chat_id]
        paid_from: int | None = None
        while True:
            ticks = future._decide()
            if chat.state != "running":
                return future.at, paid_from
            if paid_from is None and not is_free(chat, ticks):
                paid_from = future.at
            future._pass(ticks)

    def _if_all_keep_beating(self, chat_id: str, horizon_us: int) -> tuple[int | Beyond | None, int | Beyond]:
        """A running chat's `free_until` and `exhausts_at`."""
        future = self.copy()
        for other in future.chats.values():
            if other.state == "running":
                other.lease_us = FOREVER_US
        chat = future.chats[chat_id]
        free_until: int | Beyond | None = BEYOND
        while True:
            ticks = future._decide()
            if free_until is BEYOND and not is_free(chat, ticks):
                # Null once it pays: if the tick at `as_of` itself is paid.
                free_until = future.at if future.at > self.at else None
            if chat.state != "running":
                return free_until, future.at
            if future.at == self.at + horizon_us:
                return free_until, BEYOND
            future._pass(ticks)


def is_free(chat: Chat, ticks: Ticks) -> bool:
    """Whether the chat runs this tick, and it is free."""
    return any(runs is chat and price is None for runs, price in ticks)
