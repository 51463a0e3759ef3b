"""What may be stored of a user after a step, according to the reference, and what it must show.

Mostly there is one belief. After a request that got no answer there are two: it took effect, or it did not. After
requests that raced there is one for each order. Each answer and each reading rules out those that it contradicts; if
none is left, the service shows something that it must not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import permutations
from typing import Any

from tests.meter import reference
from tests.meter.histories import Card, Settings
from tests.meter.reference import BEYOND, Reference

HORIZON_US = 80
"""How far the reference looks ahead for what would happen if all chats kept beating."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

REFUSALS = {
    reference.UnknownChat: (404, "chat-not-found"),
    reference.WrongAdvisor: (409, "wrong-advisor"),
    reference.ChatNotActive: (409, "chat-not-active"),
    reference.InsufficientBalance: (409, "insufficient-balance"),
}
_CREATED, _OK = 201, 200


class Difference(AssertionError):
    """The service shows what the reference does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A request that changes something: start, heartbeat, pause, stop or credit."""

    user_id: str
    what: str
    chat_id: str = ""
    advisor_id: str = ""
    key: str | None = None
    kind: str = ""
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class Circumstances:
    """When a command was carried out, and what was in force then; `raced` if others were under way."""

    now: int
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
        if self.account is None:
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
    beliefs: Sequence[Belief], sent: Sequence[Sent], *, passed_at: int | None, user_id: str
) -> list[Belief]:
    """Return what may be stored of a user after commands in whatever order, with or without a pass among them.

    Raises:
        Difference: an answer is not what any of the beliefs allows.
    """
    mismatches: list[str] = []
    found = [
        after for belief in beliefs for order in _orders(sent, passed_at) for after in _fold(belief, order, mismatches)
    ]
    if not found:
        raise Difference(f"user {user_id}: " + "\n".join(dict.fromkeys(mismatches)))
    return distinct(found)


def distinct(beliefs: Iterable[Belief]) -> list[Belief]:
    """Return the beliefs that differ."""
    return list({repr(belief.same()): belief for belief in beliefs}.values())


def _orders(sent: Sequence[Sent], passed_at: int | None) -> Iterator[list[Sent | int]]:
    for order in permutations(sent):
        yield list(order)
        if passed_at is not None:
            for place in range(len(order) + 1):
                yield [*order[:place], passed_at, *order[place:]]


def _fold(belief: Belief, order: Sequence[Sent | int], mismatches: list[str]) -> list[Belief]:
    beliefs = [belief]
    for event in order:
        if isinstance(event, int):
            beliefs = [b.materialized(event) for b in beliefs]
            continue
        then = []
        for b in beliefs:
            if event.answer is None:
                then.append(b)
            for after, expected in _outcomes(b, event.command, event.circumstances):
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


def _outcomes(belief: Belief, command: Command, around: Circumstances) -> Iterator[tuple[Belief, _Expected]]:
    now, before = around.now, belief.account
    if command.what == "credit":
        assert command.key is not None
        earlier = belief.credits.get(command.key)
        if earlier is not None:
            same = (earlier.kind, earlier.amount) == (command.kind, command.amount)
            yield belief, _Expected(_CREATED) if same else _Expected(422, "idempotency-key-reused")
            return
    if command.what == "heartbeat" and before is not None:
        beaten = before.copy()
        if beaten.fast_heartbeat(now, command.chat_id):
            yield Belief(beaten, belief.credits), _Expected(_OK, reading=figures(beaten, command.chat_id, now))
            if not around.raced:  # else somebody may hold the chat's row, and the heartbeat waits for the account
                return
    target = Reference(now) if before is None else before.copy()
    try:
        _carry_out(target, command, around)
    except tuple(REFUSALS) as refusal:
        status, code = REFUSALS[type(refusal)]
        reading = None
        if isinstance(refusal, reference.ChatNotActive):
            assert before is not None
            reading = figures(before, command.chat_id, now)
        yield belief, _Expected(status, code, reading)
        return
    if command.what == "credit":
        assert command.key is not None
        yield Belief(target, {**belief.credits, command.key: command}), _Expected(_CREATED)
    else:
        yield Belief(target, belief.credits), _Expected(_OK, reading=figures(target, command.chat_id, now))


def _carry_out(target: Reference, command: Command, around: Circumstances) -> None:
    now, settings = around.now, around.settings
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


# --- readings ---------------------------------------------------------------------------------------------------------


def figures(account: Reference, chat_id: str, now: int) -> dict[str, object]:
    """Return what a reading of a chat must show."""
    shown = account.reading(now, chat_id, horizon_us=HORIZON_US)
    chat = account.chats[chat_id]
    also = {"chat_id": chat_id, "advisor_id": chat.advisor_id, "server_time": now, "materialized_through": account.at}
    return {**shown, **also}


_AS_IT_IS = ("chat_id", "advisor_id", "state", "accruing", "revision", "stop_reason")
_MICROSECONDS = ("elapsed_us", "free_used_us", "free_left_us", "count_us")
_CREDITS = ("credits_used", "balance")
_INSTANTS = (
    *("as_of", "server_time", "accrues_until", "paid_from", "free_until", "exhausts_at"),
    *("started_at", "stopped_at", "materialized_through"),
)


def reading_mismatch(expected: Mapping[str, object], body: Mapping[str, Any]) -> str | None:
    """Say in what a reading differs from what is expected; None if in nothing."""
    tariff = body["tariff"]
    shown: dict[str, object] = {
        **{name: body[name] for name in (*_AS_IT_IS, *_MICROSECONDS)},
        **{name: micro(body[name]) for name in _CREDITS},
        **{name: instant(body[name]) for name in _INSTANTS},
        "tariff": reference.Tariff(
            micro(tariff["credits_per_minute"]),
            int(Decimal(str(tariff["first_seconds"])) * 1_000_000),
            int(Decimal(str(tariff["increment_seconds"])) * 1_000_000),
        ),
    }
    as_of = shown["as_of"]
    assert isinstance(as_of, int)
    differing = {
        name: (value, shown[name])
        for name, value in expected.items()
        if value != shown[name] and not (value is BEYOND and _is_beyond(shown[name], as_of))
    }
    if not differing:
        return None
    told = ", ".join(f"{name} is {is_} and must be {value}" for name, (value, is_) in sorted(differing.items()))
    return f"chat {body['chat_id']}: {told}"


def _is_beyond(shown: object, as_of: int) -> bool:
    return shown is None or (isinstance(shown, int) and shown > as_of + HORIZON_US)


def seconds(us: int) -> str:
    """Write microseconds as decimal seconds."""
    return f"{Decimal(us) / 1_000_000:f}"


def amount(micro_credits: int) -> str:
    """Write micro-credits as the API does."""
    return f"{Decimal(micro_credits) / 1_000_000:.6f}"


def micro(text: str) -> int:
    """Read an amount as the API writes it."""
    whole, decimals = text.split(".")
    assert len(decimals) == 6
    return int(whole + decimals)


def instant(text: str | None) -> int | None:
    """Read an instant as the API writes it, as microseconds."""
    if text is None:
        return None
    assert text.endswith("Z")
    return (datetime.fromisoformat(text) - EPOCH) // timedelta(microseconds=1)
