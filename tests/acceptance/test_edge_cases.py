"""Edge cases of starts, heartbeats, pauses and stops, with figures worked out by hand.

The lease is 10 seconds and a silent chat is abandoned after 100, unless a test says otherwise. Instants are in
microseconds since the begin. `told` ends each test with a clean audit and a pass that changes nothing that is read.
"""

from __future__ import annotations

import pytest
from sqlalchemy.engine import URL

from tests.acceptance.edges import PASSING, told, without
from tests.database import Clock
from tests.support import S

FIGURES = ("state", "elapsed_us", "credits_used", "balance")
STOPPED = ("state", "stopped_at", "stop_reason")


# --- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [False, True])
async def test_the_first_stop_wins_and_later_ones_change_nothing_before_or_after_a_pass(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start()
        story.at(3 * S)
        first = await story.stop()
        assert ("ended", 3 * S, "3.000000", "22.000000") == story.shown(first, *FIGURES)
        assert ("ended", 3 * S, "ended") == story.shown(first, *STOPPED)
        for us in (3 * S, 5 * S, 400 * S):
            story.at(us)
            if passes:
                await story.materialize()
            again = await story.stop()
            assert without(first, *PASSING) == without(again, *PASSING)
            assert us == story.shown(again, "as_of")[0]
        assert ["25.000000", "-3.000000"] == await story.amounts()


@pytest.mark.parametrize("passes", [False, True])
async def test_a_stop_after_the_lease_ended_ends_the_chat_and_leaves_the_instant_at_which_its_clock_stopped(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start()
        story.at(12 * S)
        if passes:
            await story.materialize()
        assert ("ended", 10 * S, "lapsed") == story.shown(await story.stop(), *STOPPED)
        assert [(0, 10 * S, "lapsed", 0, 10 * S, "10.000000")] == await story.segments()


async def test_a_stop_without_a_start_is_not_found_and_changes_nothing(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        await story.refused("stop", 404, "chat-not-found")
        assert [] == story.users()
        await story.card("60")
        await story.buy("25")
        await story.start("c2")
        story.at(2 * S)
        before, stored = await story.everything(), story.stored()
        await story.refused("stop", 404, "chat-not-found")
        await story.refused("stop", 404, "chat-not-found", "c2", user_id="u2")
        assert (before, stored) == (await story.everything(), story.stored())


@pytest.mark.parametrize("passes", [False, True])
async def test_a_heartbeat_after_the_stop_is_refused_with_the_reading_and_changes_nothing(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start()
        story.at(4 * S)
        ended = await story.stop()
        for us in (4 * S, 4 * S + 1, 300 * S):
            story.at(us)
            if passes:
                await story.materialize()
            before = story.stored()
            reading = (await story.refused("heartbeat", 409, "chat-not-active"))["reading"]
            assert without(ended, *PASSING) == without(reading, *PASSING)
            assert await story.reading() == reading
            assert before == story.stored()


# --- start ------------------------------------------------------------------------------------------------------------


async def test_a_late_duplicate_of_a_start_changes_nothing_and_a_start_without_its_key_restarts(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start(key="k1")
        story.at(2 * S)
        paused = await story.pause()
        story.at(5 * S)
        before = await story.everything()
        duplicate = await story.start(key="k1")
        assert before == await story.everything()
        assert without(paused, *PASSING) == without(duplicate, *PASSING)
        # It is no sign of life either: the chat is abandoned a hundred seconds after its pause.
        story.at(102 * S - 1)
        assert ("paused",) == await story.read("c1", "state")
        story.at(102 * S)
        assert ("abandoned", 2 * S) == story.shown(await story.start(key="k1"), "state", "elapsed_us")
        restarted = await story.start()
        assert ("running", 2 * S, "2.000000", "23.000000") == story.shown(restarted, *FIGURES)
        story.at(103 * S)
        await story.pause()
        # The key is no longer that of the latest start.
        assert ("running", 3 * S, "3.000000", "22.000000") == story.shown(await story.start(key="k1"), *FIGURES)
        assert [(0, 2 * S), (102 * S, 103 * S), (103 * S, None)] == [row[:2] for row in await story.segments()]


async def test_a_late_duplicate_of_a_start_neither_renews_a_lease_nor_takes_up_a_chat_in_any_state(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("12")
        first = await story.start(key="k1")
        story.at(4 * S)
        running = await story.start(key="k1")
        assert ("running", 1, 10 * S) == story.shown(running, "state", "revision", "accrues_until")
        story.at(10 * S)
        assert ("lapsed", 10 * S, "10.000000", "2.000000") == story.shown(await story.start(key="k1"), *FIGURES)
        assert first["revision"] == (await story.reading())["revision"]
        story.at(11 * S)
        await story.start(key="k2")
        story.at(20 * S)
        exhausted = await story.start(key="k2")
        assert ("exhausted", 12 * S, "12.000000", "0.000000") == story.shown(exhausted, *FIGURES)
        await story.buy("5")
        assert ("exhausted", 12 * S, "12.000000", "5.000000") == story.shown(await story.start(key="k2"), *FIGURES)
        await story.stop()
        ended = await story.start(key="k2")
        assert ("ended", 13 * S, "exhausted") == story.shown(ended, *STOPPED)
        assert ("running", 12 * S, "12.000000", "5.000000") == story.shown(await story.start(key="k3"), *FIGURES)


async def test_a_switch_ends_the_old_segment_at_the_very_instant_at_which_the_new_one_starts(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, scope="user") as story:
        await story.card("60")
        await story.card("120", "a2")
        await story.buy("25")
        await story.start("c1")
        story.at(3_000_001)
        await story.start("c2", advisor_id="a2")
        story.at(4_000_001)
        await story.start("c1")
        story.at(4_000_002)
        await story.stop("c1")
        assert ("paused", 4_000_001, "switched") == await story.read("c2", *STOPPED)
        assert [
            (0, 3_000_001, "switched", 0, 3_000_001, "3.000001"),
            (4_000_001, 4_000_002, "ended", 0, 1, "0.000001"),
        ] == await story.segments("c1")
        assert [(3_000_001, 4_000_001, "switched", 0, 1_000_000, "2.000000")] == await story.segments("c2")
        assert "19.999998" == (await story.account())["balance"]


async def test_a_switch_at_the_instant_of_the_start_leaves_no_empty_segment(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", first_us=60 * S, increment_us=60 * S)
        await story.buy("100")
        await story.start("c1")
        await story.start("c2")
        assert ("paused", 0, "switched") == await story.read("c1", *STOPPED)
        assert ([], 0, "0.000000") == (
            await story.segments("c1"),
            *await story.read("c1", "elapsed_us", "credits_used"),
        )
        story.at(1)
        assert ("running", 1, "60.000000", "40.000000") == await story.read("c2", *FIGURES)


@pytest.mark.parametrize("passes", [False, True])
async def test_a_switch_makes_a_lapsed_chat_a_paused_one_whose_clock_stopped_when_it_lapsed(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start("c1")
        story.at(11 * S)
        if passes:
            await story.materialize()
        assert ("lapsed",) == await story.read("c1", "state")
        await story.start("c2")
        assert ("paused", 10 * S, "lapsed") == await story.read("c1", *STOPPED)
        # So its heartbeat is a sign of life, and not even when the other clock has stopped does it take up its own.
        story.at(12 * S)
        await story.stop("c2")
        assert ("paused", 10 * S, "10.000000", "14.000000") == story.shown(await story.beat("c1"), *FIGURES)


async def test_a_lapsed_chat_cannot_steal_the_clock_back_by_a_heartbeat(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", free_us=4 * S)
        await story.buy("25")
        await story.start("c1")
        story.at(9 * S)
        await story.start("c2")
        story.at(10 * S)
        assert ("paused", 9 * S, "5.000000", "19.000000") == story.shown(await story.beat("c1"), *FIGURES)
        assert ("running", 1 * S, "1.000000", "19.000000") == await story.read("c2", *FIGURES)


# --- heartbeats and the lease -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [False, True])
async def test_a_heartbeat_after_the_clock_stepped_back_never_shortens_the_lease(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start()
        story.at(8 * S)
        assert (18 * S,) == story.shown(await story.beat(), "accrues_until")
        if passes:
            await story.materialize()
        for us in (5 * S, 7_999_999, 2 * S):
            story.at(us)
            beat = await story.beat()
            assert ("running", 18 * S, us) == story.shown(beat, "state", "accrues_until", "server_time")
            # No instant before the one through which the account is written down is shown again.
            as_of = 8 * S if passes else us
            assert (as_of, as_of) == story.shown(beat, "as_of", "elapsed_us")
        story.at(18 * S - 1)
        assert ("running", 17_999_999, "17.999999", "7.000001") == await story.read("c1", *FIGURES)
        story.at(18 * S)
        assert ("lapsed", 18 * S, "18.000000", "7.000000") == await story.read("c1", *FIGURES)


async def test_a_clock_that_stepped_back_takes_no_time_and_no_credits_back_from_a_command(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("25")
        await story.start()
        story.at(8 * S)
        await story.start()
        story.at(3 * S)
        paused = await story.pause()
        assert ("paused", 8 * S, "8.000000", "17.000000") == story.shown(paused, *FIGURES)
        assert (8 * S, 8 * S, 3 * S) == story.shown(paused, "stopped_at", "as_of", "server_time")
        assert (8 * S, 18 * S) == story.shown(await story.start(), "as_of", "accrues_until")
        story.at(9 * S)
        assert ("paused", 9 * S, "9.000000", "16.000000") == story.shown(await story.pause(), *FIGURES)


@pytest.mark.parametrize("passes", [False, True])
async def test_a_lease_has_ended_when_the_gap_between_beats_is_exactly_the_lease(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    expected = {
        9_999_999: [(0, 10_999_999, "paused", 0, 10_999_999, "10.999999")],
        10_000_000: [
            (0, 10_000_000, "lapsed", 0, 10_000_000, "10.000000"),
            (10_000_000, 11_000_000, "paused", 0, 1_000_000, "1.000000"),
        ],
        10_000_001: [
            (0, 10_000_000, "lapsed", 0, 10_000_000, "10.000000"),
            (10_000_001, 11_000_001, "paused", 0, 1_000_000, "1.000000"),
        ],
    }
    async with told(database_url, clock) as story:
        await story.card("60")
        for gap_us in expected:
            await story.buy("25", user_id=str(gap_us))
            await story.start(user_id=str(gap_us))
        for gap_us in expected:
            story.at(gap_us)
            if passes:
                await story.materialize()
            beat = await story.beat(user_id=str(gap_us))
            assert ("running", gap_us + 10 * S) == story.shown(beat, "state", "accrues_until")
        for gap_us, segments in expected.items():
            story.at(gap_us + 1 * S)
            await story.pause(user_id=str(gap_us))
            assert segments == await story.segments(user_id=str(gap_us))


# --- abandonment ------------------------------------------------------------------------------------------------------


async def test_a_chat_is_abandoned_at_an_instant_that_does_not_depend_on_when_anyone_looked(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", free_us=1000 * S)
        for user_id in ("looked-at", "unseen"):
            await story.start(user_id=user_id)
        story.at(7 * S)
        for user_id in ("looked-at", "unseen"):
            await story.beat(user_id=user_id)
        for us in (17 * S, 50 * S, 107 * S - 1):
            story.at(us)
            assert ("lapsed",) == await story.read("c1", "state", user_id="looked-at")
            await story.account(user_id="looked-at")
        # One looks and one does not; a microsecond later both chats are abandoned, whoever looks.
        story.at(107 * S)
        abandoned = ("abandoned", 17 * S, "lapsed")
        assert abandoned == await story.read("c1", *STOPPED, user_id="looked-at")
        assert "running" == story.stored_state(user_id="unseen")
        await story.refused("heartbeat", 409, "chat-not-active", user_id="unseen")
        assert abandoned == await story.read("c1", *STOPPED, user_id="unseen")


@pytest.mark.parametrize("passes", [False, True])
async def test_each_sign_of_life_puts_off_the_abandonment_to_its_own_instant_and_a_read_does_not(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", free_us=1000 * S)

        async def last_instant(us: int) -> None:
            story.at(us)
            if passes:
                await story.materialize()
            assert "abandoned" != (await story.reading())["state"]

        await story.start()
        await last_instant(100 * S - 1)
        await story.beat()  # takes the lapsed clock up
        story.at(102 * S)
        await story.pause()
        await last_instant(202 * S - 1)
        await story.beat()
        await last_instant(302 * S - 2)
        await story.pause()
        await last_instant(402 * S - 3)
        story.at(402 * S - 2)
        if passes:
            await story.materialize()
        assert ("abandoned", 102 * S, "paused") == await story.read("c1", *STOPPED)
        await story.refused("heartbeat", 409, "chat-not-active")
        assert ("abandoned", 12_000_001) == story.shown(await story.pause(), "state", "elapsed_us")
        assert ("ended", 102 * S, "paused") == story.shown(await story.stop(), *STOPPED)
