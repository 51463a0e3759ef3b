"""The cases that the old system, a timer for each chat, was accepted by: one test for each, named after its case.

Through HTTP, on a real database, beside a real reconciler that passes ten times a second. The lease is 15 seconds, a
silent chat is abandoned after 300, and at 60 credits a minute a second costs a credit. Instants are in microseconds
since the begin; `reconciled` ends each case with a clean audit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import pytest
from sqlalchemy.engine import URL

from tests.acceptance.edges import Story, micro, told
from tests.acceptance.programs import (
    ABANDON_US,
    LEASE_US,
    reconciled,
    reconciler,
    written_down,
)
from tests.database import Clock
from tests.program import NOWHERE
from tests.support import S

Case: TypeAlias = Callable[..., AbstractAsyncContextManager[Story]]

FIGURES = ("state", "elapsed_us", "free_used_us", "credits_used", "balance")
STOPPED = ("state", "stopped_at", "stop_reason")
HOUR = 3600 * S


@pytest.fixture
def case(database_url: URL, clock: Clock, tmp_path: Path) -> Case:
    """Begins a case; a scope may be named."""
    return partial(reconciled, database_url, clock, tmp_path)


async def test_new_chat_session(case: Case) -> None:
    async with case() as story:
        await story.card("60", free_us=30 * S)
        await story.buy("100")
        started = await story.start()
        assert ("running", 0, 0, "0.000000", "100.000000") == story.shown(started, *FIGURES)
        assert (True, 0, 0, 30 * S) == story.shown(started, "accruing", "started_at", "as_of", "free_left_us")
        # The record is there at once, not with the first tick of a timer.
        assert [started["chat_id"]] == [chat["chat_id"] for chat in await story.items("/v1/users/u1/chats")]
        story.at(1 * S)
        assert ("running", 1 * S, 1 * S, "0.000000", "100.000000") == await story.read("c1", *FIGURES)
        await story.beat_from(5 * S, 40 * S, 5 * S)
        story.at(40 * S)
        for _ in range(2):  # before or after a pass
            assert ("running", 40 * S, 30 * S, "10.000000", "90.000000") == await story.read("c1", *FIGURES)
            await written_down(story)
        story.at(42_500_000)
        assert ("ended", 42_500_000, 30 * S, "12.500000", "87.500000") == story.shown(await story.stop(), *FIGURES)
        assert [(0, 42_500_000, "ended", 30 * S, 12_500_000, "12.500000")] == await story.segments()


async def test_resuming_an_existing_chat(case: Case) -> None:
    async with case() as story:
        await story.card("60", free_us=5 * S)
        await story.buy("100")
        await story.start()
        story.at(10 * S)
        await story.beat()
        story.at(20 * S)
        assert ("paused", 20 * S, 5 * S, "15.000000", "85.000000") == story.shown(await story.pause(), *FIGURES)
        story.at(HOUR)
        await written_down(story)
        assert "abandoned" == story.stored_state()
        assert (20 * S, "15.000000") == await story.read("c1", "elapsed_us", "credits_used")
        resumed = await story.start()
        assert ("running", 20 * S, 5 * S, "15.000000", "85.000000") == story.shown(resumed, *FIGURES)
        assert (0,) == story.shown(resumed, "started_at")
        story.at(HOUR + 7 * S)
        assert ("running", 27 * S, 5 * S, "22.000000", "78.000000") == await story.read("c1", *FIGURES)
        await story.stop()
        assert [
            (0, 20 * S, "paused", 5 * S, 15 * S, "15.000000"),
            (HOUR, HOUR + 7 * S, "ended", 0, 7 * S, "7.000000"),
        ] == await story.segments()
        assert 1 == len(await story.items("/v1/users/u1/chats"))


async def test_multiple_chats_with_one_advisor(case: Case) -> None:
    async with case() as story:
        await story.card("60", free_us=25 * S)
        await story.buy("100")
        for n in range(3):
            story.at(10 * S * n)
            await story.start(f"c{n}")
        story.at(30 * S)
        expected = {
            "c0": ("paused", 10 * S, 10 * S, "0.000000", "95.000000", 0, 0),
            "c1": ("paused", 10 * S, 10 * S, "0.000000", "95.000000", 0, 10 * S),
            "c2": ("running", 10 * S, 5 * S, "5.000000", "95.000000", 0, 20 * S),
        }
        for _ in range(2):
            for chat_id, figures in expected.items():
                assert figures == await story.read(chat_id, *FIGURES, "free_left_us", "started_at")
            await written_down(story, "c2")
        assert set(expected) == {chat["chat_id"] for chat in await story.items("/v1/users/u1/chats")}


async def test_switching_between_chats(case: Case) -> None:
    async with case() as story:
        await story.card("60")
        await story.buy("100")
        await story.start("c1")
        story.at(7_000_001)
        started = await story.start("c2")
        assert ("running", 0, 0, "0.000000", "92.999999") == story.shown(started, *FIGURES)
        story.at(12 * S)
        for _ in range(2):
            assert ("paused", 7_000_001, "switched") == await story.read("c1", *STOPPED)
            assert ("paused", 7_000_001, 0, "7.000001", "88.000000") == await story.read("c1", *FIGURES)
            assert ("running", 4_999_999, 0, "4.999999", "88.000000") == await story.read("c2", *FIGURES)
            await written_down(story, "c2")
        # A page that still shows the old chat does not take the clock back.
        assert "paused" == (await story.beat("c1"))["state"]
        assert ["c2"] == [chat["chat_id"] for chat in (await story.account())["running"]]


async def test_switching_back(case: Case) -> None:
    async with case() as story:
        await story.card("60", free_us=10 * S)
        await story.buy("100")
        await story.start("c1")
        story.at(7 * S)
        await story.start("c2")
        story.at(12 * S)
        await written_down(story, "c2")
        back = await story.start("c1")
        assert ("running", 7 * S, 7 * S, "0.000000", "98.000000", 0) == story.shown(back, *FIGURES, "started_at")
        story.at(20 * S)
        for _ in range(2):
            assert ("running", 15 * S, 7 * S, "8.000000", "90.000000") == await story.read("c1", *FIGURES)
            assert ("paused", 5 * S, 3 * S, "2.000000", "90.000000") == await story.read("c2", *FIGURES)
            await written_down(story, "c1")
        await story.stop("c1")
        assert [(7 * S, 12 * S, "switched", 3 * S, 2 * S, "2.000000")] == await story.segments("c2")
        assert [
            (0, 7 * S, "switched", 7 * S, 0, "0.000000"),
            (12 * S, 20 * S, "ended", 0, 8 * S, "8.000000"),
        ] == await story.segments("c1")


async def test_timer_failure(database_url: URL, clock: Clock) -> None:
    """What keeps time in the background here is the reconciler: it is not there, and then it fails."""
    async with told(database_url, clock, lease_us=LEASE_US, abandon_us=ABANDON_US) as story:
        code, _, log = await reconciler(NOWHERE, "--every", "0.1", "--for", "0.3")
        assert 75 == code
        assert "pass failed: the database is not available" in log
        await story.card("60")
        for user_id in ("u1", "u2"):
            await story.buy("100", user_id=user_id)
        assert ("running", 0, 0, "0.000000", "100.000000") == story.shown(await story.start(), *FIGURES)
        story.at(10 * S)
        assert ("running", 10 * S, 0, "10.000000", "90.000000") == await story.read("c1", *FIGURES)
        story.at(20 * S)
        clock.connection.execute(
            "ALTER TABLE ledger_entry ADD CONSTRAINT no_charge CHECK (user_id <> 'u1' OR kind <> 'charge')"
        )
        for us in (20 * S, 30 * S):  # what has lapsed is to be charged, and cannot be
            story.at(us)
            made = await story.start(user_id="u2", chat_id=f"made-at-{us}")
            assert ("running", 0, us) == story.shown(made, "state", "elapsed_us", "started_at")
            code, _, log = await reconciler(database_url)
            assert 1 == code
            assert "account 'u1' of bucket" in log
            assert "pass accounts=0 chats=0 failed=1" in log
            assert ("lapsed", 15 * S, 0, "15.000000", "85.000000") == await story.read("c1", *FIGURES)
            assert "running" == story.stored_state()
        clock.connection.execute("ALTER TABLE ledger_entry DROP CONSTRAINT no_charge")
        before = await story.everything()
        code, _, log = await reconciler(database_url)
        assert (0, 1) == (code, log.count("failed=0"))
        assert before == await story.everything()
        assert "lapsed" == story.stored_state()
        assert ["100.000000", "-15.000000"] == await story.amounts()


async def test_long_running_session(case: Case) -> None:
    async with case() as story:
        await story.card("1.5", free_us=180 * S)
        await story.buy("1000")
        await story.start()
        # A heartbeat at the last microsecond of each lease.
        for hour in range(1, 9):
            await story.beat_from((hour - 1) * HOUR, hour * HOUR, LEASE_US - 1)
            story.at(hour * HOUR)
            # A minute costs a credit and a half, but for the first three.
            elapsed_us, used = await story.read("c1", "elapsed_us", "credits_used")
            assert (hour * HOUR, hour * 90_000_000 - 4_500_000) == (elapsed_us, micro(used))
        story.at(8 * HOUR + 123_457)
        expected = ("running", 8 * HOUR + 123_457, 180 * S, "715.503087", "284.496913")
        for _ in range(2):
            assert expected == await story.read("c1", *FIGURES)
            await written_down(story)
        await story.stop()
        paid_us = 8 * HOUR + 123_457 - 180 * S
        assert [(0, 8 * HOUR + 123_457, "ended", 180 * S, paid_us, "715.503087")] == await story.segments()


async def test_browser_refresh(case: Case) -> None:
    async with case() as story:
        await story.card("60", free_us=10 * S)
        await story.buy("100")
        await story.start()
        for us in range(12_345_678, 60 * S, 12_345_678):
            story.at(us)
            before = await story.read("c1", *FIGURES, "started_at")
            assert ("running", us, 10 * S) == before[:3]
            refreshed = await story.start()
            assert before == story.shown(refreshed, *FIGURES, "started_at")
            assert (us + LEASE_US,) == story.shown(refreshed, "accrues_until")
            await written_down(story)
        story.at(60 * S)
        await story.stop()
        assert [(0, 60 * S, "ended", 10 * S, 50 * S, "50.000000")] == await story.segments()


async def test_free_time_sharing_between_chats(case: Case) -> None:
    async with case(scope="none") as story:
        for advisor_id in ("a1", "a2"):
            await story.card("60", advisor_id, free_us=20 * S)
        await story.buy("100")
        await story.start("c1")
        story.at(4 * S)
        assert 16 * S == (await story.start("c2"))["free_left_us"]
        story.at(10 * S)
        for _ in range(2):  # both take from one allowance
            assert (10 * S, 4 * S) == await story.read("c1", "free_used_us", "free_left_us")
            assert (6 * S, 4 * S) == await story.read("c2", "free_used_us", "free_left_us")
            await written_down(story)
        story.at(14 * S)
        for _ in range(2):
            assert ("running", 14 * S, 12 * S, "2.000000", "96.000000") == await story.read("c1", *FIGURES)
            assert ("running", 10 * S, 8 * S, "2.000000", "96.000000") == await story.read("c2", *FIGURES)
            await written_down(story)
        # A new chat brings no new free time; another advisor does, and each user has their own.
        assert 0 == (await story.start("c3"))["free_left_us"]
        assert 20 * S == (await story.start("c4", advisor_id="a2"))["free_left_us"]
        assert 20 * S == (await story.start("c1", user_id="u2"))["free_left_us"]


async def test_credit_deduction_in_several_chats_at_once(case: Case) -> None:
    async with case(scope="none") as story:
        for advisor_id, rate in (("a1", "60"), ("a2", "120"), ("a3", "30")):
            await story.card(rate, advisor_id)
        await story.buy("35")
        for n in (1, 2, 3):
            await story.start(f"c{n}", advisor_id=f"a{n}")
        for us, state, costs, balance in (
            (4 * S, "running", ("4.000000", "8.000000", "2.000000"), "21.000000"),
            (9_999_999, "running", ("9.999999", "19.999998", "5.000000"), "0.000003"),
            (10 * S, "exhausted", ("10.000000", "20.000000", "5.000000"), "0.000000"),
            (12 * S, "exhausted", ("10.000000", "20.000000", "5.000000"), "0.000000"),
        ):
            story.at(us)
            for n, cost in enumerate(costs, 1):
                assert (state, min(us, 10 * S), 0, cost, balance) == await story.read(f"c{n}", *FIGURES)
            assert balance == (await story.account())["balance"]
            if us <= 10 * S:
                await written_down(story)
        assert ["35.000000", "-10.000000", "-20.000000", "-5.000000"] == await story.amounts()


async def test_abandoned_session_marked_inactive(case: Case) -> None:
    async with case() as story:
        await story.card("60")
        await story.buy("100")
        await story.start()
        story.at(5 * S)
        await story.beat()
        for us, state in ((20 * S, "lapsed"), (305 * S - 1, "lapsed"), (305 * S, "abandoned")):
            story.at(us)
            assert (state, 20 * S, 0, "20.000000", "80.000000") == await story.read("c1", *FIGURES)
        await written_down(story)
        assert "abandoned" == story.stored_state()
        assert ("abandoned", 20 * S, "lapsed") == await story.read("c1", *STOPPED)
        assert [] == (await story.account())["running"]
        assert [] == await story.items("/v1/users/u1/chats", state="running")
        assert [await story.reading()] == await story.items("/v1/users/u1/chats", state="abandoned")
        await story.refused("heartbeat", 409, "chat-not-active")
        assert ["100.000000", "-20.000000"] == await story.amounts()
        assert ("running", 20 * S, 0, "20.000000", "80.000000") == story.shown(await story.start(), *FIGURES)


async def test_rapid_switching(case: Case) -> None:
    chance = random.Random(12)
    chats = ["c1", "c2", "c3", "c4"]
    async with case() as story:
        await story.card("60", free_us=20 * S)
        await story.buy("200")
        now, running = 0, ""
        for _ in range(200):
            running = chance.choice([chat_id for chat_id in chats if chat_id != running])
            await story.start(running)
            now += chance.choice([1, 2, 999, chance.randint(1, 1_500_000)])
            story.at(now)
        await story.stop(running)
        assert now > 20 * S
        receipts = [segment for chat_id in chats for segment in await story.segments(chat_id)]
        tiles = sorted((began, ended) for began, ended, *_ in receipts)
        assert 200 == len(tiles)
        assert (0, now) == (tiles[0][0], tiles[-1][1])
        assert all(one[1] == other[0] for one, other in pairwise(tiles))
        figures = [await story.read(chat_id, "elapsed_us", "free_used_us", "credits_used") for chat_id in chats]
        assert now == sum(elapsed_us for elapsed_us, _, _ in figures)
        assert 20 * S == sum(free_us for _, free_us, _ in figures)
        assert now - 20 * S == sum(micro(used) for _, _, used in figures)
        assert 220 * S - now == micro((await story.account())["balance"])


async def test_a_query_for_an_old_chat_never_says_that_no_record_was_found(case: Case) -> None:
    old = {
        "ended": ("ended", 5 * S, 5 * S, "0.000000", 0, 5 * S, "ended"),
        "left": ("abandoned", LEASE_US, 5 * S, "10.000000", 5 * S, 5 * S + LEASE_US, "lapsed"),
    }
    names = ("state", "elapsed_us", "free_used_us", "credits_used", "started_at", "stopped_at", "stop_reason")
    async with case() as story:
        await story.card("60", free_us=10 * S)
        await story.buy("5000")
        await story.start("ended")
        story.at(5 * S)
        await story.stop("ended")
        await story.start("left")
        for n in range(250):
            story.at(HOUR * (n + 1))
            await story.start(f"c{n}")
            for user_id in ("u2", "u3"):
                await story.start(f"c{n}", user_id=user_id)
            for chat_id, figures in old.items():
                assert figures == await story.read(chat_id, *names)
            if n % 50 == 0:
                await written_down(story, f"c{n}")
        listed = {chat["chat_id"]: chat for chat in await story.items("/v1/users/u1/chats")}
        assert {*old, *(f"c{n}" for n in range(250))} == set(listed)
        for chat_id, figures in old.items():
            assert figures == story.shown(listed[chat_id], *names)
            in_this_state = await story.items("/v1/users/u1/chats", state=figures[0])
            assert chat_id in [chat["chat_id"] for chat in in_this_state]
            await story.refused("heartbeat", 409, "chat-not-active", chat_id)
        assert [(0, 5 * S, "ended", 5 * S, 0, "0.000000")] == await story.segments("ended")
        assert [(5 * S, 20 * S, "lapsed", 5 * S, 10 * S, "10.000000")] == await story.segments("left")
        assert ("running", 5 * S) == story.shown(await story.start("ended"), "state", "elapsed_us")
