"""The meter and the reference, driven through the same history and compared."""

from __future__ import annotations

import random
from collections.abc import Mapping

from talktime import errors
from talktime.meter import commands
from talktime.meter.advance import advance
from talktime.meter.reading import Reading, read
from talktime.meter.state import Account, ChatState, CreditKind, Policy, RateCard, Scope, Segment, Tariff
from tests.meter import reference
from tests.meter.histories import CHATS, Card, Settings, Step
from tests.meter.reference import BEYOND, Reference

HORIZON_US = 400
"""How far the reference looks ahead for what would happen if all chats kept beating."""

_REFUSALS = {
    errors.ChatNotFound: reference.UnknownChat,
    errors.WrongAdvisor: reference.WrongAdvisor,
    errors.ChatNotActive: reference.ChatNotActive,
    errors.InsufficientBalance: reference.InsufficientBalance,
}


class Pair:
    """One user's account in both implementations."""

    def __init__(self, settings: Settings, card: Card, *, now: int = 1_000) -> None:
        self.now = now
        self.settings = settings
        self.cards = dict.fromkeys(CHATS.values(), card)
        self.account = Account(user_id="u", at=now)
        self.reference = Reference(now)

    def take(self, step: Step) -> None:
        """Let the step happen on both sides; both must refuse it, or neither."""
        self.now += step.wait_us
        if step.what == "card":
            assert step.card is not None
            self.cards[CHATS[step.chat_id]] = step.card
        elif step.what == "materialize":
            self.materialize()
        elif step.what == "fast_heartbeat":
            assert self.reference.fast_heartbeat(self.now, step.chat_id) == self._beat_fast(step.chat_id)
        elif step.what != "wait":
            refusal = refused_by = None
            try:
                self.account = self._command(step)
            except errors.TalktimeError as error:
                refusal = _REFUSALS[type(error)]
            before = self.reference.copy()
            try:
                self._reference_command(step)
            except tuple(_REFUSALS.values()) as error:
                refused_by = type(error)
                self.reference = before  # a refused command is rolled back, its instant too
            assert refusal == refused_by, step

    def materialize(self) -> None:
        """Advance both to this instant. The reference too: were the clock to step back, both must stand still."""
        self.account = advance(self.account, max(self.now, self.account.at))
        self.reference.advance(max(self.now, self.reference.at))

    def _beat_fast(self, chat_id: str) -> bool:
        # What the store's fast path does, on the state as stored. The reference has the stored state only if both
        # have been advanced alike; L8 is the proof that it may differ.
        chat = self.account.chats.get(chat_id)
        if chat is None or chat.state is not ChatState.RUNNING or self.now >= chat.lease_end:
            return False
        beaten = chat._replace(last_heartbeat_at=max(chat.last_heartbeat_at, self.now))
        self.account = self.account._replace(chats={**self.account.chats, chat_id: beaten})
        return True

    def _command(self, step: Step) -> Account:
        s = self.settings
        policy = Policy(Scope(s.scope), s.lease_us, s.abandon_after_us)
        match step.what:
            case "start":
                advisor_id = CHATS[step.chat_id]
                card = self.cards[advisor_id]
                return commands.start(
                    self.account,
                    self.now,
                    chat_id=step.chat_id,
                    advisor_id=advisor_id,
                    card=RateCard(Tariff(card.rate, card.first_us, card.increment_us), card.free_us),
                    policy=policy,
                    key=step.key,
                )
            case "heartbeat":
                return commands.heartbeat(self.account, self.now, chat_id=step.chat_id, policy=policy)
            case "pause":
                return commands.pause(self.account, self.now, chat_id=step.chat_id, policy=policy)
            case "stop":
                return commands.stop(self.account, self.now, chat_id=step.chat_id)
            case _:
                return commands.credit(
                    self.account, self.now, kind=CreditKind(step.kind), amount=step.amount, memo="", key="k"
                )

    def _reference_command(self, step: Step) -> None:
        apply_to_reference(self.reference, step, self.now, self.settings, self.cards)

    def compare(self) -> None:
        """Check that both show the same at this instant, in every figure."""
        instant = max(self.now, self.account.at)
        account = advance(self.account, instant)
        expected = self.reference.copy()
        expected.advance(max(self.now, expected.at))
        assert account.at == expected.at
        assert account.balance == expected.balance
        assert {a: (w.granted_us, w.used_us) for a, w in account.allowances.items()} == {
            a: (expected.granted[a], expected.used[a]) for a in expected.granted
        }
        assert sorted(account.chats) == sorted(expected.chats)
        for chat_id in account.chats:
            compare_reading(
                read(self.account, chat_id, self.now),
                self.reference.reading(self.now, chat_id, horizon_us=HORIZON_US),
            )
        assert [_segment_figures(e) for e in account.journal if isinstance(e, Segment)] == [
            _reference_figures(s) for s in expected.segments
        ]


def apply_to_reference(
    target: Reference, step: Step, now: int, settings: Settings, cards: Mapping[str, Card], *, advisor_id: str = ""
) -> None:
    """Let a command happen to the reference, a start with the chat's advisor or another one; raises what it raises."""
    leases = {"lease_us": settings.lease_us, "abandon_after_us": settings.abandon_after_us}
    match step.what:
        case "start":
            advisor_id = advisor_id or CHATS[step.chat_id]
            card = cards[advisor_id]
            target.start(
                now,
                step.chat_id,
                advisor_id,
                reference.Tariff(card.rate, card.first_us, card.increment_us),
                card.free_us,
                scope=settings.scope,
                key=step.key,
                **leases,
            )
        case "heartbeat":
            target.heartbeat(now, step.chat_id, scope=settings.scope, **leases)
        case "pause":
            target.pause(now, step.chat_id, **leases)
        case "stop":
            target.stop(now, step.chat_id)
        case "credit":
            target.credit(now, step.kind, step.amount)
        case _:
            raise AssertionError(step)


def compare_reading(reading: Reading, expected: dict[str, object]) -> None:
    """Check every field of a reading against the reference's; those it could not decide must lie beyond its sight."""
    tariff = expected["tariff"]
    assert isinstance(tariff, reference.Tariff)
    assert (reading.tariff.rate, reading.tariff.first_us, reading.tariff.increment_us) == (
        tariff.rate,
        tariff.first_us,
        tariff.increment_us,
    )
    for name, value in expected.items():
        shown = getattr(reading, name)
        if name == "tariff":
            continue
        if value is BEYOND:
            assert shown is None or shown > reading.as_of + HORIZON_US, name
        else:
            assert shown == value, name


def shuffled(account: Account, order: random.Random) -> Account:
    """Return the same account with its chats and allowances in another order."""
    chats, allowances = list(account.chats.items()), list(account.allowances.items())
    order.shuffle(chats)
    order.shuffle(allowances)
    return account._replace(chats=dict(chats), allowances=dict(allowances))


def _segment_figures(s: Segment) -> tuple[object, ...]:
    tariff = (s.tariff.rate, s.tariff.first_us, s.tariff.increment_us)
    return (
        s.chat_id,
        s.advisor_id,
        s.started_at,
        s.ended_at,
        str(s.reason),
        s.free_us,
        s.paid_us,
        s.cost,
        s.count_us,
        tariff,
    )


def _reference_figures(s: reference.Segment) -> tuple[object, ...]:
    tariff = (s.tariff.rate, s.tariff.first_us, s.tariff.increment_us)
    return (
        s.chat_id,
        s.advisor_id,
        s.started_at,
        s.ended_at,
        s.reason,
        s.free_us,
        s.paid_us,
        s.cost,
        s.count_begin,
        tariff,
    )
