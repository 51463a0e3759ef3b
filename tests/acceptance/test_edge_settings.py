"""Edge cases of what changes around a chat: tariffs, settings, years, with figures worked out by hand.

Instants are in microseconds since the begin. `told` ends each test with a clean audit and a pass that changes nothing
that is read.
"""

from __future__ import annotations

import pytest
from sqlalchemy.engine import URL

from tests.acceptance.edges import opened, told
from tests.database import Clock
from tests.support import S

FIGURES = ("state", "elapsed_us", "credits_used", "balance")
STOPPED = ("state", "stopped_at", "stop_reason")
MINUTE = 60 * S
DAY = 86_400 * S
YEAR = 365 * DAY


# --- tariffs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [False, True])
async def test_a_tariff_changed_during_a_chat_holds_from_its_next_start_on_and_the_segment_keeps_its_own(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("100")
        await story.start()
        story.at(4 * S)
        await story.card("120")
        if passes:
            await story.materialize()
        # A start of a running chat is a heartbeat, and a heartbeat takes a lapsed one up at the chat's own tariff.
        assert "60.000000" == (await story.start())["tariff"]["credits_per_minute"]
        story.at(20 * S)
        assert "60.000000" == (await story.beat())["tariff"]["credits_per_minute"]
        story.at(22 * S)
        assert ("running", 16 * S, "16.000000", "84.000000") == await story.read("c1", *FIGURES)
        await story.pause()
        assert ("120.000000", 0) == ((again := await story.start())["tariff"]["credits_per_minute"], again["count_us"])
        story.at(25 * S)
        assert ("ended", 19 * S, "22.000000", "78.000000") == story.shown(await story.stop(), *FIGURES)
        assert [
            (0, 14 * S, "lapsed", 0, 14 * S, "14.000000"),
            (20 * S, 22 * S, "paused", 0, 2 * S, "2.000000"),
            (22 * S, 25 * S, "ended", 0, 3 * S, "6.000000"),
        ] == await story.segments()
        tariffs = [item["tariff"]["credits_per_minute"] for item in await story.receipt()]
        assert ["60.000000", "60.000000", "120.000000"] == tariffs


async def test_a_tariff_changed_and_changed_back_goes_on_with_the_count_and_another_value_begins_a_new_one(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, lease_us=100 * S, abandon_us=1000 * S) as story:
        await story.card("1", first_us=MINUTE, increment_us=MINUTE)
        await story.buy("100")
        await story.start()
        story.at(30 * S)
        await story.card("2", first_us=MINUTE, increment_us=MINUTE)
        await story.pause()
        await story.card("1.0", first_us=MINUTE, increment_us=MINUTE)  # the same value, written in another way
        assert (30 * S,) == story.shown(await story.start(), "count_us")
        story.at(60 * S)
        assert ("paused", 60 * S, "1.000000", "99.000000") == story.shown(await story.pause(), *FIGURES)
        await story.card("2", first_us=MINUTE, increment_us=MINUTE)
        assert (0, "1.000000") == story.shown(await story.start(), "count_us", "credits_used")
        story.at(70 * S)
        assert ("paused", 70 * S, "3.000000", "97.000000") == story.shown(await story.pause(), *FIGURES)
        # Back to the first value, but from another one: a new count. A second of free time more is no other tariff.
        await story.card("1", free_us=1 * S, first_us=MINUTE, increment_us=MINUTE)
        assert (0,) == story.shown(await story.start(), "count_us")
        story.at(71 * S)
        await story.pause()
        await story.card("1", free_us=2 * S, first_us=MINUTE, increment_us=MINUTE)
        assert (1 * S,) == story.shown(await story.start(), "count_us")
        story.at(130 * S)
        assert ("paused", 130 * S, "4.000000", "96.000000") == story.shown(await story.pause(), *FIGURES)
        # Another increment alone is another value.
        await story.card("1", first_us=MINUTE, increment_us=6 * S)
        await story.start()
        story.at(130 * S + 1)
        assert ("ended", 130 * S + 1, "5.000000", "95.000000") == story.shown(await story.stop(), *FIGURES)
        assert ["1.000000", "0.000000", "2.000000", "1.000000", "0.000000", "1.000000"] == [
            row[-1] for row in await story.segments()
        ]


async def test_free_time_is_granted_at_the_pairs_first_start_and_no_later_card_changes_it(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", free_us=5 * S)
        await story.buy("100")
        await story.start("c1")
        story.at(2 * S)
        await story.card("60", free_us=50 * S)
        assert (3 * S,) == story.shown(await story.start("c2"), "free_left_us")
        story.at(6 * S)
        assert ("running", 4 * S, "1.000000", "99.000000") == await story.read("c2", *FIGURES)
        await story.start("c1", user_id="u2")
        assert (50 * S,) == await story.read("c1", "free_left_us", user_id="u2")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("then_s", "passes"), [(3, False), (40, True)], ids=["shorter", "longer-with-passes"])
async def test_a_changed_lease_changes_no_past_and_a_chat_carries_what_held_at_its_last_locked_command(
    database_url: URL, clock: Clock, then_s: int, *, passes: bool
) -> None:
    begin = clock.now
    async with opened(database_url, clock) as story:
        await story.card("60")
        for user_id in ("left", "beaten", "restarted", "lapsed", "paused"):
            await story.buy("1000", user_id=user_id)
            await story.start(user_id=user_id)
        story.at(1 * S)
        await story.pause(user_id="paused")
    async with opened(database_url, clock, lease_us=then_s * S, abandon_us=2 * then_s * S, begin=begin) as story:
        story.at(6 * S)
        if passes:
            await story.materialize()
        # A heartbeat that only renews the lease renews the one that the chat has; a start brings the new one.
        assert (16 * S,) == story.shown(await story.beat(user_id="beaten"), "accrues_until")
        assert ((6 + then_s) * S,) == story.shown(await story.start(user_id="restarted"), "accrues_until")
        assert (10 * S,) == await story.read("c1", "accrues_until", user_id="left")
        story.at(11 * S)
        if passes:
            await story.materialize()
        assert ("lapsed", 10 * S, "lapsed") == await story.read("c1", *STOPPED, user_id="left")
        # The heartbeat that takes a lapsed clock up is a command under the account's lock.
        assert ((11 + then_s) * S,) == story.shown(await story.beat(user_id="lapsed"), "accrues_until")
        story.at(16 * S - 1)
        assert ("running",) == await story.read("c1", "state", user_id="beaten")
        story.at(16 * S)
        assert ("lapsed", 16 * S, "lapsed") == await story.read("c1", *STOPPED, user_id="beaten")
        for user_id, abandoned_s in (
            *(("restarted", 6 + 2 * then_s), ("lapsed", 11 + 2 * then_s)),
            *(("left", 100), ("paused", 101), ("beaten", 106)),
        ):
            story.at(max(story.clock.now - begin, abandoned_s * S - 1))
            if story.clock.now - begin < abandoned_s * S:
                assert "abandoned" != (await story.reading(user_id=user_id))["state"], user_id
            story.at(max(story.clock.now - begin, abandoned_s * S))
            if passes:
                await story.materialize()
            assert ("abandoned",) == await story.read("c1", "state", user_id=user_id), user_id
    # A third service, with the first one's settings again, reads the same past.
    async with opened(database_url, clock, begin=begin) as story:
        elapsed = {"left": 10, "beaten": 16, "restarted": 6 + then_s, "lapsed": 10 + then_s, "paused": 1}
        for user_id, elapsed_s in elapsed.items():
            assert ("abandoned", elapsed_s * S) == await story.read("c1", "state", "elapsed_us", user_id=user_id)
        await story.settle()


@pytest.mark.parametrize("passes", [False, True])
async def test_a_changed_scope_switches_at_the_next_start_and_not_before(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    begin = clock.now
    async with opened(database_url, clock, scope="none") as story:
        await story.card("60")
        await story.buy("100")
        await story.start("c1")
        await story.start("c2")
    async with opened(database_url, clock, scope="user", begin=begin) as story:
        story.at(3 * S)
        if passes:
            await story.materialize()
        assert "94.000000" == (await story.account())["balance"]
        await story.beat("c1")
        await story.start("c3")
        for chat_id in ("c1", "c2"):
            assert ("paused", 3 * S, "switched") == await story.read(chat_id, *STOPPED)
        story.at(4 * S)
        assert ["93.000000", ["c3"]] == [
            (account := await story.account())["balance"],
            [reading["chat_id"] for reading in account["running"]],
        ]
        await story.settle()


# --- long times -------------------------------------------------------------------------------------------------------


async def test_a_clock_that_really_runs_for_months_is_exhausted_at_the_exact_microsecond(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, lease_us=200 * DAY, abandon_us=YEAR) as story:
        # 1,000 credits at 0.007 a minute: 142,857 minutes and 1/7; 999.999 credits are the whole minutes.
        await story.card("0.007", "exact")
        await story.card("0.007", "blocks", first_us=MINUTE, increment_us=MINUTE)
        for advisor_id in ("exact", "blocks"):
            await story.buy("1000", user_id=advisor_id)
            await story.start(user_id=advisor_id, advisor_id=advisor_id)
        # The last micro-credit pays up to 1000 * 60 / 0.007 seconds, which is 8,571,428.571428 and 4/7 microseconds.
        ends = {"exact": 8_571_428_571_428, "blocks": 142_857 * MINUTE}
        for user_id, end_us in ends.items():
            assert (end_us, end_us) == await story.read("c1", "exhausts_at", "accrues_until", user_id=user_id)
        for user_id, left in (("blocks", "0.001000"), ("exact", "0.000000")):
            story.at(ends[user_id] - 1)
            assert ("running", left) == await story.read("c1", "state", "balance", user_id=user_id)
            story.at(ends[user_id])
            assert ("exhausted", ends[user_id]) == await story.read("c1", "state", "stopped_at", user_id=user_id)


@pytest.mark.parametrize("passes", [False, True])
async def test_a_chat_resumed_after_many_lapses_and_an_idle_year_pays_for_its_ticks_alone_in_one_count(
    database_url: URL, clock: Clock, *, passes: bool
) -> None:
    async with told(database_url, clock) as story:
        await story.card("1", first_us=MINUTE, increment_us=MINUTE)
        await story.buy("100")
        await story.start()
        now, begins = 0, [0]
        for n in range(30):  # each beat comes 0 to 29 microseconds after the lease has ended
            now += 10 * S + n
            begins.append(now)
            story.at(now)
            if passes and n % 7 == 0:
                await story.materialize()
            assert ("running", (n + 1) * 10 * S) == story.shown(await story.beat(), "state", "elapsed_us")
        story.at(now + YEAR)
        assert ("abandoned", 310 * S, "6.000000", "94.000000") == await story.read("c1", *FIGURES)
        await story.refused("heartbeat", 409, "chat-not-active")
        # A year is not billed, and the sixth block has still fifty seconds.
        assert (310 * S, "6.000000") == story.shown(await story.start(), "count_us", "credits_used")
        await story.beat_from(now + YEAR + 9 * S, now + YEAR + 50 * S, 9 * S)
        story.at(now + YEAR + 50 * S)
        assert ("running", 360 * S, "6.000000", "94.000000") == await story.read("c1", *FIGURES)
        story.at(now + YEAR + 50 * S + 1)
        await story.pause()
        segments = await story.segments()
        assert [*begins, now + YEAR] == [row[0] for row in segments]
        assert [*(begin + 10 * S for begin in begins), now + YEAR + 50 * S + 1] == [row[1] for row in segments]
        # Of ten seconds each, every sixth begins a block; the last one goes a microsecond into the seventh.
        assert [*("1.000000" if n % 6 == 0 else "0.000000" for n in range(31)), "1.000000"] == [
            row[-1] for row in segments
        ]
        assert segments == [
            story.shown(item, "started_at", "ended_at", "stop_reason", "free_us", "paid_us", "cost")
            for item in await story.items("/v1/users/u1/chats/c1/segments", limit=5)
        ]
