"""What may be stored of a user after a step, according to the reference, and what it must show.

Mostly there is one belief. After a request that got no answer there are two: it took effect, or it did not. After
requests that raced there is one for each order. Each answer and each reading rules out those that it contradicts; if
none is left, the service shows something that it must not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import combinations_with_replacement, permutations

from tests.meter import reference
from tests.meter.histories import Card, Settings, Step
from tests.meter.pair import apply_to_reference
from tests.meter.reference import Reference
from tests.simulator.readings import figures, reading_mismatch
from tests.simulator.service import Answer, Command, differ

REFUSALS = {
    reference.UnknownChat: (404, "chat-not-found"),
    reference.WrongAdvisor: (409, "wrong-advisor"),
    reference.ChatNotActive: (409, "chat-not-active"),
    reference.InsufficientBalance: (409, "insufficient-balance"),
}
KEY_REUSED = 422, "idempotency-key-reused"
_OK, _CREATED, _UNAVAILABLE = 200, 201, 503


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What was in force when a command was carried out; `raced` if others were under way."""

    settings: Settings
    cards: Mapping[str, Card]
    raced: bool


@dataclass(frozen=True, slots=True)
class Sent:
    """A command that was sent, what it met with, and its answer; None if there was none.

    One that `follows` is the second part of the one before it.
    """

    command: Command
    circumstances: Circumstances
    answer: Answer | None
    follows: bool = False

    def answered(self, status: int) -> bool:
        """Whether this was the answer's status."""
        return self.answer is not None and self.answer.status == status

    @property
    def is_open(self) -> bool:
        """Whether it is not known what became of it: there was no answer, or that there is none."""
        return self.answer is None or self.answered(_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Belief:
    """What may be stored of a user: an account, or none; and the credits that were booked, by Idempotency-Key."""

    account: Reference | None = None
    credits: Mapping[str, Command] = field(default_factory=dict)

    def same(self) -> tuple[object, ...]:
        """Return what two beliefs have in common that are the same."""
        a = self.account
        if a is None:
            return ()
        chats = tuple(sorted((astuple(chat) for chat in a.chats.values()), key=str))
        booked = sorted((key, command.kind, command.amount) for key, command in self.credits.items())
        return a.at, a.balance, sorted(a.used.items()), chats, len(a.segments), booked

    def materialized(self, now: int) -> Belief:
        """Return what is stored after a pass."""
        if self.account is None or self.account.at >= now:
            return self
        account = self.account.copy()
        account.advance(max(now, account.at))
        return Belief(account, self.credits)

    def is_due(self, now: int) -> bool:
        """Whether a pass has something to write: always while a clock runs, else at an abandonment."""
        a = self.account
        if a is None or a.at >= now:
            return False
        opened = [chat.open_started_at for chat in a.chats.values() if chat.open_started_at is not None]
        waiting = [
            chat.last_sign_at + chat.abandon_after_us
            for chat in a.chats.values()
            if chat.state in ("lapsed", "paused", "exhausted")
        ]
        return min(opened or waiting, default=now + 1) <= now


# --- commands ---------------------------------------------------------------------------------------------------------


def after_commands(
    beliefs: Sequence[Belief], sent: Sequence[Sent], *, instants: Sequence[int], passes: int, user_id: str
) -> list[Belief]:
    """Return what may be stored of a user after commands in whatever order, with as many passes among them or fewer.

    The clock showed `instants` meanwhile, one after the other.

    Raises:
        Difference: an answer is not what any of the beliefs allows.
    """
    mismatches: list[str] = []
    events = [event for one in sent for event in _events_of(one)]
    found = [
        after
        for order in _orders(events, instants, passes)
        for belief in beliefs
        for after in _fold(belief, order, instants, mismatches)
    ]
    if not found:
        differ(f"user {user_id}", "\nor ".join(dict.fromkeys(mismatches)))
    return distinct(found)


def distinct(beliefs: Iterable[Belief]) -> list[Belief]:
    """Return the beliefs that differ."""
    return list({repr(belief.same()): belief for belief in beliefs}.values())


def _events_of(sent: Sent) -> list[Sent]:
    """Take a heartbeat that raced apart: what it answers is a reading, which may be of a little later than itself."""
    if sent.command.what != "heartbeat" or not sent.circumstances.raced or not sent.answered(_OK):
        return [sent]
    reading = replace(sent.command, what="read")
    return [replace(sent, answer=Answer(_OK, None)), Sent(reading, sent.circumstances, sent.answer, follows=True)]


def _orders(events: Sequence[Sent], instants: Sequence[int], passes: int) -> Iterator[list[tuple[Sent | None, int]]]:
    """Yield each order of the events, and of passes (None), with the instant of each: later ones are not earlier."""
    for made in range(passes + 1):
        for order in set(permutations([*range(len(events)), *[-1] * made])):
            if any(event.follows and order.index(n) < order.index(n - 1) for n, event in enumerate(events)):
                continue
            for times in combinations_with_replacement(instants, len(order)):
                yield [(None if n < 0 else events[n], now) for n, now in zip(order, times, strict=True)]


def _fold(
    belief: Belief, order: Sequence[tuple[Sent | None, int]], instants: Sequence[int], mismatches: list[str]
) -> list[Belief]:
    beliefs = [belief]
    for event, now in order:
        if event is None:
            beliefs = [b.materialized(now) for b in beliefs]
        else:
            # A read waits for nobody: what it sees and the clock that it reads need not be of one moment.
            times = instants if event.command.what == "read" else (now,)
            beliefs = [after for b in beliefs for after in _after(b, event, times, mismatches)]
    return beliefs


def _after(belief: Belief, event: Sent, times: Sequence[int], mismatches: list[str]) -> list[Belief]:
    """Return what may be stored after one event."""
    then = [belief] if event.is_open else []
    for after, expected in (outcome for now in times for outcome in _outcomes(belief, event, now)):
        mismatch = None if event.answer is None or event.is_open else expected.mismatch(event.answer)
        if mismatch is None:
            then.append(after)
        else:
            mismatches.append(f"{event.command}: {mismatch}")
    return then


@dataclass(frozen=True, slots=True)
class _Expected:
    status: int
    code: str | None = None
    reading: dict[str, object] | None = None

    def mismatch(self, answer: Answer) -> str | None:
        code = None if answer.body is None else answer.body.get("code")
        if (self.status, self.code) != (answer.status, code):
            return f"expected {self.status} {self.code}, got {answer.status} {answer.body}"
        if self.reading is None:
            return None
        if answer.is_short:
            # A refused one says in which state the chat is, and not that it does not run.
            names = ("state",) if self.code else ("state", "accruing")
            expected = {name: self.reading[name] for name in names}
            shown = {name: answer.body.get(name) for name in names}
            return None if expected == shown else f"expected {expected}, got {shown}"
        return reading_mismatch(self.reading, answer.body["reading"] if self.code else answer.body)


def _outcomes(belief: Belief, event: Sent, now: int) -> Iterator[tuple[Belief, _Expected]]:
    command, around, before = event.command, event.circumstances, belief.account
    if command.what == "read":
        is_there = before is not None and command.chat_id in before.chats
        reading = figures(before, command.chat_id, now) if before is not None and is_there else None
        yield belief, _Expected(_OK, reading=reading) if is_there else _Expected(*REFUSALS[reference.UnknownChat])
        return
    if command.what == "credit" and (earlier := belief.credits.get(command.key or "")) is not None:
        same = (earlier.kind, earlier.amount) == (command.kind, command.amount)
        yield belief, _Expected(_CREATED) if same else _Expected(*KEY_REUSED)
        return
    if command.what == "heartbeat" and before is not None:
        beaten = before.copy()
        if beaten.fast_heartbeat(now, command.chat_id):
            reading = None if around.raced else figures(beaten, command.chat_id, now)
            yield Belief(beaten, belief.credits), _Expected(_OK, reading=reading)
            if not around.raced:  # else somebody may hold the chat's row, and it waits for the account
                return
    target = Reference(now) if before is None else before.copy()
    try:
        step = Step(0, command.what, command.chat_id, command.key, command.kind, command.amount)
        apply_to_reference(target, step, now, around.settings, around.cards, advisor_id=command.advisor_id)
    except tuple(REFUSALS) as refusal:
        yield belief, _refused(refusal, before, command, now)
        return
    if command.what == "credit":
        yield Belief(target, {**belief.credits, command.key or "": command}), _Expected(_CREATED)
    else:
        reading = None if around.raced and command.what == "heartbeat" else figures(target, command.chat_id, now)
        yield Belief(target, belief.credits), _Expected(_OK, reading=reading)


def _refused(refusal: Exception, before: Reference | None, command: Command, now: int) -> _Expected:
    """Return what must be answered to a command that is refused."""
    if isinstance(refusal, reference.ChatNotActive):
        assert before is not None
        return _Expected(*REFUSALS[type(refusal)], reading=figures(before, command.chat_id, now))
    if isinstance(refusal, reference.WrongAdvisor) and command.key is not None:
        assert before is not None
        if command.key == before.chats[command.chat_id].start_key:
            return _Expected(*KEY_REUSED)  # the key of a start with the right advisor
    return _Expected(*REFUSALS[type(refusal)])
