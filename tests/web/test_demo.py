"""The demo page in real browsers, against the real service: every frame that is displayed, held against the server."""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_right
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.program import Running, running, written
from tests.web.browsers import Page, opened, until
from tests.web.network import Network, network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from sqlalchemy.engine import URL

SESSION_S = float(os.environ.get("TALKTIME_TEST_SESSION_SECONDS") or 24)
"""How long the page is watched while the network is bad; a sixth of it there is none."""

OFF_US_MAX = 250_000
LATE_S_MAX = 1.5
LATE_US_MAX = LATE_S_MAX * 1_000_000 + OFF_US_MAX
PROMPT_FIRST = 3122
"""A seed by which the first few answers are late by little: the first tick is to come within a second of the start."""

BROWSERS = pytest.mark.parametrize("browser", ["chromium", "firefox"])

# What is on display once a frame has been painted: the wall clock, the time to the microsecond, and the state.
RECORD = """(() => {
  window.frames_seen = [];
  const painted = new MessageChannel();
  painted.port1.onmessage = () => {
    const clock = document.getElementById("now-clock");
    const us = clock.dateTime ? Math.round(1e6 * clock.dateTime.slice(2, -1)) : null;
    window.frames_seen.push([
      performance.timeOrigin + performance.now(), us, clock.textContent,
      document.getElementById("now-state").textContent,
    ]);
  };
  const frame = () => { painted.port2.postMessage(0); requestAnimationFrame(frame); };
  frame();
  return true;
})()"""


@dataclass(frozen=True, slots=True)
class Frame:
    """What was displayed at an instant (microseconds since 1970)."""

    at: float
    elapsed_us: int
    text: str
    state: str


@asynccontextmanager
async def demo(
    browser: str, url: URL, folder: Path, variables: dict[str, str] | None = None, *, seed: int = 1
) -> AsyncIterator[tuple[Page, Network, Running]]:
    """Open the demo in a browser, behind a network."""
    variables = {"TALKTIME_DATABASE_URL": written(url), **(variables or {})}
    with running(folder / "log", "up", "--port", "0", "--home", folder / "home", **variables) as service:
        port = urlsplit(str(service.client.base_url)).port
        assert port is not None
        async with network(port, seed=seed) as way, opened(browser, folder) as page:
            await page.goto(f"{way.origin}/")
            await until(page, "document.querySelectorAll('#advisors button').length === 3")
            yield page, way, service


async def press(page: Page, selector: str) -> None:
    await page.evaluate(f"document.querySelector({selector!r}).click() ?? true")


async def start(page: Page, name: str) -> None:
    await page.evaluate(
        f"[...document.querySelectorAll('#advisors li')].find((one) => one.innerText.includes({name!r}))"
        ".querySelector('button').click() ?? true"
    )


async def state_is(page: Page, state: str, *, seconds: float = 20) -> None:
    await until(page, f"document.getElementById('now-state').textContent === {state!r}", seconds=seconds)


async def frames_of(page: Page) -> list[Frame]:
    """Take the frames seen since the last time, as far as a time was on display."""
    seen = await page.evaluate("window.frames_seen.splice(0)")
    return [Frame(at * 1000, us, text, state) for at, us, text, state in seen if us is not None]


def instant(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1_000_000)


class Truth:
    """A chat's elapsed time at any instant, from its receipt: what the server says of that instant."""

    def __init__(self, service: Running, user_id: str, chat_id: str) -> None:
        self.reading = service.client.get(f"/v1/users/{user_id}/chats/{chat_id}").json()
        items = service.client.get(f"/v1/users/{user_id}/chats/{chat_id}/segments?limit=200").json()["items"]
        self.segments = [
            (instant(item["started_at"]), instant(item["ended_at"] or self.reading["as_of"])) for item in items
        ]

    def elapsed_us(self, at: float) -> float:
        return sum(max(0, min(at, ended_at) - started_at) for started_at, ended_at in self.segments)

    def is_news(self, frame: Frame) -> bool:
        """Tell whether a clock that stands on display may have been started so lately that no answer has come yet."""
        return any(
            started_at <= frame.at < started_at + LATE_US_MAX and frame.elapsed_us == self.elapsed_us(started_at)
            for started_at, _ in self.segments
        )


async def chats_of(page: Page, service: Running) -> tuple[str, list[str]]:
    """Return the guest and its chats, the one started last first."""
    user_id = await page.evaluate("document.getElementById('guest').textContent")
    items = service.client.get(f"/v1/users/{user_id}/chats").json()["items"]
    return user_id, [item["chat_id"] for item in items]


def check(frames: Sequence[Frame], truth: Truth, *, of: str) -> float:
    """Check that no frame goes back, and that none is off; returns by how much the worst one is, in microseconds.

    While the answer that tells of a start is on its way, the server's clock runs and no page can know it yet.
    """
    for before, after in pairwise(frames):
        assert after.elapsed_us >= before.elapsed_us, f"{of}: from {before} back to {after}"
    known = [frame for frame in frames if not truth.is_news(frame)]
    assert len(known) > len(frames) / 2
    off = [frame.elapsed_us - truth.elapsed_us(frame.at) for frame in known]
    worst = max(off, key=abs)
    assert abs(worst) < OFF_US_MAX, f"{of}: {worst} us off at {known[off.index(worst)]}"
    return worst


