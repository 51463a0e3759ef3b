"""The criteria that were set for the end of the old system: the page's clock is the server's, and both are the bill.

The first two run on real time, with the page's real JavaScript client under Node. A second costs a credit, after the
first three.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

from sqlalchemy.engine import URL

from tests.acceptance.edges import micro
from tests.acceptance.programs import (
    frames_of,
    metered,
    microseconds,
    page,
    reconciled,
    texts_of,
    written_down,
)
from tests.api.requests import CHAT, problem_of
from tests.api.server import json_of
from tests.database import Clock
from tests.support import S


async def test_server_and_page_agree_within_a_second_from_the_first_second(database_url: URL, tmp_path: Path) -> None:
    log = tmp_path / "page"
    async with metered(database_url, tmp_path, lease="15", beat="5") as (service, way):
        way.late_s_max = 0.2
        readings = []
        async with page(way.origin, service.key, log):
            for _ in range(48):
                readings.append(json_of(service.client.get(CHAT)))
                await asyncio.sleep(0.25)
        frames = frames_of(log)
    [started_at] = {microseconds(reading["started_at"]) for reading in readings}
    assert 0 <= frames[0].at - started_at < 1 * S
    assert frames[-1].at - started_at > 11 * S
    assert len(way.delays) > 1
    for reading in readings:
        as_of = microseconds(reading["as_of"])
        assert as_of - started_at == reading["elapsed_us"]
        assert micro(reading["credits_used"]) == max(0, reading["elapsed_us"] - 3 * S)
        [*_, shown] = [frame for frame in frames if frame.at <= as_of]
        assert abs(shown.elapsed_us - reading["elapsed_us"]) < 1 * S
    assert all(abs(frame.elapsed_us - (frame.at - started_at)) < 1 * S for frame in frames)


async def test_no_visible_jump(database_url: URL, tmp_path: Path) -> None:
    """Answers come late, there is no network for a while, and then the page is loaded again."""
    logs = [tmp_path / "page", tmp_path / "page-refreshed"]
    async with metered(database_url, tmp_path, lease="6", beat="0.5") as (service, way):
        way.late_s_max = 1.0
        async with page(way.origin, service.key, logs[0]):
            await asyncio.sleep(3)
            way.cut()
            await asyncio.sleep(2)
            way.mend()
            await asyncio.sleep(3)
        way.late_s_max = 0.4  # so that the new page knows the time as well as it has to from its first answer on
        async with page(way.origin, service.key, logs[1]):
            await asyncio.sleep(3)
        assert 1 == len(json_of(service.client.get(f"{CHAT}/segments"))["items"])
    before, after = map(frames_of, logs)
    for frames in (before, after):
        # Each second is displayed, one after the other.
        first = int(frames[0].text.removeprefix("0:"))
        texts = texts_of(frames)
        assert [f"0:{second:02}" for second in range(first, first + len(texts))] == texts
        assert len(texts) > 3
    for one, other in pairwise([*before, *after]):
        step_us = other.elapsed_us - one.elapsed_us
        assert step_us >= 0
        assert abs(step_us - (other.at - one.at)) < S // 4


async def test_accurate_for_billing(database_url: URL, clock: Clock, tmp_path: Path) -> None:
    async with reconciled(database_url, clock, tmp_path) as story:
        await story.card("1.234567", "a1", free_us=7 * S)
        await story.card("2.4", "a2", first_us=60 * S, increment_us=6 * S)
        await story.card("60", "a3")
        await story.buy("10")
        for kind, amount in (("refund", "2.5"), ("compensation", "0.5")):
            assert 201 == (await story.credit(amount, kind=kind)).status_code
        await story.start("c1", advisor_id="a1")
        await story.beat_from(10 * S, 20 * S, 10 * S, "c1")
        story.at(20_000_001)
        await story.pause("c1")
        await story.start("c2", advisor_id="a2")
        await story.beat_from(30 * S, 86 * S, 10 * S, "c2")
        story.at(86_000_002)  # 66.000001 seconds: a first block and two increments
        await story.stop("c2")
        story.at(100 * S)
        await story.start("c1", advisor_id="a1")
        story.at(110 * S)
        await story.pause("c1")
        story.at(200 * S)
        assert "4.646749" == (await story.start("c3", advisor_id="a3"))["balance"]
        story.at(210 * S)
        problem_of(await story.credit("0.000001", kind="refund"), 409, "insufficient-balance")
        await written_down(story, "c3")
        assert [
            (0, 20_000_001, "paused", 7 * S, 13_000_001, "0.267490"),  # each rounded up once
            (100 * S, 110 * S, "paused", 0, 10 * S, "0.205761"),
        ] == await story.segments("c1")
        assert [(20_000_001, 86_000_002, "ended", 0, 66_000_001, "2.880000")] == await story.segments("c2")
        assert [(200 * S, 204_646_749, "exhausted", 0, 4_646_749, "4.646749")] == await story.segments("c3")
        assert ("exhausted", 4_646_749, 0, "4.646749", "0.000000") == await story.read(
            "c3", "state", "elapsed_us", "free_used_us", "credits_used", "balance"
        )
        amounts = await story.amounts()
        charges = ["-0.267490", "-2.880000", "-0.205761", "-4.646749"]
        assert ["10.000000", "-2.500000", "0.500000", *charges] == amounts
        assert 0 == sum(map(micro, amounts))
