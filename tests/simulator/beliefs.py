"""What may be stored of a user after a step, according to the reference, and what it must show.

Mostly there is one belief. After a request that got no answer there are two: it took effect, or it did not. After
requests that raced there is one for each order. Each answer and each reading rules out those that it contradicts; if
none is left, the service shows something that it must not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import combinations_with_replacement, permutations

from tests.meter import reference
from tests.meter.histories import Card, Settings
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
_CREATED, _OK = 201, 200

PASS = -1


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What was in force when a command was carried out; `raced` if others were under way."""

    settings: Settings
    cards: Mapping[str, Card]
    raced: bool


@dataclass(frozen=True, slots=True)
class Sent:
    """A command that was sent, where it met with what, and its answer; None if there was none."""

    command: Command
    circumstances: Circumstances
    answer: Answer | None


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
        return a.at, a.balance, sorted(a.used.items()), chats, len(a.segments), sorted(self.credits)

    def materialized(self, now: int) -> Belief:
        """Return what is stored after a pass."""
        if self.account is None or self.account.at >= now:
            return self
        account = self.account.copy()
        account.advance(max(now, account.at))
        return Belief(account, self.credits)

    def must_be_materialized(self, now: int) -> bool:
        """Whether a pass that met nobody else has something to write."""
        a = self.account
        if a is None or a.at >= now:
            return False
        return any(c.open_started_at is not None and c.open_started_at <= now for c in a.chats.values())


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
    found = [
        after
        for order in _orders(sent, instants, passes)
        for belief in beliefs
        for after in _fold(belief, order, mismatches)
    ]
    if not found:
        differ(f"user {user_id}", "\nor ".join(dict.fromkeys(mismatches)))
    return distinct(found)


def distinct(beliefs: Iterable[Belief]) -> list[Belief]:
    """Return the beliefs that differ."""
    return list({repr(belief.same()): belief for belief in beliefs}.values())


def _orders(sent: Sequence[Sent], instants: Sequence[int], passes: int) -> Iterator[list[tuple[Sent | None, int]]]:
    """Yield each order of the commands, and of passes (None), with the instant of each: later ones are not earlier."""
    for made in range(passes + 1):
        for order in set(permutations([*range(len(sent)), *[PASS] * made])):
            for times in combinations_with_replacement(instants, len(order)):
                yield [(None if n == PASS else sent[n], now) for n, now in zip(order, times, strict=True)]


def _fold(belief: Belief, order: Sequence[tuple[Sent | None, int]], mismatches: list[str]) -> list[Belief]:
    beliefs = [belief]
    for event, now in order:
        if event is None:
            beliefs = [b.materialized(now) for b in beliefs]
            continue
        then = []
        for b in beliefs:
            if event.answer is None:
                then.append(b)
            for after, expected in _outcomes(b, event.command, event.circumstances, now):
                mismatch = None if event.answer is None else expected.mismatch(event.answer)
                if mismatch is None:
                    then.append(after)
                else:
                    mismatches.append(f"{event.command}: {mismatch}")
        beliefs = then
    return beliefs


@dataclass(frozen=True, slots=True)
class _Expected:
    status: int
    code: str | None = None
    reading: dict[str, object] | None = None

    def mismatch(self, answer: Answer) -> str | None:
        code = answer.body.get("code")
        if (self.status, self.code) != (answer.status, code):
            return f"expected {self.status} {self.code}, got {answer.status} {answer.body}"
        if self.reading is None:
            return None
        return reading_mismatch(self.reading, answer.body["reading"] if self.code else answer.body)


def _outcomes(belief: Belief, command: Command, around: Circumstances, now: int) -> Iterator[tuple[Belief, _Expected]]:
    before = belief.account
    if command.what == "credit" and (earlier := belief.credits.get(command.key or "")) is not None:
        same = (earlier.kind, earlier.amount) == (command.kind, command.amount)
        yield belief, _Expected(_CREATED) if same else _Expected(*KEY_REUSED)
        return
    if command.what == "heartbeat" and before is not None:
        beaten = before.copy()
        if beaten.fast_heartbeat(now, command.chat_id):
            if not around.raced:
                yield Belief(beaten, belief.credits), _Expected(_OK, reading=figures(beaten, command.chat_id, now))
                return
            # Its reading may be of a little later than itself; or somebody holds the row, and it waits for the account.
            yield Belief(beaten, belief.credits), _Expected(_OK)
    target = Reference(now) if before is None else before.copy()
    try:
        _carry_out(target, command, around, now)
    except tuple(REFUSALS) as refusal:
        yield belief, _refused(refusal, before, command, now)
        return
    if command.what == "credit":
        yield Belief(target, {**belief.credits, command.key or "": command}), _Expected(_CREATED)
    else:
        yield Belief(target, belief.credits), _Expected(_OK, reading=figures(target, command.chat_id, now))


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


def _carry_out(target: Reference, command: Command, around: Circumstances, now: int) -> None:
    settings = around.settings
    leases = {"lease_us": settings.lease_us, "abandon_after_us": settings.abandon_after_us}
    match command.what:
        case "start":
            card = around.cards[command.advisor_id]
            tariff = reference.Tariff(card.rate, card.first_us, card.increment_us)
            target.start(
                now,
                command.chat_id,
                command.advisor_id,
                tariff,
                card.free_us,
                scope=settings.scope,
                key=command.key,
                **leases,
            )
        case "heartbeat":
            target.heartbeat(now, command.chat_id, scope=settings.scope, **leases)
        case "pause":
            target.pause(now, command.chat_id, **leases)
        case "stop":
            target.stop(now, command.chat_id)
        case _:
            target.credit(now, command.kind, command.amount)
