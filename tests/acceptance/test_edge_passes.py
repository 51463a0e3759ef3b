"""Edge cases of passes of the reconciler, and of readers before them, with figures worked out by hand.

At 60 credits a minute a second costs a credit. Instants are in microseconds since the begin. `told` ends each test with
a clean audit and a pass that changes nothing that is read.
"""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.engine import URL

from tests.acceptance.edges import Story, told
from tests.database import Clock
from tests.support import S

FIGURES = ("state", "elapsed_us", "credits_used", "balance")
DAY = 86_400 * S
YEAR = 365 * DAY

# --- between a boundary and the next pass -----------------------------------------------------------------------------

# Which boundary, its instant, what was bought; then what is read a microsecond before it, at it and after it: state,
# elapsed, free time used, credits used, balance, accrues until, paid from.
BOUNDARIES = {
    "end-of-the-free-time": (
        4 * S,
        "9",
        ("running", 3_999_999, 3_999_999, "0.000000", "9.000000", 10 * S, 4 * S),
        ("running", 4_000_000, 4_000_000, "0.000000", "9.000000", 10 * S, 4 * S),
        ("running", 4_000_001, 4_000_000, "0.000001", "8.999999", 10 * S, 4_000_001),
    ),
    "exhaustion": (
        7 * S,
        "3",
        ("running", 6_999_999, 4_000_000, "2.999999", "0.000001", 7 * S, 6_999_999),
        ("exhausted", 7_000_000, 4_000_000, "3.000000", "0.000000", None, None),
        ("exhausted", 7_000_000, 4_000_000, "3.000000", "0.000000", None, None),
    ),
    "end-of-the-lease": (
        10 * S,
        "9",
        ("running", 9_999_999, 4_000_000, "5.999999", "3.000001", 10 * S, 9_999_999),
        ("lapsed", 10_000_000, 4_000_000, "6.000000", "3.000000", None, None),
        ("lapsed", 10_000_000, 4_000_000, "6.000000", "3.000000", None, None),
    ),
    "abandonment": (
        100 * S,
        "9",
        ("lapsed", 10_000_000, 4_000_000, "6.000000", "3.000000", None, None),
        ("abandoned", 10_000_000, 4_000_000, "6.000000", "3.000000", None, None),
        ("abandoned", 10_000_000, 4_000_000, "6.000000", "3.000000", None, None),
    ),
}


@pytest.mark.parametrize("boundary", BOUNDARIES)
async def test_a_reader_between_a_boundary_and_the_next_pass_reads_what_the_pass_will_write(
    database_url: URL, clock: Clock, boundary: str
) -> None:
    at_us, bought, *expected = BOUNDARIES[boundary]
    async with told(database_url, clock) as story:
        await story.card("60", free_us=4 * S)
        await story.buy(bought)
        await story.start()
        names = ("state", "elapsed_us", "free_used_us", "credits_used", "balance", "accrues_until", "paid_from")
        for us, figures in zip((at_us - 1, at_us, at_us + 1), expected, strict=True):
            story.at(us)
            assert figures == await story.read("c1", *names)
            state, elapsed_us, free_us, cost, balance, *_ = figures
            account = await story.account()
            running = ["c1"] if state == "running" else []
            assert (balance, cost if running else "0.000000") == (account["balance"], account["accrued"])
            assert running == [reading["chat_id"] for reading in account["running"]]
            [(began, _, _, *parts)] = await story.segments()
            assert (0, [free_us, elapsed_us - free_us, cost]) == (began, parts)
            [listed] = await story.items("/v1/users/u1/chats", state=state)
            assert await story.reading() == listed
            assert "running" == story.stored_state()  # none of which was written down meanwhile


