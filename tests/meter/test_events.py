"""What is told of an account: the same however often time was let pass in between, and at the exact instant."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from talktime import errors
from talktime.meter import commands
from talktime.meter.advance import advance, foretell
from talktime.meter.events import Notice, Told, tell
from talktime.meter.state import Account, Chat, ChatState, CreditKind, Policy, RateCard, Scope, Tariff
from tests.meter.histories import CHATS, Card, Settings, Step, cards, histories, settings_in_force

S = 1_000_000
CREDIT = 1_000_000
POLICY = Policy(Scope.ADVISOR, 15 * S, 300 * S)
ONE_A_SECOND = RateCard(Tariff(60 * CREDIT), 0)


class Story:
    """An account that is saved after every change, and what was told of it."""

    def __init__(self, settings: Settings, card: Card, low_us: int, *, knows: bool = False) -> None:
        self.knows = knows
        self.now = 1_000
        self.policy = Policy(Scope(settings.scope), settings.lease_us, settings.abandon_after_us)
        self.cards = dict.fromkeys(CHATS.values(), card)
        self.account = Account("u", self.now)
        self.low_us = low_us
        self.low_at: int | None = None
        self.told: list[Notice] = []

    def save(self, after: Account) -> list[Notice]:
        ends = [f.stops_at for f in foretell(self.account, beating=True).values() if f.stops_at is not None]
        exhausts_at = min(ends, default=None) if self.knows else None
        new, self.low_at = tell(self.account, after, low_at=self.low_at, low_us=self.low_us, exhausts_at=exhausts_at)
        self.told += new
        self.account = after._replace(journal=())
        return new

    def materialize(self, at: int) -> list[Notice]:
        return self.save(advance(self.account, max(at, self.account.at)))

    def take(self, step: Step) -> None:
        self.now += step.wait_us
        if step.what == "card":
            assert step.card is not None
            self.cards[CHATS[step.chat_id]] = step.card
        elif step.what == "fast_heartbeat":
            self._beat_fast(step.chat_id)
        elif step.what not in ("materialize", "wait"):
            try:
                after = self._command(step)
            except errors.TalktimeError:
                return
            self.save(after)

    def _beat_fast(self, chat_id: str) -> None:
        # As the store does: where it is not sure that the clock runs, it takes the full path.
        view = advance(self.account, max(self.now, self.account.at))
        if chat_id in view.chats and view.chats[chat_id].state is ChatState.RUNNING:
            chat = self.account.chats[chat_id]
            beaten = chat._replace(last_heartbeat_at=max(chat.last_heartbeat_at, self.now))
            self.account = self.account._replace(chats={**self.account.chats, chat_id: beaten})

    def _command(self, step: Step) -> Account:
        at = self.account, self.now
        card = self.cards[CHATS.get(step.chat_id, "x")]
        match step.what:
            case "start":
                return commands.start(
                    *at,
                    chat_id=step.chat_id,
                    advisor_id=CHATS[step.chat_id],
                    card=RateCard(Tariff(card.rate, card.first_us, card.increment_us), card.free_us),
                    policy=self.policy,
                    key=step.key,
                )
            case "heartbeat":
                return commands.heartbeat(*at, chat_id=step.chat_id, policy=self.policy)
            case "pause":
                return commands.pause(*at, chat_id=step.chat_id, policy=self.policy)
            case "stop":
                return commands.stop(*at, chat_id=step.chat_id)
            case _:
                return commands.credit(*at, kind=CreditKind(step.kind), amount=step.amount, memo="", key="k")


thresholds = st.sampled_from((0, 1, 5, 20, 100))
# A clock that steps back counts as standing still, and how long it does depends on who looked when.
forwards = histories.map(lambda history: [replace(step, wait_us=abs(step.wait_us)) for step in history])


@given(settings_in_force, cards, forwards, thresholds, st.lists(st.integers(0, 60), max_size=6))
def test_what_is_told_does_not_depend_on_how_often_time_was_let_pass(
    settings: Settings, card: Card, history: list[Step], low_us: int, passes: list[int]
) -> None:
    never, sometimes, always = (Story(settings, card, low_us, knows=n > 0) for n in range(3))
    last = Step(500, "wait")
    for step in [*history, last]:
        for at in sorted(passes):
            if at < step.wait_us:
                sometimes.materialize(sometimes.now + at)
        for at in range(always.now, always.now + step.wait_us + 1):
            new = always.materialize(at)
            # Whoever looks at every instant is told of each thing at the instant at which it happens.
            assert [notice.occurred_at for notice in new] == [at] * len(new)
        for story in (never, sometimes, always):
            story.take(step)
    for story in (never, sometimes, always):
        story.materialize(story.now)
    assert never.account == sometimes.account == always.account
    assert never.told == sometimes.told == always.told
    assert never.low_at == sometimes.low_at == always.low_at
    # A pass that comes again has nothing to tell.
    assert never.materialize(never.now) == []


@given(settings_in_force, cards, forwards, thresholds)
def test_what_is_told_is_in_order_and_each_only_once(
    settings: Settings, card: Card, history: list[Step], low_us: int
) -> None:
    story = Story(settings, card, low_us)
    for step in history:
        story.take(step)
    story.materialize(story.now + 500)
    assert all(earlier.occurred_at <= later.occurred_at for earlier, later in pairwise(story.told))
    of_chats = [(n.told, n.occurred_at, n.chat_id, n.revision) for n in story.told if n.chat_id is not None]
    assert len(set(of_chats)) == len(of_chats)
    exhausted = [n.advisor_id for n in story.told if n.told is Told.FREE_TIME_EXHAUSTED]
    assert len(set(exhausted)) == len(exhausted)


@given(settings_in_force, cards, forwards, st.sampled_from((1, 5, 20)))
def test_credits_are_told_to_be_low_when_they_get_low(
    settings: Settings, card: Card, history: list[Step], low_us: int
) -> None:
    """Against the definition, looked at in every instant and after every command."""
    story = Story(settings, card, low_us)
    low = False
    begun: list[int] = []

    def look() -> None:
        nonlocal low
        forecasts = foretell(story.account, beating=True).values()
        if forecasts:
            is_low = any(f.stops_at is not None and f.stops_at - story.account.at <= low_us for f in forecasts)
            if is_low and not low:
                begun.append(story.account.at)
            low = is_low

    for step in [*history, Step(300, "wait")]:
        for at in range(story.now, story.now + step.wait_us + 1):
            story.materialize(at)
            look()
        story.take(step)
        look()
    assert [n.occurred_at for n in story.told if n.told is Told.BALANCE_LOW] == begun
    assert (story.low_at is not None) == low


# --- by example -------------------------------------------------------------------------------------------------------


def _told(before: Account, after: Account, low_us: int = 10 * S) -> list[tuple[Told, int, str | None]]:
    notices, _ = tell(before, after, low_at=None, low_us=low_us)
    return [(n.told, n.occurred_at, n.chat_id or n.advisor_id) for n in notices]


def _start(account: Account, at: int, chat_id: str, card: RateCard = ONE_A_SECOND) -> Account:
    return commands.start(account, at, chat_id=chat_id, advisor_id="x", card=card, policy=POLICY)


def _saved(account: Account) -> Account:
    return account._replace(journal=())


def test_a_start_switches_and_both_are_told_at_its_instant() -> None:
    one = _saved(_start(Account("u", 0, 1_000 * CREDIT), 5, "a"))
    two = _start(one, 9 * S, "b")
    assert _told(one, two) == [(Told.SWITCHED, 9 * S, "a"), (Told.STARTED, 9 * S, "b")]
    [switched, _], _ = tell(one, two, low_at=None, low_us=0)
    assert ("b", 9 * S - 5) == (switched.switched_to, switched.elapsed_us)


def test_all_that_time_does_is_told_at_its_instant_though_only_a_command_looks() -> None:
    card = RateCard(Tariff(60 * CREDIT), 4 * S)
    running = _saved(_start(Account("u", 0, 8 * CREDIT), 0, "a", card))
    later = commands.credit(running, 400 * S, kind=CreditKind.GRANT, amount=CREDIT, memo="", key="k")
    assert _told(running, later, 5 * S) == [
        (Told.FREE_TIME_EXHAUSTED, 4 * S, "x"),
        (Told.BALANCE_LOW, 7 * S, None),
        (Told.EXHAUSTED, 12 * S, "a"),
        (Told.ABANDONED, 300 * S, "a"),
        (Told.CREDITED, 400 * S, None),
    ]


def test_a_refused_start_is_told_and_a_beat_on_the_exhausted_chat_is_not() -> None:
    refused = _start(Account("u", 0), 7, "a")
    assert _told(Account("u", 0), refused) == [(Told.EXHAUSTED, 7, "a")]
    assert _told(refused, commands.heartbeat(refused, 9, chat_id="a", policy=POLICY)) == []
    assert _told(refused, _start(refused, 9, "a")) == [(Told.EXHAUSTED, 9, "a")]


def test_a_chat_is_ended_once_and_its_lapse_before_that_is_told_too() -> None:
    running = _saved(_start(Account("u", 0, 1_000 * CREDIT), 0, "a"))
    ended = commands.stop(running, 20 * S, chat_id="a")
    assert _told(running, ended) == [(Told.LAPSED, 15 * S, "a"), (Told.ENDED, 20 * S, "a")]
    assert _told(_saved(ended), commands.stop(_saved(ended), 30 * S, chat_id="a")) == []


def test_low_credits_are_told_once_until_there_are_more() -> None:
    story = Story(Settings("advisor", 15 * S, 300 * S), Card(60 * CREDIT, 0, 0, 0), 10 * S)
    story.policy = POLICY
    steps = [
        Step(0, "credit", kind="purchase", amount=12 * CREDIT),
        Step(0, "start", "a"),
        Step(4 * S, "pause", "a"),
        Step(S, "start", "a"),
        Step(S, "credit", kind="purchase", amount=13 * CREDIT),
        Step(S, "wait"),
    ]
    for step in steps:
        story.take(step)
    story.materialize(story.now + 14 * S)
    low = [(n.occurred_at - 1_000, n.balance, n.exhausts_at) for n in story.told if n.told is Told.BALANCE_LOW]
    assert low == [(2 * S, 10 * CREDIT, 12 * S + 1_000), (16 * S, 10 * CREDIT, 26 * S + 1_000)]


def test_an_allowance_that_two_chats_share_ends_at_the_last_free_tick() -> None:
    card = RateCard(Tariff(60 * CREDIT), 7)
    policy = POLICY._replace(scope=Scope.NONE)
    account = Account("u", 0, 1_000 * CREDIT)
    for chat_id in ("a", "b"):
        account = commands.start(account, 0, chat_id=chat_id, advisor_id="x", card=card, policy=policy)
    assert _told(account, advance(account, S), 0) == [(Told.FREE_TIME_EXHAUSTED, 4, "x")]
    chats: list[Chat] = list(advance(account, 4).chats.values())
    assert [4, 3] == [chat.free_us for chat in chats]
