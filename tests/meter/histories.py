"""Random histories of one user at the scale of microseconds, as values and as Hypothesis strategies."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

CHATS = {"a": "x", "b": "x", "c": "y", "d": "x"}
"""Chats, and the advisor to whom each belongs."""

SCOPES = ("advisor", "user", "none")
KINDS = ("purchase", "grant", "compensation", "refund", "correction")

# Micro-credits per minute: nothing, next to nothing, less than one a tick, one, an uneven one, many.
RATES = (0, 1, 7_000_000, 60_000_000, 90_000_001, 600_000_000)
BLOCKS = ((0, 0), (0, 4), (7, 0), (5, 3), (10, 10))


@dataclass(frozen=True, slots=True)
class Card:
    """A rate card in micro-credits per minute and microseconds."""

    rate: int
    first_us: int
    increment_us: int
    free_us: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force."""

    scope: str
    lease_us: int
    abandon_after_us: int


@dataclass(frozen=True, slots=True)
class Step:
    """After `wait_us` (negative: the clock steps back) something happens.

    `what` is start, heartbeat, fast_heartbeat, pause, stop, credit, card (a new rate card for the chat's advisor),
    materialize or wait.
    """

    wait_us: int
    what: str
    chat_id: str = ""
    key: str | None = None
    kind: str = ""
    amount: int = 0
    card: Card | None = None


cards = st.builds(
    lambda rate, block, free_us: Card(rate, block[0], block[1], free_us),
    st.sampled_from(RATES),
    st.sampled_from(BLOCKS),
    st.sampled_from((0, 1, 5, 13, 40)),
)

settings_in_force = st.builds(
    lambda scope, lease_us, more_us: Settings(scope, lease_us, lease_us + more_us),
    st.sampled_from(SCOPES),
    st.sampled_from((1, 4, 20, 50)),
    st.sampled_from((1, 10, 60)),
)

_waits = st.one_of(st.integers(0, 12), st.integers(0, 60), st.just(0), st.integers(-10, -1))
_chats = st.sampled_from(sorted(CHATS))


def _step(what: str) -> st.SearchStrategy[Step]:
    if what == "credit":
        return st.builds(
            Step, _waits, st.just(what), kind=st.sampled_from(KINDS), amount=st.sampled_from((1, 2, 9, 30, 200))
        )
    if what == "card":
        return st.builds(Step, _waits, st.just(what), chat_id=_chats, card=cards)
    if what in ("materialize", "wait"):
        return st.builds(Step, _waits, st.just(what))
    if what == "start":
        return st.builds(Step, _waits, st.just(what), chat_id=_chats, key=st.sampled_from((None, None, "k1", "k2")))
    return st.builds(Step, _waits, st.just(what), chat_id=_chats)


_LIKELY = (
    *("start",) * 4,
    *("fast_heartbeat",) * 3,
    *("heartbeat",) * 2,
    *("credit",) * 2,
    "pause",
    "stop",
    "card",
    "materialize",
    "wait",
)

steps = st.sampled_from(_LIKELY).flatmap(_step)
histories = st.lists(steps, min_size=1, max_size=25)
