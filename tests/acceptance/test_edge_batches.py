"""A gateway that holds the sockets of many users and beats for all in one request, beside pages that beat alone.

Leases are 10 s, chats are abandoned after 100 s; figures are worked out by hand. `told` ends each story with a clean
audit and a pass that changes nothing that is read.
"""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.engine import URL

from talktime import beats
from tests.acceptance.edges import Story, opened, told, without
from tests.api.requests import Json
from tests.api.server import json_of
from tests.database import Clock
from tests.support import S

RUNS = {"status": 200, "state": "running", "accruing": True}


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a request wait longer for those that go the full way than a busy machine takes."""
    monkeypatch.setattr(beats, "SECONDS_MAX", 60)


def stands(state: str) -> Json:
    return {"status": 200, "state": state, "accruing": False}


async def beat_all(story: Story, *chats: str | tuple[str, str]) -> list[Json]:
    """Beat for these users' first chat, or for these chats, in one request."""
    pairs = [(chat, "c1") if isinstance(chat, str) else chat for chat in chats]
    sent = [{"user_id": user_id, "chat_id": chat_id} for user_id, chat_id in pairs]
    results: list[Json] = json_of(await story.client.post("/v1/heartbeats", json={"beats": sent}))["results"]
    return results


async def test_a_gateway_keeps_clocks_running_as_exactly_as_the_pages_themselves(
    database_url: URL, clock: Clock
) -> None:
    everyday = ("steady", "silent", "poor", "paused")
    gateways, pages = ([f"{name}-{who}" for name in everyday] for who in ("g", "p"))
    async with told(database_url, clock) as story:
        await story.card("60", free_us=5 * S)
        for user_id in gateways + pages:
            await story.buy("12" if user_id.startswith("poor") else "100", user_id=user_id)
            await story.start(user_id=user_id)
        for now in range(4, 41, 4):
            story.at(now * S)
            # Between 12 s and 28 s nothing is heard of the silent.
            heard = [name for name in everyday if name != "silent" or not 12 <= now < 28]
            results = await beat_all(story, *(f"{name}-g" for name in heard))
            for name, result in zip(heard, results, strict=True):
                reading = await story.beat(user_id=f"{name}-p")
                assert (reading["state"], reading["accruing"]) == (result["state"], result["accruing"])
            if now == 20:
                for who in "gp":
                    await story.pause(user_id=f"paused-{who}")
            if now in (16, 36):
                await story.materialize()
        for name in everyday:
            of_gateway, of_page = [await story.reading(user_id=f"{name}-{who}") for who in "gp"]
            assert without(of_page, "user_id") == without(of_gateway, "user_id")
            receipts = [await story.receipt(user_id=f"{name}-{who}") for who in "gp"]
            assert receipts[0] == receipts[1]
        names = ("started_at", "ended_at", "stop_reason")
        for name, ran in {
            "steady": [(0, None, None)],
            "silent": [(0, 18 * S, "lapsed"), (28 * S, None, None)],
            "poor": [(0, 17 * S, "exhausted")],
            "paused": [(0, 20 * S, "paused")],
        }.items():
            assert ran == [story.shown(one, *names) for one in await story.receipt(user_id=f"{name}-g")]


async def test_a_gateway_that_comes_back_too_late_resumes_what_lapsed_and_only_one_clock_of_a_user(
    database_url: URL, clock: Clock
) -> None:
    # Two chats of one advisor can both have lapsed only if they ran side by side once.
    async with opened(database_url, clock, scope="none") as story:
        await story.card("60")
        for user_id in ("u1", "u2"):
            await story.buy("100", user_id=user_id)
            for chat_id in ("c1", "c2"):
                await story.start(chat_id, user_id=user_id)
        begin = story.begin
    async with told(database_url, clock) as story:
        story.begin = begin
        story.at(30 * S)
        sent = [("u1", "c2"), ("u2", "c1"), ("u1", "c1"), ("u2", "c2"), ("u1", "c2")]
        assert [RUNS, RUNS, stands("lapsed"), stands("lapsed"), RUNS] == await beat_all(story, *sent)
        story.at(34 * S)
        assert [RUNS, RUNS, stands("lapsed"), stands("lapsed"), RUNS] == await beat_all(story, *sent)
        # What lapsed has been heard of, and is not abandoned 100 s after it ran.
        story.at(133 * S)
        assert ("lapsed", 10 * S) == await story.read("c1", "state", "elapsed_us")
        assert ("lapsed", 10 * S + 14 * S) == await story.read("c2", "state", "elapsed_us")
        story.at(134 * S)
        gone = {"status": 409, "state": "abandoned", "code": "chat-not-active"}
        assert [gone] * 2 == await beat_all(story, ("u1", "c1"), ("u1", "c2"))


async def test_a_gateways_beats_after_the_credits_ran_out_cost_nothing_and_say_that_nothing_runs(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("10", user_id="u1")
        await story.buy("11", user_id="u2")
        for user_id in ("u1", "u2"):
            await story.start(user_id=user_id)
        for now, expected in ((5, [RUNS, RUNS]), (10, [stands("exhausted"), RUNS]), (14, [stands("exhausted")] * 2)):
            story.at(now * S)
            assert expected == await beat_all(story, "u1", "u2")
        # Money alone sets no clock going, and neither does a beat.
        await story.buy("50", user_id="u1")
        assert [stands("exhausted")] * 2 == await beat_all(story, "u1", "u2")
        story.at(16 * S)
        assert ("exhausted", 10 * S, "10.000000", "50.000000") == await story.read(
            "c1", "state", "elapsed_us", "credits_used", "balance"
        )
        await story.start(user_id="u1")
        story.at(18 * S)
        assert [RUNS, stands("exhausted")] == await beat_all(story, "u1", "u2")
        assert [(0, 10 * S, "exhausted", 0, 10 * S, "10.000000"), (16 * S, None, None, 0, 2 * S, "2.000000")] == (
            await story.segments()
        )


async def test_gateways_pages_and_passes_at_once_are_one_clock_each(database_url: URL, clock: Clock) -> None:
    users = [f"u{n}" for n in range(12)]
    async with told(database_url, clock) as story, opened(database_url, clock) as other:
        await story.card("60", free_us=3 * S)
        for user_id in users:
            await story.buy("100", user_id=user_id)
            await story.start(user_id=user_id)
        for now in range(4, 21, 4):
            story.at(now * S)
            first, second, passed, *readings = await asyncio.gather(
                beat_all(story, *users),
                beat_all(other, *users[::-1]),
                story.materialize(),
                *((story, other)[n % 2].beat(user_id=user_id) for n, user_id in enumerate(users)),
            )
            assert [RUNS] * 24 == first + second
            assert 0 == passed.failed
            assert {now * S} == {reading["elapsed_us"] for reading in readings}
        for user_id in users:
            assert (20 * S, "17.000000", "83.000000") == await story.read(
                "c1", "elapsed_us", "credits_used", "balance", user_id=user_id
            )
            assert [(0, None, None, 3 * S, 17 * S, "17.000000")] == await story.segments(user_id=user_id)
