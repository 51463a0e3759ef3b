"""What becomes of one user's old rows: decided here, from these values alone.

===========================================  ==========================================================================
what the old tables hold                     what is made of it
===========================================  ==========================================================================
a time record                                its chat's totals begin with its duration, free time and credits, verbatim
a record that is active, its last heartbeat  the clock runs on from the instant of the import, at the advisor's present
within the lease when it was read            tariff; the gap is not billed. Where clocks exclude each other the one
                                             heard of last runs, and the others were switched away from
a record that is active, but silent          lapsed at the end of its lease, and abandoned when that is long ago
a record that is not active                  ended at its last heartbeat; a start takes it up again
several records of one chat                  the one heard of last; the others are listed
a chat without a record                      ended; its totals begin with its own duration
a record without a chat, or of another       taken over by what the record says; the other advisor is listed
advisor than its chat
several records of a user with an advisor    free time granted, and used: the most that any of them says, used no more
                                             than granted. If none says what was granted: the advisor's rate card
a user who is not in the users' table        taken over with no credits, and listed
several users of one id                      none is taken over, since nobody knows whose credits these are; listed
negative credits                             the balance begins with 0; what was below it is listed
null                                         0; of times, the next best known: heartbeat, timestamp, import
a figure that is negative, not finite, or    0, and listed
too large
more free time than duration                 so it is kept, as it is the pair's; the chat's own shows its duration
more free time than was granted              used up; listed
an id that talktime does not take, or none   not taken over, and listed with all its figures
===========================================  ==========================================================================

Durations are rounded to the microsecond and credits to the micro-credit, half to even. Whatever is listed carries the
figures that were not taken over, so that for each user: before = after + listed, exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from talktime.api.params import is_id
from talktime.legacy.rows import NOTHING, Figures, Listed, OldChat, OldRecord, OldUser, scaled
from talktime.meter import commands
from talktime.meter.advance import advance
from talktime.meter.state import Account, Allowance, Chat, ChatState, Policy, RateCard, Scope, StopReason
from talktime.meter.units import MAX_BALANCE, MAX_FREE_US, MICRO
from talktime.store.openings import OpeningChat, TakenOver

ELAPSED_US_MAX = 50 * MAX_FREE_US
"""Fifty years: no duration is longer, and an integer column has room for more than that in seconds."""


@dataclass(slots=True)
class Decided:
    """What becomes of a user: what the old rows add up to, what is to be written (None: nothing), what is listed."""

    user_id: str
    before: Figures
    taken: TakenOver | None
    listed: list[Listed]
    records: int
    chats: int

    @property
    def left_out(self) -> Figures:
        """All that was listed."""
        figures = Figures()
        for one in self.listed:
            figures = figures.plus(one.figures)
        return figures


class Rules(NamedTuple):
    """What the decisions follow beside the rows: the settings, the rate cards, and how old figures are measured."""

    policy: Policy
    cards: Mapping[str, RateCard]
    default_card: RateCard
    second_us: int = MICRO
    """Microseconds in a unit of the old durations."""

    def card_of(self, advisor_id: str) -> RateCard:
        """Return the rate card in force."""
        return self.cards.get(advisor_id, self.default_card)


@dataclass(slots=True)
class _Old:
    """One chat of the old system: where it comes from, and its figures once they are valid."""

    name: str
    chat_id: str
    advisor_id: str
    figures: Figures
    record: OldRecord | None = None
    is_alive: bool = False


@dataclass(slots=True)
class _Pair:
    granted_us: int | None = None
    used_us: int = 0


@dataclass(slots=True)
class _Desk:
    """The work on one user: the figures met so far, and what is listed."""

    user_id: str
    rules: Rules
    read_at: int
    before: Figures = NOTHING
    listed: list[Listed] = field(default_factory=list)

    def note(self, row: str, reason: str, figures: Figures = NOTHING) -> None:
        self.listed.append(Listed(self.user_id, row, reason, figures))

    def figure(self, row: str, name: str, text: str | None, *, scale: int, most: int, as_figures: _AsFigures) -> int:
        """Read a figure: what cannot be one is 0, and listed."""
        if text is None:
            return 0
        value = scaled(text, scale)
        if value is None:
            self.note(row, f"{name} is no number that can be taken over: {text}")
            return 0
        self.before = self.before.plus(as_figures(value))
        if not 0 <= value <= most:
            self.note(row, f"{name} is {'negative' if value < 0 else 'too large'}: {text}", as_figures(value))
            return 0
        return value


_AsFigures = Callable[[int], Figures]


def _no_figures(_: int) -> Figures:
    return Figures()


def decide(
    user_id: str,
    users: Sequence[OldUser],
    records: Sequence[OldRecord],
    chats: Sequence[OldChat],
    *,
    rules: Rules,
    read_at: int,
    now: int,
) -> Decided:
    """Decide what becomes of all the rows of one user at the instant `now`, in microseconds.

    They were read at `read_at`, by the old database's clock: who was heard of then had not fallen silent.
    """
    desk = _Desk(user_id, rules, read_at)
    had = sum(_credits(desk, user) for user in users)
    known = _valid_chats(desk, chats)
    valid = [(record, old) for record in records if (old := _valid_record(desk, record)) is not None]
    # Duplicates count for the pair's free time: what one of them used was used.
    pairs = _pairs(desk, valid)
    olds = _merged(desk, known, valid)
    fault = ""
    if len(users) > 1:
        fault = "there are several users of this id"
    elif not is_id(user_id):
        fault = "the user's id is not one that talktime takes"
    if fault:
        left = Figures(credits=max(had, 0))
        for old in olds.values():
            left = left.plus(old.figures)
        desk.note("user", fault, left)
        return Decided(user_id, desk.before, None, desk.listed, len(records), len(chats))
    if not users:
        desk.note("user", "not in the users' table; taken over with no credits")
    account = _account(desk, max(had, 0), olds, pairs, now)
    used = {advisor_id: allowance.used_us for advisor_id, allowance in account.allowances.items()}
    taken = TakenOver(
        account,
        had,
        used,
        {chat_id: _opening_of(old) for chat_id, old in olds.items()},
    )
    return Decided(user_id, desk.before, taken, desk.listed, len(records), len(chats))


def _opening_of(old: _Old) -> OpeningChat:
    record_id = None if old.record is None else old.record.record_id
    return OpeningChat(record_id, old.figures.elapsed_us, old.figures.free_us, old.figures.cost)


def _credits(desk: _Desk, user: OldUser) -> int:
    value = scaled(user.credits or "0", MICRO)
    if value is None or abs(value) > MAX_BALANCE:
        desk.note("user", f"credits are no number that can be taken over: {user.credits}")
        return 0
    desk.before = desk.before.plus(Figures(credits=value))
    if value < 0:
        desk.note("user", f"credits are negative: {user.credits}", Figures(credits=value))
    return value


def _valid_chats(desk: _Desk, chats: Iterable[OldChat]) -> dict[str, _Old]:
    found: dict[str, _Old] = {}
    for chat in sorted(chats, key=_in_words):
        name = f"chat {chat.chat_id}"
        elapsed_us = _duration(desk, name, chat.duration)
        figures = Figures(elapsed_us=elapsed_us)
        fault = _fault(chat.chat_id, chat.advisor_id)
        if fault or chat.chat_id is None or chat.advisor_id is None:
            desk.note(name, fault, figures)
        elif chat.chat_id in found:
            desk.note(name, "there are several chats of this id", figures)
        else:
            found[chat.chat_id] = _Old(name, chat.chat_id, chat.advisor_id, figures)
    return found


def _valid_record(desk: _Desk, record: OldRecord) -> _Old | None:
    name = f"record {record.record_id}"
    elapsed_us = _duration(desk, name, record.duration)
    free_us = desk.figure(
        name,
        "free_time_used",
        record.free_time_used,
        scale=desk.rules.second_us,
        most=ELAPSED_US_MAX,
        as_figures=lambda us: Figures(free_us=us),
    )
    cost = desk.figure(
        name,
        "credits_used",
        record.credits_used,
        scale=MICRO,
        most=MAX_BALANCE,
        as_figures=lambda cost: Figures(cost=cost),
    )
    fault = _fault(record.chat_id, record.advisor_id)
    if fault or record.chat_id is None or record.advisor_id is None:
        desk.note(name, fault, Figures(elapsed_us, free_us, cost))
        return None
    silent_at = 0 if record.heartbeat_at is None else record.heartbeat_at + desk.rules.policy.lease_us
    is_alive = record.is_active and desk.read_at < silent_at
    return _Old(name, record.chat_id, record.advisor_id, Figures(elapsed_us, free_us, cost), record, is_alive)


def _duration(desk: _Desk, name: str, text: str | None) -> int:
    return desk.figure(
        name,
        "duration",
        text,
        scale=desk.rules.second_us,
        most=ELAPSED_US_MAX,
        as_figures=lambda us: Figures(elapsed_us=us),
    )


def _fault(chat_id: str | None, advisor_id: str | None) -> str:
    for what, value in (("chat", chat_id), ("advisor", advisor_id)):
        if value is None:
            return f"it names no {what}"
        if not is_id(value):
            return f"the {what}'s id is not one that talktime takes: {value}"
    return ""


def _pairs(desk: _Desk, valid: Iterable[tuple[OldRecord, _Old]]) -> dict[str, _Pair]:
    pairs: dict[str, _Pair] = defaultdict(_Pair)
    for record, old in valid:
        pair = pairs[old.advisor_id]
        pair.used_us = max(pair.used_us, old.figures.free_us)
        if record.allocation is not None:
            granted_us = desk.figure(
                old.name,
                "total_free_time_allocation",
                record.allocation,
                scale=desk.rules.second_us,
                most=MAX_FREE_US,
                as_figures=_no_figures,
            )
            pair.granted_us = max(pair.granted_us or 0, granted_us)
    return pairs


def _merged(desk: _Desk, known: Mapping[str, _Old], valid: Iterable[tuple[OldRecord, _Old]]) -> dict[str, _Old]:
    """Return one old chat for each chat id: the record heard of last, else the chat."""
    olds = dict(known)
    for _, old in sorted(valid, key=lambda one: _heard_of(one[0]), reverse=True):
        there = olds.get(old.chat_id)
        if there is not None and there.record is not None:
            desk.note(old.name, f"{there.name} is of the same chat and was heard of later", old.figures)
            continue
        if there is not None and there.advisor_id != old.advisor_id:
            desk.note(
                there.name, f"its advisor is {there.advisor_id}, its record's {old.advisor_id}: the record's is taken"
            )
        if there is not None and there.figures.elapsed_us:
            # The chat's duration is the record's, told once more; where it is another one, it is not added to it.
            desk.before = desk.before.plus(Figures(elapsed_us=-there.figures.elapsed_us))
            if there.figures.elapsed_us != old.figures.elapsed_us:
                desk.note(there.name, f"its duration is not its record's ({old.name}): the record's is taken")
        olds[old.chat_id] = old
    return olds


def _heard_of(record: OldRecord) -> tuple[int, int, list[str]]:
    return record.heartbeat_at or 0, record.recorded_at or 0, _in_words(record)


def _in_words(row: OldChat | OldRecord) -> list[str]:
    """Return an order of rows, so that nothing depends on that in which the old database gives them."""
    return [str(value) for value in row]


def _account(desk: _Desk, balance: int, olds: Mapping[str, _Old], pairs: Mapping[str, _Pair], now: int) -> Account:
    rules = desk.rules
    allowances: dict[str, Allowance] = {}
    for advisor_id in sorted({old.advisor_id for old in olds.values()}):
        pair = pairs.get(advisor_id, _Pair())
        granted_us = rules.card_of(advisor_id).free_us if pair.granted_us is None else pair.granted_us
        if pair.used_us > granted_us:
            desk.note(f"advisor {advisor_id}", f"{pair.used_us} us of free time used of {granted_us} us: used up")
        allowances[advisor_id] = Allowance(granted_us, min(pair.used_us, granted_us))
    chats = {chat_id: _chat(old, rules, now) for chat_id, old in olds.items()}
    account = Account(desk.user_id, now, balance, allowances, chats)
    for chat_id in _running(olds, rules.policy):
        chat = account.chats[chat_id]
        account = commands.start(
            account,
            now,
            chat_id=chat_id,
            advisor_id=chat.advisor_id,
            card=rules.card_of(chat.advisor_id),
            policy=rules.policy,
        )
    return advance(account, now)


def _running(olds: Mapping[str, _Old], policy: Policy) -> list[str]:
    """Return the chats whose clocks run on, one of those that exclude each other."""
    alive = [old for old in olds.values() if old.is_alive]
    best: dict[str, _Old] = {}
    for old in sorted(alive, key=lambda one: (one.record.heartbeat_at or 0 if one.record else 0, one.chat_id)):
        group = {Scope.ADVISOR: old.advisor_id, Scope.USER: "", Scope.NONE: old.chat_id}[policy.scope]
        best[group] = old
    return sorted(old.chat_id for old in best.values())


def _chat(old: _Old, rules: Rules, now: int) -> Chat:
    """Return a chat as the old system left it."""
    record, policy = old.record, rules.policy
    known = [] if record is None else [at for at in (record.recorded_at, record.heartbeat_at) if at is not None]
    heard_at = min(
        now, max(known, default=now) if record is None or record.heartbeat_at is None else record.heartbeat_at
    )
    started_at = min([now, heard_at, *known])
    if record is None or not record.is_active:
        state, reason, stopped_at = ChatState.ENDED, StopReason.ENDED, heard_at
    elif old.is_alive:
        state, reason, stopped_at = ChatState.PAUSED, StopReason.SWITCHED, heard_at
    else:
        state, reason, stopped_at = ChatState.LAPSED, StopReason.LAPSED, min(now, heard_at + policy.lease_us)
    return Chat(
        chat_id=old.chat_id,
        advisor_id=old.advisor_id,
        state=state,
        tariff=rules.card_of(old.advisor_id).tariff,
        lease_us=policy.lease_us,
        abandon_after_us=policy.abandon_after_us,
        last_heartbeat_at=heard_at,
        started_at=started_at,
        stopped_at=stopped_at,
        stop_reason=reason,
        elapsed_us=old.figures.elapsed_us,
        free_us=_opening_of(old).chat_free_us,
        cost=old.figures.cost,
    )
