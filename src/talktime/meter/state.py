"""The values that the meter works on, and the table of a chat's states.

All values are named tuples: a pass makes several for each of a million chats, and these are made four times as fast as
frozen dataclasses. Mappings inside them are never changed in place. Instants are microseconds since 1970 (UTC).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from talktime.meter.units import MINUTE_US, ceil_div


class ChatState(StrEnum):
    """What a chat's clock does."""

    RUNNING = "running"
    LAPSED = "lapsed"
    PAUSED = "paused"
    EXHAUSTED = "exhausted"
    ABANDONED = "abandoned"
    ENDED = "ended"


class StopReason(StrEnum):
    """Why a clock stopped, or (`EXHAUSTED`) why a start was refused."""

    LAPSED = "lapsed"
    EXHAUSTED = "exhausted"
    SWITCHED = "switched"
    PAUSED = "paused"
    ENDED = "ended"


class Event(StrEnum):
    """All that can change a chat's state."""

    START = "start"
    REFUSE = "refuse"
    RESUME = "resume"
    BEAT = "beat"
    PAUSE = "pause"
    STOP = "stop"
    SWITCH = "switch"
    LAPSE = "lapse"
    EXHAUST = "exhaust"
    ABANDON = "abandon"


_S = ChatState

TRANSITIONS: Mapping[Event, Mapping[ChatState, ChatState]] = {
    # A start opens a segment from any state but RUNNING, where it is a BEAT.
    Event.START: dict.fromkeys((_S.LAPSED, _S.PAUSED, _S.EXHAUSTED, _S.ABANDONED, _S.ENDED), _S.RUNNING),
    # A start or a resuming heartbeat that could not run even its first tick.
    Event.REFUSE: dict.fromkeys((_S.LAPSED, _S.PAUSED, _S.EXHAUSTED, _S.ABANDONED, _S.ENDED), _S.EXHAUSTED),
    Event.RESUME: {_S.LAPSED: _S.RUNNING},
    Event.BEAT: {s: s for s in (_S.RUNNING, _S.LAPSED, _S.PAUSED, _S.EXHAUSTED)},
    Event.PAUSE: {
        _S.RUNNING: _S.PAUSED,
        _S.LAPSED: _S.PAUSED,
        _S.PAUSED: _S.PAUSED,
        _S.EXHAUSTED: _S.EXHAUSTED,
    },
    Event.STOP: dict.fromkeys((_S.RUNNING, _S.LAPSED, _S.PAUSED, _S.EXHAUSTED, _S.ABANDONED), _S.ENDED),
    # Another chat in the scope was started.
    Event.SWITCH: {_S.RUNNING: _S.PAUSED, _S.LAPSED: _S.PAUSED},
    # These three are the passing of time alone.
    Event.LAPSE: {_S.RUNNING: _S.LAPSED},
    Event.EXHAUST: {_S.RUNNING: _S.EXHAUSTED},
    Event.ABANDON: dict.fromkeys((_S.LAPSED, _S.PAUSED, _S.EXHAUSTED), _S.ABANDONED),
}
"""The only source of a chat's next state. A pair that is not listed is no change (commands say what that means)."""

RESUMABLE = frozenset(TRANSITIONS[Event.ABANDON])
"""Not running, but time can still change them: they wait to be resumed, or abandoned."""

LIVE = RESUMABLE | {ChatState.RUNNING}
"""The states in which the passing of time changes a chat."""

STOP_REASON: Mapping[Event, StopReason] = {
    Event.LAPSE: StopReason.LAPSED,
    Event.EXHAUST: StopReason.EXHAUSTED,
    Event.SWITCH: StopReason.SWITCHED,
    Event.PAUSE: StopReason.PAUSED,
    Event.STOP: StopReason.ENDED,
}
"""The events that stop a running clock."""


class Scope(StrEnum):
    """Which of a user's clocks exclude each other."""

    ADVISOR = "advisor"
    USER = "user"
    NONE = "none"


class CreditKind(StrEnum):
    """Why credits come in or are taken."""

    PURCHASE = "purchase"
    GRANT = "grant"
    COMPENSATION = "compensation"
    REFUND = "refund"
    CORRECTION = "correction"

    @property
    def takes(self) -> bool:
        """Whether this kind lowers the balance."""
        return self in (CreditKind.REFUND, CreditKind.CORRECTION)


ENDLESS = 1 << 62
"""More microseconds than there are: a time that no count reaches, a lease that does not end."""


class Tariff(NamedTuple):
    """A price: micro-credits per minute, and the blocks in which time is sold (0 and 0: exact)."""

    rate: int
    first_us: int = 0
    increment_us: int = 0

    def blocks_us(self, paid_us: int) -> int:
        """Billable microseconds for `paid_us` of paid time: whole blocks, as in telephony."""
        if paid_us == 0:
            return 0
        if paid_us <= self.first_us:
            return self.first_us
        if self.increment_us == 0:
            return paid_us
        return self.first_us + ceil_div(paid_us - self.first_us, self.increment_us) * self.increment_us

    def cost(self, paid_us: int) -> int:
        """Micro-credits for a count of `paid_us`: cumulative, and rounded (up) once."""
        return ceil_div(self.rate * self.blocks_us(paid_us), MINUTE_US)

    def count_within(self, cost: int) -> int:
        """Return the largest count that costs no more than this: the inverse of `cost`; `ENDLESS` if all are free."""
        if self.rate == 0:
            return ENDLESS
        # ceil(a / b) <= c where a <= b * c
        blocks_us = cost * MINUTE_US // self.rate
        if blocks_us < self.first_us:
            return 0
        if self.increment_us == 0:
            return blocks_us
        return blocks_us - (blocks_us - self.first_us) % self.increment_us


