"""The laws of the meter, on random histories, against the reference."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from talktime.meter.advance import advance, foretell, look_ahead
from talktime.meter.reading import read
from talktime.meter.state import ENDLESS, Account, ChatState, Credit, Segment, Tariff
from tests.meter.histories import Card, Settings, Step, cards, histories, settings_in_force
from tests.meter.pair import Pair, shuffled


def _after(settings: Settings, card: Card, history: list[Step]) -> Pair:
    pair = Pair(settings, card)
    for step in history:
        if step.what != "fast_heartbeat":
            pair.take(step)
    return pair


@given(settings_in_force, cards, histories, st.sampled_from(("never", "always")))
def test_the_meter_shows_what_the_reference_shows_after_every_step(
    settings: Settings, card: Card, history: list[Step], passes: str
) -> None:
    pair = Pair(settings, card)
    for step in history:
        if step.what == "fast_heartbeat":
            # Both are materialized first, since the fast path acts on what is stored.
            pair.now += step.wait_us
            pair.materialize()
            pair.take(replace(step, wait_us=0))
        else:
            pair.take(step)
        if passes == "always":
            pair.materialize()
        pair.compare()


@given(settings_in_force, cards, histories, st.integers(0, 150), st.integers(0, 150))
def test_l1_advance_composes(settings: Settings, card: Card, history: list[Step], first: int, second: int) -> None:
    state = _after(settings, card, history).account
    a = state.at + first
    b = a + second
    assert advance(advance(state, a), b) == advance(state, b)


@given(settings_in_force, cards, histories)
def test_l2_elapsed_and_credits_used_never_decrease(settings: Settings, card: Card, history: list[Step]) -> None:
    pair = Pair(settings, card)
    shown: dict[str, tuple[int, int]] = {}
    for step in history:
        pair.take(step)
        for chat_id in pair.account.chats:
            reading = read(pair.account, chat_id, pair.now)
            elapsed_us, cost = shown.get(chat_id, (0, 0))
            # A beat that came between keeps a clock running that looked lapsed, so only more can be shown.
            if step.wait_us >= 0:
                assert reading.elapsed_us >= elapsed_us
                assert reading.credits_used >= cost
            shown[chat_id] = (reading.elapsed_us, reading.credits_used)


@given(settings_in_force, cards, histories, st.integers(0, 300))
def test_l3_no_overdraft_and_no_stop_before_the_first_tick_that_cannot_be_paid(
    settings: Settings, card: Card, history: list[Step], later: int
) -> None:
    state = _after(settings, card, history).account
    end = advance(state, state.at + later)
    assert end.balance >= 0
    for event in end.journal[len(state.journal) :]:
        if isinstance(event, Segment) and event.reason == "exhausted":
            before = advance(state, max(state.at, event.ended_at - 1))
            assert before.chats[event.chat_id].state is ChatState.RUNNING
            # At its end, with all that its seniors took: the next tick costs more than what is left.
            at = advance(state, event.ended_at)
            chat = at.chats[event.chat_id]
            assert chat.tariff.cost(chat.count_us + 1) - chat.tariff.cost(chat.count_us) > at.balance - _seniors_need(
                at, event
            )


def _seniors_need(account: Account, segment: Segment) -> int:
    left = {advisor: allowance.left_us for advisor, allowance in account.allowances.items()}
    need = 0
    running = [c for c in account.chats.values() if c.opened_at is not None]
    for chat in sorted(running, key=lambda c: (c.opened_at or 0, c.chat_id)):
        if left[chat.advisor_id] > 0:
            left[chat.advisor_id] -= 1
        elif (chat.opened_at or 0, chat.chat_id) < (segment.started_at, segment.chat_id):
            need += chat.tariff.cost(chat.count_us + 1) - chat.tariff.cost(chat.count_us)
    return need


@given(settings_in_force, cards, histories, st.integers(0, 300))
def test_l4_credits_and_free_time_are_conserved(
    settings: Settings, card: Card, history: list[Step], later: int
) -> None:
    state = _after(settings, card, history).account
    end = advance(state, state.at + later)
    credited = sum(event.amount for event in end.journal if isinstance(event, Credit))
    closed = sum(event.cost for event in end.journal if isinstance(event, Segment))
    still_open = sum(
        chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.opened_count_us)
        for chat in end.chats.values()
        if chat.opened_at is not None
    )
    assert credited == end.balance + closed + still_open
    assert closed + still_open == sum(chat.cost for chat in end.chats.values())
    for advisor_id, allowance in end.allowances.items():
        chats = [chat for chat in end.chats.values() if chat.advisor_id == advisor_id]
        assert sum(chat.free_us for chat in chats) == allowance.used_us <= allowance.granted_us


@given(settings_in_force, cards, histories, st.integers(0, 300), st.randoms(use_true_random=False))
def test_l5_the_order_in_which_chats_are_given_does_not_matter(
    settings: Settings, card: Card, history: list[Step], later: int, order: random.Random
) -> None:
    state = _after(settings, card, history).account
    end = advance(state, state.at + later)
    assert advance(shuffled(state, order), state.at + later) == end


@given(settings_in_force, cards, histories, st.integers(1, 300))
def test_l6_a_clock_that_steps_back_takes_no_time_back(
    settings: Settings, card: Card, history: list[Step], back: int
) -> None:
    state = _after(settings, card, history).account
    assert advance(state, state.at - back) is state


@given(settings_in_force, cards, histories, st.integers(0, 300))
def test_l7_segments_tile_the_elapsed_time(settings: Settings, card: Card, history: list[Step], later: int) -> None:
    state = _after(settings, card, history).account
    end = advance(state, state.at + later)
    for chat in end.chats.values():
        stretches = [
            (event.started_at, event.ended_at)
            for event in end.journal
            if isinstance(event, Segment) and event.chat_id == chat.chat_id
        ]
        if chat.opened_at is not None:
            stretches.append((chat.opened_at, end.at))
        assert all(began <= ended for began, ended in stretches)
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(stretches))
        assert sum(ended - began for began, ended in stretches) == chat.elapsed_us


@given(settings_in_force, cards, histories, st.data())
def test_l8_a_fast_heartbeat_commutes_with_advance(
    settings: Settings, card: Card, history: list[Step], data: st.DataObject
) -> None:
    state = _after(settings, card, history).account
    running = sorted(chat_id for chat_id, chat in state.chats.items() if chat.state is ChatState.RUNNING)
    assume(running)
    chat = state.chats[data.draw(st.sampled_from(running))]
    t = data.draw(st.integers(state.at, chat.lease_end - 1))
    u = data.draw(st.integers(t, t + 150))

    def beaten(account: Account) -> Account:
        beating = account.chats[chat.chat_id]._replace(last_heartbeat_at=t)
        return account._replace(chats={**account.chats, chat.chat_id: beating})

    assert advance(beaten(state), u) == advance(beaten(advance(state, t)), u)


@given(settings_in_force, cards, histories, st.integers(0, 60))
def test_a_client_that_goes_on_by_itself_shows_what_advance_shows(
    settings: Settings, card: Card, history: list[Step], later: int
) -> None:
    pair = _after(settings, card, history)
    for chat_id, chat in pair.account.chats.items():
        reading = read(pair.account, chat_id, pair.account.at)
        if reading.accrues_until is None:
            assert chat.state is not ChatState.RUNNING
            continue
        x = min(reading.as_of + later, reading.accrues_until)
        paid = 0 if reading.paid_from is None else max(0, x - reading.paid_from)
        cost = reading.tariff.cost(reading.count_us + paid) - reading.tariff.cost(reading.count_us)
        then = advance(pair.account, reading.as_of + later).chats[chat_id]
        assert reading.elapsed_us + x - reading.as_of == then.elapsed_us
        assert reading.credits_used + cost == then.cost


@given(settings_in_force, cards, histories, st.integers(0, 5))
def test_to_look_ahead_is_to_advance_and_then_to_foretell(
    settings: Settings, card: Card, history: list[Step], later: int
) -> None:
    state = _after(settings, card, history).account
    view = advance(state, state.at + later)
    found = look_ahead(state, state.at + later)
    assert (view, foretell(view, beating=False), foretell(view, beating=True)) == found


@given(cards, st.integers(0, 10**12), st.integers(1, 10**6))
def test_the_largest_count_within_a_cost_costs_no_more_and_one_tick_more_would(
    card: Card, cost: int, scale: int
) -> None:
    tariff = Tariff(card.rate, card.first_us * scale, card.increment_us * scale)
    count_us = tariff.count_within(cost)
    assert tariff.cost(count_us) <= cost
    if card.rate == 0:
        assert count_us == ENDLESS
    else:
        assert tariff.cost(count_us + 1) > cost