# --- passes -----------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[int, tuple[int, ...]]] = {  # at which step, one after the other, how many passes at once
    "never": {},
    "at-every-step": dict.fromkeys(range(8), (1,)),
    "late": {7: (1,)},
    "skipped-in-between": {0: (1,), 6: (1,)},
    "twice": dict.fromkeys(range(8), (1, 1)),
    "two-at-once": dict.fromkeys(range(8), (2,)),
    "four-at-once-and-again": dict.fromkeys(range(0, 8, 2), (4, 4)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_a_pass_may_come_late_be_skipped_run_twice_or_beside_another_and_changes_no_figure(
    database_url: URL, clock: Clock, schedule: str
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", free_us=2 * S, first_us=6 * S, increment_us=6 * S)
        await story.buy("18")
        expected = [
            (0, "running", 0, 0, "0.000000", "18.000000"),
            (2 * S, "running", 2 * S, 2 * S, "0.000000", "18.000000"),
            (2 * S + 1, "running", 2 * S + 1, 2 * S, "6.000000", "12.000000"),
            (8 * S, "running", 8 * S, 2 * S, "6.000000", "12.000000"),
            (8 * S + 1, "running", 8 * S + 1, 2 * S, "12.000000", "6.000000"),
            (10 * S, "lapsed", 10 * S, 2 * S, "12.000000", "6.000000"),
            # Taken up here: four of the block's six seconds are left, then the last block, then nothing.
            (30 * S, "exhausted", 20 * S, 2 * S, "18.000000", "0.000000"),
            (40 * S, "exhausted", 20 * S, 2 * S, "18.000000", "0.000000"),
        ]
        await story.start()
        for step, (us, *figures) in enumerate(expected):
            story.at(us)
            if us == 30 * S:
                await _resume_for_ten_seconds(story)
            for at_once in SCHEDULES[schedule].get(step, ()):
                await asyncio.gather(*(story.materialize() for _ in range(at_once)))
            names = ("state", "elapsed_us", "free_used_us", "credits_used", "balance")
            assert tuple(figures) == await story.read("c1", *names)
        assert (30 * S, "exhausted") == await story.read("c1", "stopped_at", "stop_reason")
        assert [
            (0, 10 * S, "lapsed", 2 * S, 8 * S, "12.000000"),
            (20 * S, 30 * S, "exhausted", 0, 10 * S, "6.000000"),
        ] == await story.segments()


async def _resume_for_ten_seconds(story: Story) -> None:
    story.at(20 * S)
    await story.beat()
    story.at(29 * S)
    await story.beat()
    story.at(30 * S)


async def test_after_a_year_without_a_pass_one_pass_writes_what_everybody_read_all_along(
    database_url: URL, clock: Clock
) -> None:
    expected = {
        "lapsed": ("abandoned", 13 * S, "7.000000", "93.000000", 13 * S, "lapsed"),
        "exhausted": ("abandoned", 8 * S, "2.000000", "0.000000", 8 * S, "exhausted"),
        "free": ("abandoned", 6 * S, "0.000000", "0.000000", 6 * S, "exhausted"),
        "paused": ("abandoned", 2 * S, "0.000000", "100.000000", 2 * S, "paused"),
        "ended": ("ended", 7 * S, "1.000000", "99.000000", 7 * S, "ended"),
    }
    async with told(database_url, clock) as story:
        await story.card("60", free_us=6 * S)
        for user_id, bought in (("lapsed", "100"), ("exhausted", "2"), ("paused", "100"), ("ended", "100")):
            await story.buy(bought, user_id=user_id)
        for user_id in expected:
            await story.start(user_id=user_id)
        story.at(2 * S)
        await story.pause(user_id="paused")
        story.at(3 * S)
        await story.beat(user_id="lapsed")
        story.at(7 * S)
        await story.stop(user_id="ended")
        names = (*FIGURES, "stopped_at", "stop_reason")
        for days in (1, 100, 365):
            story.at(days * DAY)
            for user_id, figures in expected.items():
                assert figures == await story.read("c1", *names, user_id=user_id)
        assert {"running"} == {story.stored_state(user_id=user_id) for user_id in ("lapsed", "exhausted", "free")}
        before = await story.everything()
        assert (4, 0) == ((made := await story.materialize()).accounts, made.failed)
        assert before == await story.everything()
        assert {"abandoned"} == {story.stored_state(user_id=user_id) for user_id in expected if user_id != "ended"}
        charge, _ = await story.ledger(user_id="lapsed")
        assert (13 * S, YEAR, 0) == story.shown(charge, "happened_at", "recorded_at", "segment_started_at")
        # Nothing is due any more.
        story.at(YEAR + 1)
        assert 0 == (await story.materialize()).accounts