class RateCard(NamedTuple):
    """What an advisor asks: the tariff of new segments, and the free time granted at a pair's first start."""

    tariff: Tariff
    free_us: int


class Policy(NamedTuple):
    """The settings that a command takes with it. `abandon_after_us` is longer than `lease_us`."""

    scope: Scope
    lease_us: int
    abandon_after_us: int


class Allowance(NamedTuple):
    """The free time of a user with one advisor."""

    granted_us: int
    used_us: int

    @property
    def left_us(self) -> int:
        """What is left of it."""
        return self.granted_us - self.used_us


class Chat(NamedTuple):
    """A chat's time record as of its account's instant.

    `elapsed_us`, `free_us` and `cost` are totals over all segments, the open one included; `count_us` is the paid
    time in the present count. `opened_at` and `opened_count_us` are the instant and the count at which the open
    segment began (None and 0 if the clock stands still). `last_heartbeat_at` is the last sign of life of any kind.
    """

    chat_id: str
    advisor_id: str
    state: ChatState
    tariff: Tariff
    lease_us: int
    abandon_after_us: int
    last_heartbeat_at: int
    started_at: int
    revision: int = 1
    start_key: str | None = None
    stopped_at: int | None = None
    stop_reason: StopReason | None = None
    opened_at: int | None = None
    opened_count_us: int = 0
    count_us: int = 0
    elapsed_us: int = 0
    free_us: int = 0
    cost: int = 0

    def with_totals(self, *, count_us: int, elapsed_us: int, free_us: int, cost: int) -> Chat:
        """Return the chat with these totals: they are its last fields, so all others are one slice."""
        return Chat(*self[:-4], count_us, elapsed_us, free_us, cost)

    @property
    def accrued(self) -> int:
        """Micro-credits that the open segment has cost so far; 0 where none is open."""
        if self.opened_at is None:
            return 0
        return self.tariff.cost(self.count_us) - self.tariff.cost(self.opened_count_us)

    @property
    def lease_end(self) -> int:
        """The first instant at which a running clock no longer runs, unless a heartbeat comes."""
        return self.last_heartbeat_at + self.lease_us

    @property
    def abandoned_at(self) -> int:
        """The instant from which a resumable chat is abandoned, unless a sign of life comes."""
        return self.last_heartbeat_at + self.abandon_after_us


class Segment(NamedTuple):
    """A closed stretch ``[started_at, ended_at)`` in which a chat's clock ran. `count_us` is the count at its begin."""

    chat_id: str
    advisor_id: str
    started_at: int
    ended_at: int
    reason: StopReason
    tariff: Tariff
    count_us: int
    free_us: int
    paid_us: int
    cost: int


class Credit(NamedTuple):
    """Credits that came in (positive) or were taken (negative), with the idempotency key of the request."""

    kind: CreditKind
    amount: int
    credited_at: int
    memo: str
    key: str


class Account(NamedTuple):
    """A user's whole metering state at the instant `at`.

    `journal` is what happened since the state was loaded, oldest first: the history that is still to be written.
    """

    user_id: str
    at: int
    balance: int = 0
    allowances: Mapping[str, Allowance] = MappingProxyType({})
    chats: Mapping[str, Chat] = MappingProxyType({})
    journal: tuple[Segment | Credit, ...] = ()


def seniority(chat: Chat) -> tuple[int, str]:
    """Sort key of running chats: the order in which their open segments began, ties by chat id."""
    return (chat.opened_at or 0, chat.chat_id)


def halt(chat: Chat, at: int, event: Event) -> tuple[Chat, Segment | None]:
    """Stop a running clock at the instant `at`, up to which its totals stand.

    Returns the chat and its closed segment, or None for the segment if it would be empty.
    """
    opened_at = chat.opened_at
    if opened_at is None:
        message = f"chat {chat.chat_id!r} does not run"
        raise AssertionError(message)
    reason = STOP_REASON[event]
    paid_us = chat.count_us - chat.opened_count_us
    segment = Segment(
        chat_id=chat.chat_id,
        advisor_id=chat.advisor_id,
        started_at=opened_at,
        ended_at=at,
        reason=reason,
        tariff=chat.tariff,
        count_us=chat.opened_count_us,
        free_us=at - opened_at - paid_us,
        paid_us=paid_us,
        cost=chat.accrued,
    )
    stopped = chat._replace(
        state=TRANSITIONS[event][chat.state],
        stopped_at=at,
        stop_reason=reason,
        opened_at=None,
        opened_count_us=0,
    )
    return stopped, segment if at > opened_at else None
