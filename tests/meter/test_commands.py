"""Named cases of the meter, each with its figures worked out by hand."""

from __future__ import annotations

import pytest

from talktime.errors import (
    BalanceLimitExceeded,
    ChatNotActive,
    ChatNotFound,
    IdempotencyKeyReused,
    InsufficientBalance,
    WrongAdvisor,
)
from talktime.meter import commands
from talktime.meter.advance import advance
from talktime.meter.reading import read, read_account
from talktime.meter.state import (
    TRANSITIONS,
    Account,
    ChatState,
    Credit,
    CreditKind,
    Event,
    Policy,
    RateCard,
    Scope,
    Segment,
    StopReason,
    Tariff,
    halt,
)
from talktime.meter.units import MAX_AMOUNT, MAX_BALANCE

S = 1_000_000
CREDIT = 1_000_000
POLICY = Policy(Scope.ADVISOR, 15 * S, 300 * S)
PARALLEL = POLICY._replace(scope=Scope.NONE)
CARD = RateCard(Tariff(60 * CREDIT), 2 * S)
UNPAID = RateCard(Tariff(60 * CREDIT), 0)


def _account(balance: int = 0) -> Account:
    return Account(user_id="u", at=0, balance=balance)


def _start(
    account: Account,
    now: int,
    chat_id: str = "c",
    *,
    card: RateCard = CARD,
    policy: Policy = POLICY,
    key: str | None = None,
) -> Account:
    return commands.start(account, now, chat_id=chat_id, advisor_id="a", card=card, policy=policy, key=key)


def _beat(account: Account, now: int, chat_id: str = "c", policy: Policy = POLICY) -> Account:
    return commands.heartbeat(account, now, chat_id=chat_id, policy=policy)


def test_two_free_seconds_and_one_credit_at_one_a_second_end_after_three_seconds() -> None:
    reading = read(_start(_account(CREDIT), 0), "c", 10 * S)
    assert (ChatState.EXHAUSTED, 3 * S, CREDIT, 0, 3 * S) == (
        reading.state,
        reading.elapsed_us,
        reading.credits_used,
        reading.balance,
        reading.stopped_at,
    )