@BROWSERS
async def test_every_frame_agrees_with_the_server(browser: str, database_url: URL, tmp_path: Path) -> None:
    lease_s = SESSION_S / 8
    settings = {"TALKTIME_LEASE_SECONDS": f"{lease_s:g}", "TALKTIME_HEARTBEAT_SECONDS": f"{lease_s / 3:g}"}
    async with demo(browser, database_url, tmp_path, settings, seed=PROMPT_FIRST) as (page, way, service):
        await page.evaluate(RECORD)
        # In a short session leases are short too; past its lease a page rightly stands still, however the answer fares.
        way.late_s_max = min(LATE_S_MAX, lease_s / 4)
        await start(page, "Mara")
        await asyncio.sleep(SESSION_S / 3)
        way.cut()
        await asyncio.sleep(SESSION_S / 6)
        way.mend()
        await asyncio.sleep(SESSION_S / 4)
        before = await frames_of(page)

        await page.reload()
        await page.evaluate(RECORD)
        await until(page, "document.getElementById('now-clock').dateTime")
        await asyncio.sleep(SESSION_S / 4)
        after = await frames_of(page)

        user_id, [first] = await chats_of(page, service)
        truth = Truth(service, user_id, first)
        # A frame before the start's answer shows no time yet.
        shown = [frame for frame in before if frame.state]
        worst = [check(shown, truth, of="before the refresh"), check(after, truth, of="after the refresh")]
        assert after[0].elapsed_us >= shown[-1].elapsed_us
        first_tick = next(frame for frame in shown if frame.elapsed_us > 0)
        assert first_tick.at - truth.segments[0][0] < 1_000_000
        assert len(truth.segments) >= 2, "the cut ended a segment"
        standing = [frame for frame in shown if frame.elapsed_us == truth.segments[0][1] - truth.segments[0][0]]
        assert standing[-1].at - standing[0].at > 1_000_000, "the clock stood exactly where the lease ended"
        assert len(way.delays) > SESSION_S / 3
        print(  # noqa: T201 - the figures, for who asks for them with -s
            f"{browser}: {len(shown) + len(after)} frames, worst {max(map(abs, worst)) / 1000:.1f} ms,"
            f" {len(way.delays)} answers late by up to {max(way.delays):.2f} s"
        )


@BROWSERS
async def test_a_switch_stops_the_old_clock_where_the_new_one_starts(
    browser: str, database_url: URL, tmp_path: Path
) -> None:
    async with demo(browser, database_url, tmp_path) as (page, _, service):
        await page.evaluate(RECORD)
        await start(page, "Mara")
        await state_is(page, "Running")
        await asyncio.sleep(2.5)
        first_frames = await frames_of(page)
        await start(page, "Mara")
        await until(page, "document.querySelectorAll('#chats li').length === 2")
        await until(page, "document.querySelector('#chats li:nth-child(2) .badge').textContent === 'Paused'")
        await state_is(page, "Running")
        await frames_of(page)
        await asyncio.sleep(2.5)
        second_frames = await frames_of(page)
        user_id, [second, first] = await chats_of(page, service)
        old, new = Truth(service, user_id, first), Truth(service, user_id, second)

        check(first_frames[-1:], old, of="the old chat")
        check(second_frames, new, of="the new chat")
        assert second_frames[-1].elapsed_us - second_frames[0].elapsed_us > 2_000_000
        assert ("paused", "switched") == (old.reading["state"], old.reading["stop_reason"])
        assert new.segments[0][0] == old.segments[-1][1]
        stood = await page.evaluate("document.querySelector('#chats li:nth-child(2) .time').textContent")
        assert f"0:{old.reading['elapsed_us'] // 1_000_000:02d}" == stood

        # And back again: the old one goes on from where it stood.
        await press(page, "#chats li:nth-child(2) button")
        await state_is(page, "Running")
        await frames_of(page)
        await asyncio.sleep(1.2)
        again = await frames_of(page)
        assert again[0].elapsed_us >= old.reading["elapsed_us"]
        check(again, Truth(service, user_id, first), of="the old chat, taken up again")


