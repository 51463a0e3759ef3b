"""Edge cases of starts that cannot pay and of credits that come or are taken, with figures worked out by hand.

At 60 credits a minute a microsecond costs a micro-credit, and a second a credit. Instants are in microseconds since the
begin. `told` ends each test with a clean audit and a pass that changes nothing that is read.
"""

from __future__ import annotations

import pytest
from sqlalchemy.engine import URL

from tests.acceptance.edges import told
from tests.api.requests import problem_of
from tests.api.server import json_of
from tests.database import Clock
from tests.support import S

FIGURES = ("state", "elapsed_us", "credits_used", "balance")
STOPPED = ("state", "stopped_at", "stop_reason")
MINUTE = 60 * S


# --- a start that cannot pay ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["advisor", "user"])
async def test_a_start_that_cannot_pay_is_exhausted_and_switches_nobody(
    database_url: URL, clock: Clock, scope: str
) -> None:
    async with told(database_url, clock, scope=scope) as story:
        await story.card("60")
        await story.buy("5")
        await story.start("c1")
        story.at(2 * S)
        await story.card("3.000001", first_us=MINUTE, increment_us=MINUTE)  # a micro-credit more than is left
        refused = await story.start("c2")
        assert ("exhausted", 0, "0.000000", "3.000000") == story.shown(refused, *FIGURES)
        assert (2 * S, 2 * S, "exhausted", 1) == story.shown(
            refused, "started_at", "stopped_at", "stop_reason", "revision"
        )
        assert ("3.000001", []) == (refused["tariff"]["credits_per_minute"], await story.segments("c2"))
        assert ("running", 1, 5 * S) == await story.read("c1", "state", "revision", "accrues_until")
        # At exactly what is left it runs, and the other chat, of its scope, is switched; and keeps the tariff it has.
        story.at(2_500_000)
        await story.card("2.5", first_us=MINUTE, increment_us=MINUTE)
        assert ("running", 62_500_000) == story.shown(await story.start("c2"), "state", "exhausts_at")
        assert ("paused", 2_500_000, "switched") == await story.read("c1", *STOPPED)
        story.at(2_500_001)
        assert ("running", 1, "2.500000", "0.000000") == await story.read("c2", *FIGURES)


async def test_a_start_that_can_pay_only_once_the_other_is_switched_switches_it(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, scope="user") as story:
        await story.card("60")
        await story.card("300", "a2")  # five micro-credits a tick
        await story.buy("0.000009")
        await story.start("c1")
        story.at(4)
        assert ("running", 5, 5) == story.shown(
            await story.start("c2", advisor_id="a2"), "state", "accrues_until", "exhausts_at"
        )
        assert ("paused", 4, "switched") == await story.read("c1", *STOPPED)
        story.at(5)
        assert ("exhausted", 1, "0.000005", "0.000000") == await story.read("c2", *FIGURES)