def test_a_minute_at_sixty_sixty_is_one_block_and_a_microsecond_more_is_two() -> None:
    tariff = Tariff(rate=2 * CREDIT, first_us=60 * S, increment_us=60 * S)
    assert [0, 2, 2, 4] == [tariff.cost(p) // CREDIT for p in (0, 1, 60 * S, 60 * S + 1)]


def test_six_second_increments_follow_the_first_minute() -> None:
    tariff = Tariff(rate=60 * CREDIT, first_us=60 * S, increment_us=6 * S)
    assert [60, 66, 66, 72] == [tariff.cost(p) // CREDIT for p in (S, 61 * S, 66 * S, 66 * S + 1)]


def test_a_pause_does_not_buy_a_second_block() -> None:
    card = RateCard(Tariff(60 * CREDIT, 60 * S, 60 * S), 0)
    state = _start(_account(100 * CREDIT), 0, card=card)
    state = commands.pause(state, 10 * S, chat_id="c", policy=POLICY)
    state = _start(state, 20 * S, card=card)
    assert 60 * CREDIT == read(state, "c", 30 * S).credits_used


def test_a_start_under_another_tariff_begins_a_new_count_and_back_again_another() -> None:
    one = RateCard(Tariff(60 * CREDIT, 60 * S, 60 * S), 0)
    two = RateCard(Tariff(120 * CREDIT, 60 * S, 60 * S), 0)
    state = _account(1000 * CREDIT)
    for at, card in ((0, one), (10 * S, two), (20 * S, one)):
        state = commands.pause(_start(state, at, card=card), at + S, chat_id="c", policy=POLICY)
    assert (60 + 120 + 60) * CREDIT == read(state, "c", 30 * S).credits_used


def test_the_lease_ends_at_its_end_and_a_beat_a_microsecond_before_keeps_it() -> None:
    state = _start(_account(100 * CREDIT), 0)
    assert ChatState.RUNNING is advance(state, 15 * S - 1).chats["c"].state
    assert ChatState.LAPSED is advance(state, 15 * S).chats["c"].state
    kept = _beat(state, 15 * S - 1)
    assert ChatState.RUNNING is kept.chats["c"].state
    resumed = _beat(state, 15 * S)
    assert (15 * S, 2) == (resumed.chats["c"].elapsed_us, resumed.chats["c"].revision)
    assert 15 * S == resumed.chats["c"].opened_at


def test_a_heartbeat_after_the_clock_stepped_back_does_not_shorten_the_lease() -> None:
    state = _start(_account(100 * CREDIT), 0)
    beaten = state._replace(chats={"c": state.chats["c"]._replace(last_heartbeat_at=10 * S)})
    for command in (_beat, _start):
        assert 25 * S == command(beaten, 4 * S).chats["c"].lease_end


def test_a_heartbeat_of_a_lapsed_chat_is_not_billed_for_the_gap() -> None:
    state = _beat(_start(_account(100 * CREDIT), 0), 100 * S)
    reading = read(state, "c", 101 * S)
    assert (16 * S, 14 * CREDIT) == (reading.elapsed_us, reading.credits_used)


def test_a_heartbeat_of_a_lapsed_chat_does_not_steal_the_clock() -> None:
    state = _start(_account(100 * CREDIT), 0, "c1", policy=PARALLEL)
    state = _start(state, 14 * S, "c2", policy=PARALLEL)
    state = _beat(state, 20 * S, "c1")
    assert (ChatState.LAPSED, ChatState.RUNNING) == (state.chats["c1"].state, state.chats["c2"].state)


def test_a_resume_that_cannot_pay_is_exhausted() -> None:
    state = _beat(_start(_account(15 * CREDIT), 0, card=UNPAID), 20 * S)
    chat = state.chats["c"]
    assert (ChatState.EXHAUSTED, StopReason.EXHAUSTED, 20 * S) == (chat.state, chat.stop_reason, chat.stopped_at)


def test_a_switch_stops_the_old_clock_at_the_very_instant_the_new_one_starts() -> None:
    state = _start(_start(_account(), 0, "c1"), S + 7, "c2")
    old, new = state.chats["c1"], state.chats["c2"]
    assert (ChatState.PAUSED, StopReason.SWITCHED, S + 7) == (old.state, old.stop_reason, old.stopped_at)
    assert S + 7 == new.opened_at
    assert S - 7 - 0 == read(state, "c2", S + 7).free_left_us


def test_a_switch_pauses_lapsed_chats_too_and_keeps_why_they_stopped() -> None:
    state = _start(_start(_account(100 * CREDIT), 0, "c1"), 20 * S, "c2")
    old = state.chats["c1"]
    assert (ChatState.PAUSED, StopReason.LAPSED, 15 * S) == (old.state, old.stop_reason, old.stopped_at)


def test_a_start_that_cannot_pay_switches_nobody_and_changes_no_tariff() -> None:
    free = RateCard(Tariff(0), 0)
    state = _start(_account(), 0, "c1", card=free)
    state = commands.stop(_start(state, S, "c2", card=free), 2 * S, chat_id="c2")
    state = _start(state, 3 * S, "c1", card=free)
    state = _start(state, 4 * S, "c2", card=UNPAID)
    one, two = state.chats["c1"], state.chats["c2"]
    assert ChatState.RUNNING is one.state
    assert (ChatState.EXHAUSTED, StopReason.EXHAUSTED, 4 * S) == (two.state, two.stop_reason, two.stopped_at)
    assert free.tariff == two.tariff


def test_a_start_does_not_stop_an_older_chat_that_shares_the_last_credit() -> None:
    state = _start(_account(10 * CREDIT), 0, "z", card=UNPAID, policy=PARALLEL)
    state = _start(state, 10 * S - 1, "a", card=UNPAID, policy=PARALLEL)
    assert [(ChatState.RUNNING), (ChatState.EXHAUSTED)] == [state.chats[c].state for c in "za"]


def test_repeating_the_latest_start_changes_nothing_even_after_a_pause() -> None:
    state = _start(_account(100 * CREDIT), 0, key="k")
    paused = commands.pause(state, S, chat_id="c", policy=POLICY)
    assert advance(paused, 2 * S) == _start(paused, 2 * S, key="k")


def test_the_key_of_a_start_is_not_good_for_another_advisor() -> None:
    state = _start(_account(), 0, key="k")
    with pytest.raises(IdempotencyKeyReused):
        commands.start(state, S, chat_id="c", advisor_id="b", card=CARD, policy=POLICY, key="k")


def test_a_chat_belongs_to_its_advisor() -> None:
    state = _start(_account(), 0)
    with pytest.raises(WrongAdvisor):
        commands.start(state, S, chat_id="c", advisor_id="b", card=CARD, policy=POLICY)


def test_the_first_stop_wins() -> None:
    state = commands.stop(_start(_account(100 * CREDIT), 0), S, chat_id="c")
    again = commands.stop(state, 2 * S, chat_id="c")
    assert state.chats == again.chats
    assert (ChatState.ENDED, StopReason.ENDED, S) == (
        again.chats["c"].state,
        again.chats["c"].stop_reason,
        again.chats["c"].stopped_at,
    )


def test_a_heartbeat_after_the_stop_is_refused() -> None:
    state = commands.stop(_start(_account(), 0), S, chat_id="c")
    with pytest.raises(ChatNotActive, match="ended"):
        _beat(state, 2 * S)


def test_a_pause_of_an_ended_chat_changes_nothing() -> None:
    state = commands.stop(_start(_account(), 0), S, chat_id="c")
    assert state.chats == commands.pause(state, 2 * S, chat_id="c", policy=POLICY).chats


def test_what_was_never_started_is_unknown() -> None:
    with pytest.raises(ChatNotFound):
        commands.stop(_account(), 0, chat_id="c")
    with pytest.raises(ChatNotFound):
        read(_account(), "c", 0)


def test_an_idle_chat_is_abandoned_at_an_instant_that_does_not_depend_on_who_looked() -> None:
    state = _start(_account(100 * CREDIT), 0)
    for looked in (state, advance(state, 20 * S), advance(state, 299 * S)):
        assert ChatState.LAPSED is advance(looked, 300 * S - 1).chats["c"].state
        assert ChatState.ABANDONED is advance(looked, 300 * S).chats["c"].state


def test_a_changed_setting_does_not_change_the_past() -> None:
    state = _start(_account(100 * CREDIT), 0, "c1", policy=PARALLEL)
    shorter = Policy(Scope.NONE, 5 * S, 10 * S)
    state = _start(state, S, "c2", policy=shorter)
    assert (15 * S, 6 * S) == tuple(advance(state, 60 * S).chats[c].stopped_at for c in ("c1", "c2"))


def test_a_correction_that_the_balance_cannot_bear_because_of_what_is_accrued_is_refused() -> None:
    state = _start(_account(10 * CREDIT), 0, card=UNPAID)
    with pytest.raises(InsufficientBalance, match=r"7\.000000"):
        commands.credit(state, 3 * S, kind=CreditKind.CORRECTION, amount=8 * CREDIT, memo="", key="k")


def test_a_correction_that_takes_the_rest_stops_the_clock_at_that_instant() -> None:
    state = _start(_account(10 * CREDIT), 0, card=UNPAID)
    state = commands.credit(state, 3 * S, kind=CreditKind.CORRECTION, amount=7 * CREDIT, memo="", key="k")
    assert (ChatState.EXHAUSTED, 3 * S, 0) == (state.chats["c"].state, state.chats["c"].stopped_at, state.balance)
    assert [Credit, Segment] == [type(event) for event in state.journal]


def test_no_credit_passes_the_largest_balance_accrued_or_not() -> None:
    state = _start(_account(MAX_BALANCE), 0, card=UNPAID)
    with pytest.raises(BalanceLimitExceeded):
        commands.credit(state, 3 * S, kind=CreditKind.PURCHASE, amount=1, memo="", key="k")
    assert MAX_AMOUNT < MAX_BALANCE


def test_an_account_shows_what_its_open_segments_accrued_and_when_the_first_runs_out() -> None:
    state = _start(_account(10 * CREDIT), 0, "c1", card=UNPAID, policy=PARALLEL)
    state = _start(state, 0, "c2", card=UNPAID, policy=PARALLEL)
    shown = read_account(state, 2 * S)
    assert (6 * CREDIT, 4 * CREDIT, 5 * S) == (shown.balance, shown.accrued, shown.exhausts_at)
    assert ["c1", "c2"] == [reading.chat_id for reading in shown.running]
    assert all(reading.accruing for reading in shown.running)


def test_a_year_without_a_pass_costs_a_bounded_number_of_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(Scope.NONE, 400 * 86_400 * S, 500 * 86_400 * S)
    state = _account(10**9 * CREDIT)
    for chat_id in "xyz":
        state = _start(state, 0, chat_id, policy=policy)
    calls = 0
    cost = Tariff.cost

    def counted(self: Tariff, paid_us: int) -> int:
        nonlocal calls
        calls += 1
        return cost(self, paid_us)

    monkeypatch.setattr(Tariff, "cost", counted)
    end = advance(state, 365 * 86_400 * S)
    # 3 credits a second, less 2 seconds free that all three share.
    assert 10**9 - (3 * 365 * 86_400 - 2) == end.balance // CREDIT
    assert calls < 100  # a handful of jumps; ticks would be 3e13


def test_only_a_running_clock_can_be_halted() -> None:
    chat = commands.stop(_start(_account(), 0), S, chat_id="c").chats["c"]
    with pytest.raises(AssertionError, match="does not run"):
        halt(chat, S, Event.STOP)


def test_every_state_can_be_left_and_every_event_leads_somewhere() -> None:
    assert set(Event) == set(TRANSITIONS)
    for state in ChatState:
        assert any(table.get(state, state) is not state for table in TRANSITIONS.values())