@BROWSERS
async def test_credits_run_out_at_the_same_microsecond_on_page_and_server(
    browser: str, database_url: URL, tmp_path: Path
) -> None:
    async with demo(browser, database_url, tmp_path) as (page, _, service):
        card = {"credits_per_minute": "100", "free_seconds": 1}
        assert service.client.put("/v1/advisors/ines-caron", json=card).is_success
        await page.evaluate(RECORD)
        await start(page, "Inès")
        await state_is(page, "Out of credits")
        await asyncio.sleep(0.5)
        frames = await frames_of(page)
        user_id, [chat_id] = await chats_of(page, service)
        truth = Truth(service, user_id, chat_id)

        check([frame for frame in frames if frame.state], truth, of="until the end")
        assert truth.reading["elapsed_us"] == 4_000_000  # 1 s free, and 5 credits at 100 a minute
        assert frames[-1].elapsed_us == truth.reading["elapsed_us"]
        assert await page.evaluate("document.getElementById('balance').textContent") == "0.00"
        assert await page.evaluate("document.getElementById('now-used').textContent") == "5.00 credits"

        await press(page, "#top-up")
        await until(page, "document.getElementById('balance').textContent === '5.00'")
        await press(page, "#go")
        await state_is(page, "Running")
        await press(page, "#pause")
        await state_is(page, "Paused")
        await frames_of(page)
        await asyncio.sleep(0.3)
        [*_, last] = await frames_of(page)
        assert last.elapsed_us == Truth(service, user_id, chat_id).reading["elapsed_us"]


@BROWSERS
async def test_the_button_that_cuts_the_network_cuts_the_page_alone(
    browser: str, database_url: URL, tmp_path: Path
) -> None:
    quick = {"TALKTIME_LEASE_SECONDS": "2", "TALKTIME_HEARTBEAT_SECONDS": "0.5"}
    async with demo(browser, database_url, tmp_path, quick) as (page, _, service):
        await start(page, "Theo")
        await state_is(page, "Running")
        await press(page, "#cut")
        await state_is(page, "Waiting")
        await asyncio.sleep(0.3)  # a frame
        stood = await page.evaluate("document.getElementById('now-clock').dateTime")
        assert "cannot be reached" in await page.evaluate("document.getElementById('now-problem').textContent")
        user_id, [chat_id] = await chats_of(page, service)
        elapsed_us = Truth(service, user_id, chat_id).reading["elapsed_us"]
        assert f"PT{elapsed_us / 1_000_000:.6f}S" == stood
        await until(page, "/\\d ms/.test(document.getElementById('difference').textContent)")
        await press(page, "#cut")
        await state_is(page, "Running")
        await until(page, "document.getElementById('now-problem').hidden")


async def test_a_device_whose_clock_is_wrong_and_changes_shows_the_same(database_url: URL, tmp_path: Path) -> None:
    async with demo("chromium", database_url, tmp_path) as (page, _, service):
        # Only Date is wrong, as with a device's clock; what the page measures with goes on.
        await page.evaluate("(() => { const real = Date.now; Date.now = () => real() + 3600_000; return true })()")
        await page.evaluate(RECORD)
        await start(page, "Mara")
        await state_is(page, "Running")
        await asyncio.sleep(1)
        await page.evaluate("(() => { const real = Date.now; Date.now = () => real() - 7200_000; return true })()")
        await asyncio.sleep(1)
        frames = [frame for frame in await frames_of(page) if frame.state]
        user_id, [chat_id] = await chats_of(page, service)
        check(frames, Truth(service, user_id, chat_id), of="under a wrong clock")


async def test_a_hidden_tab_keeps_its_lease_by_a_worker(database_url: URL, tmp_path: Path) -> None:
    quick = {"TALKTIME_LEASE_SECONDS": "3", "TALKTIME_HEARTBEAT_SECONDS": "1"}
    async with demo("chromium", database_url, tmp_path, quick) as (page, _, service):
        await start(page, "Mara")
        await state_is(page, "Running")
        # As a browser does in the end to the timers of a page that nobody sees.
        await page.evaluate("(() => { window.setTimeout = () => 0; window.setInterval = () => 0; return true })()")
        await asyncio.sleep(6)
        user_id, [chat_id] = await chats_of(page, service)
        truth = Truth(service, user_id, chat_id)
        assert truth.reading["state"] == "running"
        assert len(truth.segments) == 1


async def test_two_tabs_on_one_chat_agree_and_one_of_them_beats(database_url: URL, tmp_path: Path) -> None:
    from playwright.async_api import Page as ChromiumPage  # noqa: PLC0415 - for its context alone

    async with demo("chromium", database_url, tmp_path) as (page, way, service):
        assert isinstance(page, ChromiumPage)
        await start(page, "Mara")
        await state_is(page, "Running")
        second = await page.context.new_page()
        beats: list[str] = []
        for tab in (page, second):
            tab.on("request", lambda request: beats.append(request.url) if "heartbeat" in request.url else None)
        await second.goto(f"{way.origin}/")
        await state_is(second, "Running")
        beats.clear()
        await asyncio.sleep(13)
        assert len(beats) in (2, 3)
        both = [await tab.evaluate("document.getElementById('now-clock').textContent") for tab in (page, second)]
        assert both[0] == both[1] or bisect_right(sorted(both), both[0])  # within the second that passes between
        await page.close()
        beats.clear()
        await asyncio.sleep(6)
        assert beats, "the other one goes on"
        user_id, [chat_id] = await chats_of(second, service)
        assert len(Truth(service, user_id, chat_id).segments) == 1