async def test_a_start_beside_a_senior_outside_its_scope_pays_from_what_the_senior_leaves(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.card("300", "a2")
        await story.buy("0.000009")
        await story.start("c1")
        story.at(4)  # five are left, and c1 takes one of them first
        assert ("exhausted", 4, "exhausted") == story.shown(await story.start("c2", advisor_id="a2"), *STOPPED)
        assert ("running", 9) == await story.read("c1", "state", "accrues_until")
        story.at(9)
        assert ("exhausted", 9, "0.000009", "0.000000") == await story.read("c1", *FIGURES)


async def test_a_start_that_cannot_pay_changes_no_tariff_and_makes_an_ended_chat_exhausted(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("2")
        await story.start()
        story.at(1 * S)
        await story.stop()
        await story.card("1.000001", first_us=MINUTE, increment_us=MINUTE)
        story.at(5 * S)
        refused = await story.start()
        assert ("exhausted", 1 * S, "1.000000", "1.000000") == story.shown(refused, *FIGURES)
        assert (5 * S, 1 * S) == story.shown(refused, "stopped_at", "count_us")
        assert "60.000000" == refused["tariff"]["credits_per_minute"]
        # It was a sign of life.
        story.at(105 * S - 1)
        assert ("exhausted",) == await story.read("c1", "state")
        story.at(105 * S)
        assert ("abandoned", 5 * S, "exhausted") == await story.read("c1", *STOPPED)


# --- credits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [False, True])
async def test_a_credit_before_the_exhaustion_moves_it_and_one_at_its_instant_comes_too_late(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("5")
        assert (5 * S, 5 * S) == story.shown(await story.start(), "exhausts_at", "accrues_until")
        story.at(5 * S - 1)
        await story.buy("2")
        assert ("running", 7 * S, 7 * S) == await story.read("c1", "state", "exhausts_at", "accrues_until")
        story.at(7 * S)
        if passes:
            await story.materialize()
        assert "3.000000" == (await story.buy("3"))["balance_after"]
        for us in (7 * S, 8 * S, 50 * S):
            story.at(us)
            await story.beat()
            assert ("exhausted", 7 * S, "exhausted") == await story.read("c1", *STOPPED)
            assert ("7.000000", "3.000000") == await story.read("c1", "credits_used", "balance")
        assert ("running", 53 * S) == story.shown(await story.start(), "state", "exhausts_at")
        story.at(53 * S)
        assert ("exhausted", 10 * S, "10.000000", "0.000000") == await story.read("c1", *FIGURES)
        await story.materialize()
        amounts = await story.amounts()
        assert ["5.000000", "2.000000", "-7.000000", "3.000000", "-3.000000"] == amounts


@pytest.mark.parametrize("kind", ["correction", "refund"])
async def test_what_open_segments_have_accrued_cannot_be_taken_and_what_is_left_can_to_the_last_micro_credit(
    database_url: URL, clock: Clock, kind: str
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.card("120", "a2")
        await story.buy("13")
        await story.start("c1")
        await story.start("c2", advisor_id="a2")
        story.at(3 * S)  # 3 and 6 are accrued
        before, stored = await story.everything(), story.stored()
        problem_of(await story.credit("4.000001", kind=kind), 409, "insufficient-balance")
        assert (before, stored) == (await story.everything(), story.stored())
        taken = json_of(await story.credit("3.999999", kind=kind), 201)
        assert "-3.999999" == taken["amount"]
        # One micro-credit is left, and it is the senior's.
        assert ("exhausted", 3 * S, "6.000000", "0.000001") == await story.read("c2", *FIGURES)
        assert ("running", 3 * S, "3.000000", "0.000001") == await story.read("c1", *FIGURES)
        problem_of(await story.credit("0.000002", kind=kind), 409, "insufficient-balance")
        json_of(await story.credit("0.000001", kind=kind), 201)
        assert ("exhausted", 3 * S, "exhausted") == await story.read("c1", *STOPPED)
        assert "0.000000" == (await story.account())["balance"]


async def test_a_block_is_accrued_with_its_first_tick_and_not_before(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        await story.card("1", first_us=MINUTE, increment_us=MINUTE)
        for user_id in ("at-once", "a-tick-later"):
            await story.buy("1.5", user_id=user_id)
            await story.start(user_id=user_id)
        json_of(await story.credit("1.5", kind="correction", user_id="at-once"), 201)
        assert ("exhausted", 0, "0.000000", "0.000000") == await story.read("c1", *FIGURES, user_id="at-once")
        assert [] == await story.segments(user_id="at-once")
        story.at(1)
        user_id = "a-tick-later"
        refused = await story.credit("0.500001", kind="correction", user_id=user_id)
        problem_of(refused, 409, "insufficient-balance")
        json_of(await story.credit("0.5", kind="correction", user_id=user_id), 201)
        assert ("running", 1, "1.000000", "0.000000") == await story.read("c1", *FIGURES, user_id=user_id)
        assert (60 * S,) == await story.read("c1", "exhausts_at", user_id=user_id)
