"""The console in real browsers: signing in, clocks that tick, parts that refresh themselves."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import Error as LeavingPage
from playwright.async_api import Page as ChromiumPage

from talktime import operations
from talktime.meter.state import CreditKind
from tests.api.requests import KEY
from tests.database import connect
from tests.support import CREDIT, POLICY, S, open_service
from tests.web.browsers import Page, opened, until
from tests.web.server import console

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.engine import URL

LONG = POLICY._replace(lease_us=1000 * S, abandon_after_us=2000 * S)
OFF_US_MAX = 1_100_000
"""A display of whole seconds, and the time that it takes to ask."""


async def sign_in(page: Page, origin: str, target: str) -> None:
    await page.goto(f"{origin}{target}")
    await page.evaluate(
        f"void (document.getElementById('key').value = {KEY!r}, document.querySelector('main form').requestSubmit())"
    )
    await arrive(page, target)


async def arrive(page: Page, target: str) -> None:
    """Wait until the browser has gone to a path by itself."""
    for _ in range(400):
        with contextlib.suppress(LeavingPage):  # Chromium's word for a question to a page that is being left
            if await page.evaluate(f"location.pathname === {target!r} && document.readyState === 'complete'"):
                return
        await asyncio.sleep(0.05)
    pytest.fail(f"it did not go to {target}")


def shown(user_id: str, figure: str) -> str:
    return (
        f"[...document.querySelectorAll('[data-reading]')].find((row) => row.innerText.includes({user_id!r}))"
        f"?.querySelector('[data-show={figure}]').textContent"
    )


@pytest.mark.parametrize("browser", ["chromium", "firefox"])
async def test_an_operator_signs_in_and_watches_chats_run(browser: str, database_url: URL, tmp_path: Path) -> None:
    async with (
        open_service(database_url, policy=LONG) as service,
        console(database_url, key=None) as client,
        opened(browser, tmp_path) as page,
    ):
        memo = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"
        for user_id in ("ann", "bob"):
            await operations.credit(service, user_id, kind=CreditKind.GRANT, amount=1000 * CREDIT, memo=memo, key="k")
        await operations.start(service, "ann", "c", advisor_id="ada", key=None)
        origin = str(client.base_url).rstrip("/")
        await sign_in(page, origin, "/console")

        first = await page.evaluate(shown("ann", "elapsed"))
        for _ in range(3):
            last = first
            first = await until(page, f"{shown('ann', 'elapsed')} !== {last!r} && {shown('ann', 'elapsed')}")
            reading = await operations.read_chat(service, "ann", "c")
            minutes, seconds = first.split(":")
            assert abs(reading.elapsed_us - (int(minutes) * 60 + int(seconds)) * S) < OFF_US_MAX
        spent = float(await page.evaluate(shown("ann", "credits")))
        assert abs(spent + float(await page.evaluate(shown("ann", "balance"))) - 1000) < 0.02

        await page.evaluate("void (window.still_here = true, document.querySelector('details').open = true)")
        await operations.start(service, "bob", "c", advisor_id="ada", key=None)
        await until(page, shown("bob", "elapsed"))
        assert await page.evaluate("window.still_here && document.querySelector('details').open")
        assert await page.evaluate("[...document.querySelectorAll('time')].every((one) => one.title === one.dateTime)")

        await page.evaluate("void (window.fetch = () => Promise.reject(new Error()))")
        await until(page, "!document.getElementById('stale').hidden")

        await page.goto(f"{origin}/console/users/ann")
        before = await page.evaluate("document.querySelector('[data-balance]').textContent")
        await until(page, f"document.querySelector('[data-balance]').textContent !== {before!r}")
        assert not await page.evaluate(
            "window.ran === true || document.querySelector('main script, main img') !== null"
        )
        assert await page.evaluate("document.querySelector('.memo').textContent") == memo

        with connect(database_url) as connection:
            connection.execute("DELETE FROM console_session")
        await arrive(page, "/console/sign-in")


async def test_pages_fit_a_narrow_screen_whatever_the_ids(database_url: URL, tmp_path: Path) -> None:
    async with (
        open_service(database_url, policy=LONG) as service,
        console(database_url, key=None) as client,
        opened("chromium", tmp_path) as page,
    ):
        assert isinstance(page, ChromiumPage)
        await page.set_viewport_size({"width": 360, "height": 640})
        user_id, chat_id = "u" * 128, "c" * 128
        await operations.credit(
            service, user_id, kind=CreditKind.GRANT, amount=1_000_000 * CREDIT + 1, memo="m" * 500, key="k"
        )
        await operations.start(service, user_id, chat_id, advisor_id="a" * 128, key=None)
        origin = str(client.base_url).rstrip("/")
        await sign_in(page, origin, "/console")
        user = f"/console/users/{user_id}"
        for path in ("/console", "/console/users?q=uu", "/console/passes", user, f"{user}/chats/{chat_id}"):
            await page.goto(f"{origin}{path}")
            assert 360 == await page.evaluate("document.documentElement.scrollWidth"), path
