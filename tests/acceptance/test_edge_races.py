"""Requests and passes that really happen at once: what must hold in whatever order they come, and exact totals.

The simulated clock moves on meanwhile. `told` ends each test with a clean audit and a pass that changes nothing that is
read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from sqlalchemy.engine import URL

from tests.acceptance.edges import PASSING, Story, micro, told, without
from tests.api.requests import Json
from tests.api.server import json_of
from tests.database import Clock
from tests.support import S

STOPPED = ("state", "stopped_at", "stop_reason")


@asynccontextmanager
async def moving(clock: Clock, step_us: int = 7) -> AsyncIterator[None]:
    """Let the clock move on, while others work."""

    async def move() -> None:
        while True:
            clock.tick(step_us)
            await asyncio.sleep(0.001)

    task = asyncio.create_task(move())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _at_a_credit_a_second(story: Story, *users: str, bought: str = "100") -> None:
    await story.card("60")
    for user_id in users:
        await story.buy(bought, user_id=user_id)


# --- starts -----------------------------------------------------------------------------------------------------------


async def test_tabs_that_start_one_chat_at_once_open_one_segment_and_run_one_clock(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        users = [f"u{n}" for n in range(4)]
        await _at_a_credit_a_second(story, *users)
        async with moving(clock):
            for user_id in users:
                readings = await asyncio.gather(*(story.start(user_id=user_id) for _ in range(8)))
                assert set(range(1, 9)) == {reading["revision"] for reading in readings}
                assert 1 == len({reading["started_at"] for reading in readings})
                assert {"running"} == {reading["state"] for reading in readings}
        for user_id in users:
            ended = await story.stop(user_id=user_id)
            began, stopped = story.shown(ended, "started_at", "stopped_at")
            assert [(began, stopped)] == [row[:2] for row in await story.segments(user_id=user_id)]
            assert stopped - began == ended["elapsed_us"] == micro(ended["credits_used"])


async def test_a_start_that_is_sent_many_times_at_once_with_its_key_is_one_start(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _at_a_credit_a_second(story, "u1")
        for n in range(5):
            async with moving(clock):
                readings = await asyncio.gather(*(story.start(key=f"k{n}") for _ in range(8)))
                assert {2 * n + 1} == {reading["revision"] for reading in readings}
                # The lease is that of the one start: the repetitions have not renewed it.
                assert 1 == len({reading["accrues_until"] for reading in readings})
                paused, *again = await asyncio.gather(story.pause(), *(story.start(key=f"k{n}") for _ in range(4)))
                assert {2 * n + 1, 2 * n + 2} >= {reading["revision"] for reading in again}
                assert "paused" == paused["state"] == (await story.reading())["state"]
        assert 5 == len(await story.segments())


async def test_tabs_that_start_different_chats_at_once_leave_one_clock_and_no_gap_and_no_overlap(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _at_a_credit_a_second(story, "u1")
        chats = [f"c{n}" for n in range(6)]
        first = (await story.start("c0"))["started_at"]
        async with moving(clock):
            for _ in range(5):
                await asyncio.gather(*(story.start(chat_id) for chat_id in chats), story.materialize())
                assert 1 == len((await story.account())["running"])
        [running] = (await story.account())["running"]
        last = await story.stop(running["chat_id"])
        segments = sorted([row for chat_id in chats for row in await story.segments(chat_id)])
        assert story.shown(last, "stopped_at")[0] == segments[-1][1]
        assert story.shown({"started_at": first}, "started_at")[0] == segments[0][0]
        assert [row[1] for row in segments[:-1]] == [row[0] for row in segments[1:]]
        assert [*(["switched"] * (len(segments) - 1)), "ended"] == [row[2] for row in segments]
        readings = [await story.reading(chat_id) for chat_id in chats]
        whole_us = segments[-1][1] - segments[0][0]
        assert whole_us == sum(reading["elapsed_us"] for reading in readings)
        assert 100 * S - whole_us == micro((await story.account())["balance"])


async def test_starts_at_once_beyond_what_the_balance_pays_spend_it_to_zero_and_not_below(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, scope="none") as story:
        users = [f"u{n}" for n in range(4)]
        # A block costs one credit, and of six chats three can pay one; whoever is first.
        await story.card("1", first_us=60 * S, increment_us=60 * S)
        for user_id in users:
            await story.buy("3.5", user_id=user_id)
        chats = [f"c{n}" for n in range(6)]
        async with moving(clock):
            for user_id in users:
                await asyncio.gather(*(story.start(chat_id, user_id=user_id) for chat_id in chats), story.materialize())
        for user_id in users:
            clock.tick(1)
            readings = [await story.reading(chat_id, user_id=user_id) for chat_id in chats]
            assert ["exhausted"] * 3 + ["running"] * 3 == sorted(reading["state"] for reading in readings)
            assert 3 * S == sum(micro(reading["credits_used"]) for reading in readings)
            assert {"0.500000"} == {reading["balance"] for reading in readings}


# --- stops ------------------------------------------------------------------------------------------------------------


async def test_of_stops_at_once_the_first_wins_and_the_segment_is_charged_once(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        users = [f"u{n}" for n in range(4)]
        await _at_a_credit_a_second(story, *users)
        for user_id in users:
            began = story.shown(await story.start(user_id=user_id), "started_at")[0]
            clock.tick(2 * S)
            async with moving(clock):
                stops = await asyncio.gather(*(story.stop(user_id=user_id) for _ in range(8)))
            first = without(stops[0], *PASSING)
            assert all(first == without(stop, *PASSING) for stop in stops)
            state, stopped, reason = story.shown(first, *STOPPED)
            assert ("ended", "ended", stopped - began) == (state, reason, first["elapsed_us"])
            # The instant is the first one's own: nobody was answered at an earlier one.
            assert stopped == min(story.shown(stop, "as_of")[0] for stop in stops)
            charge, purchase = await story.ledger(user_id=user_id)
            assert (began - stopped, 100 * S) == (micro(charge["amount"]), micro(purchase["amount"]))


@pytest.mark.parametrize("lapsed", [False, True], ids=["within-the-lease", "after-the-lease"])
async def test_a_stop_that_races_passes_ends_the_chat_at_its_own_instant_and_charges_once(
    database_url: URL, clock: Clock, *, lapsed: bool
) -> None:
    async with told(database_url, clock) as story:
        users = [f"u{n}" for n in range(8)]
        await _at_a_credit_a_second(story, *users)
        for user_id in users:
            began = story.shown(await story.start(user_id=user_id), "started_at")[0]
            clock.tick(10 * S if lapsed else 3 * S)
            async with moving(clock):
                ended, *_ = await asyncio.gather(
                    story.stop(user_id=user_id),
                    story.materialize(),
                    story.materialize(),
                    story.reading(user_id=user_id),
                    story.stop(user_id=user_id),
                )
            state, stopped, reason = story.shown(ended, *STOPPED)
            if lapsed:
                assert ("ended", began + 10 * S, "lapsed") == (state, stopped, reason)
            else:
                assert ("ended", "ended") == (state, reason)
                assert began + 3 * S <= stopped
            assert stopped - began == ended["elapsed_us"] == micro(ended["credits_used"])
            assert [began - stopped, 100 * S] == [micro(e["amount"]) for e in await story.ledger(user_id=user_id)]


async def test_a_pause_that_races_a_heartbeat_and_a_pass_stops_the_clock(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        await _at_a_credit_a_second(story, "u1")
        total_us = 0
        for _ in range(12):
            began = story.shown(await story.start(), "as_of")[0]
            clock.tick(1 * S)
            async with moving(clock):
                paused, beat, _ = await asyncio.gather(story.pause(), story.beat(), story.materialize())
            stopped = story.shown(paused, "stopped_at")[0]
            total_us += stopped - began
            assert beat["state"] in {"running", "paused"}
            assert ("paused", stopped, "paused") == await story.read("c1", *STOPPED)
            assert total_us == (await story.reading())["elapsed_us"]
        assert 12 == len(await story.segments())


# --- heartbeats -------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_that_races_the_end_of_the_lease_and_a_pass_renews_it_or_opens_a_new_segment(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        users = [f"u{n}" for n in range(8)]
        await _at_a_credit_a_second(story, *users)
        for user_id in users:
            began = story.shown(await story.start(user_id=user_id), "started_at")[0]
            clock.tick(10 * S - 8)
            async with moving(clock, 3):
                beats = await asyncio.gather(
                    story.materialize(),
                    *(story.beat(user_id=user_id) for _ in range(4)),
                    story.materialize(),
                )
            assert {"running"} == {beat["state"] for beat in beats[1:5] if isinstance(beat, dict)}
            clock.tick(1 * S)
            ended = await story.stop(user_id=user_id)
            stopped = story.shown(ended, "stopped_at")[0]
            segments = [row[:3] for row in await story.segments(user_id=user_id)]
            if len(segments) == 1:
                assert [(began, stopped, "ended")] == segments
            else:
                (_, _, _), (resumed, _, _) = segments
                assert [(began, began + 10 * S, "lapsed"), (resumed, stopped, "ended")] == segments
                assert began + 10 * S <= resumed <= stopped - 1 * S
            elapsed_us = sum(end - begin for begin, end, _ in segments)
            assert elapsed_us == ended["elapsed_us"] == 100 * S - micro(ended["balance"])


# --- credits ----------------------------------------------------------------------------------------------------------


async def test_credits_and_corrections_that_race_a_running_clock_and_passes_add_up_and_never_overdraw(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _at_a_credit_a_second(story, "u1", bought="10")
        await story.start()
        clock.tick(2 * S)

        async def take(n: int) -> int:
            answer = await story.credit("1.5", kind="correction", key=f"take-{n}")
            assert answer.status_code in {201, 409}
            return 1_500_000 if answer.status_code == 201 else 0

        async def give(n: int) -> int:
            json_of(await story.credit("0.2", key=f"give-{n % 4}"), 201)  # each key is sent twice
            return 200_000 if n < 4 else 0

        async with moving(clock):
            takings, givings, _ = await asyncio.gather(
                asyncio.gather(*(take(n) for n in range(12))),
                asyncio.gather(*(give(n) for n in range(8))),
                asyncio.gather(*(story.materialize() for _ in range(3))),
            )
        # Less than 8.8 and more than 7.5 are left for takings of 1.5: five can be borne in any order, and no sixth.
        assert (7_500_000, 800_000) == (sum(takings), sum(givings))
        ended = await story.stop()
        assert 10 * S - 7_500_000 + 800_000 == micro(ended["balance"]) + micro(ended["credits_used"])
        assert ["0.200000"] * 4 + ["10.000000"] == sorted(
            amount for amount in await story.amounts() if amount[0] != "-"
        )


# --- lists ------------------------------------------------------------------------------------------------------------


async def test_a_ledger_that_is_paged_while_entries_come_shows_each_of_the_first_once_and_loses_none(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, lease_us=1 * S) as story:
        await _at_a_credit_a_second(story, "u1")
        for n in range(14):
            await story.credit("0.5", key=f"before-{n}")
        written = 15
        more = True

        async def add_entries() -> None:
            n = 0
            while more:
                await story.credit("0.1", key=f"meanwhile-{n}")
                await story.start()
                clock.tick(2 * S)  # lapsed, which the pass writes down, or the next credit
                await story.materialize()
                n += 1

        writer = asyncio.create_task(add_entries())
        pages: list[list[Json]] = []
        query: dict[str, str | int] = {"limit": 3}
        while query.get("cursor", "") is not None:
            page = json_of(await story.client.get("/v1/users/u1/ledger", params=query))
            pages.append(page["items"])
            query["cursor"] = page["next"]
            await asyncio.sleep(0.02)
        more = False
        await writer
        numbers = [entry["number"] for page in pages for entry in page]
        newest = numbers[0]
        assert newest >= written
        assert list(range(newest, 0, -1)) == numbers
        # There really came some meanwhile, and what was shown is still what is shown.
        now = await story.ledger()
        assert len(now) > newest
        assert now[-newest:] == [entry for page in pages for entry in page]


async def test_readings_while_everything_happens_at_once_never_go_back_but_by_a_command_and_never_show_a_half(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock, scope="user") as story:
        await story.card("60", free_us=1 * S)
        await story.buy("50")
        await story.start("c1")
        more = True
        seen: list[Json] = []

        async def read() -> None:
            last = await story.reading("c1")
            while more:
                shown = await story.reading("c1")
                assert (last["revision"], last["as_of"]) <= (shown["revision"], shown["as_of"])
                # A command that took its instant before a reading and was committed after it may correct what that
                # showed, and says so by the revision; nothing else may.
                if last["revision"] == shown["revision"]:
                    assert last["elapsed_us"] <= shown["elapsed_us"]
                    assert micro(last["credits_used"]) <= micro(shown["credits_used"])
                assert shown["elapsed_us"] - shown["free_used_us"] == micro(shown["credits_used"])
                seen.append(last := shown)

        async def look_at_account() -> None:
            while more:
                account = await story.account()
                assert len(account["running"]) <= 1
                assert micro(account["balance"]) >= 0

        async def act() -> None:
            for n in range(12):
                clock.tick(300_000)
                await asyncio.gather(story.start("c2" if n % 2 == 0 else "c1"), story.beat("c1"), story.materialize())
                await story.pause("c1" if n % 3 else "c2")

        readers = [asyncio.create_task(read()), asyncio.create_task(look_at_account())]
        async with moving(clock, 1001):
            await act()
        more = False
        await asyncio.gather(*readers)
        assert len(seen) > 10
        used = [micro((await story.reading(chat_id))["credits_used"]) for chat_id in ("c1", "c2")]
        assert 50 * S == micro((await story.account())["balance"]) + sum(used)
        assert 1 * S == sum([(await story.reading(chat_id))["free_used_us"] for chat_id in ("c1", "c2")])
