"""Real browsers, without a window: Chromium by Playwright, and Firefox by the protocol that it speaks itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from playwright.async_api import async_playwright
from websockets.asyncio.client import ClientConnection, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

START_SECONDS_MAX = 60
PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "firefox": ("firefox-esr", "firefox")}


class Page(Protocol):
    """What the tests do with a page of any browser."""

    async def goto(self, url: str) -> object:
        """Open an address."""

    async def reload(self) -> object:
        """Load the page again."""

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """Evaluate an expression, or a promise, in the page."""


def program_of(browser: str) -> str:
    """Return the path of a browser; without one the test is skipped, which in CI is a failure."""
    found = next(filter(None, map(shutil.which, PROGRAMS[browser])), None)
    if found is None:
        pytest.skip(f"there is no {browser} on this machine")
    return found


@asynccontextmanager
async def opened(browser: str, folder: Path) -> AsyncIterator[Page]:
    """Open a page in a browser of its own, with an empty profile."""
    program = program_of(browser)
    if browser == "firefox":
        async with _firefox(program, folder) as firefox:
            yield firefox
        return
    async with async_playwright() as playwright:
        # As root it has no sandbox of its own; it opens our pages alone.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = await playwright.chromium.launch(executable_path=program, args=arguments)
        page = await (await chromium.new_context()).new_page()
        failed: list[str] = []
        page.on("pageerror", lambda error: failed.append(str(error)))
        yield page
        await chromium.close()
        assert not failed


async def until(page: Page, expression: str, *, seconds: float = 20) -> Any:  # noqa: ANN401 - JSON
    """Wait until an expression is true in the page, and return it."""
    for _ in range(int(seconds / 0.05)):
        if value := await page.evaluate(expression):
            return value
        await asyncio.sleep(0.05)
    return pytest.fail(
        f"it was not so within {seconds} s: {expression}\n{await page.evaluate('document.body.innerText')}"
    )


class _FirefoxPage:
    """A page in Firefox, by WebDriver BiDi."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._count = 0
        self._context = ""

    async def begin(self) -> None:
        await self._call("session.new", capabilities={})
        tree = await self._call("browsingContext.getTree")
        self._context = tree["contexts"][0]["context"]

    async def end(self) -> None:
        await self._call("session.end")

    async def goto(self, url: str) -> object:
        return await self._call("browsingContext.navigate", context=self._context, url=url, wait="complete")

    async def reload(self) -> object:
        return await self._call("browsingContext.reload", context=self._context, wait="complete")

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        # As text: the protocol's own form of values is a tree of types.
        answer = await self._call(
            "script.evaluate",
            expression=f"Promise.resolve({expression}).then((value) => JSON.stringify(value ?? null))",
            target={"context": self._context},
            awaitPromise=True,
        )
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    async def _call(self, method: str, **params: object) -> Any:  # noqa: ANN401 - JSON
        self._count += 1
        await self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            answer = json.loads(await self._socket.recv())
            if answer.get("id") == self._count:
                assert answer["type"] == "success", answer
                return answer["result"]


@asynccontextmanager
async def _firefox(program: str, folder: Path) -> AsyncIterator[_FirefoxPage]:
    profile = folder / "firefox"
    profile.mkdir()
    process = await asyncio.create_subprocess_exec(
        program,
        *("--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port=0"),
        env={**os.environ, "HOME": str(folder)},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # its own processes end with it
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(START_SECONDS_MAX):
            while (found := re.search(rb"BiDi listening on (ws://\S+)", await process.stderr.readline())) is None:
                assert process.returncode is None, "it did not start"
        async with connect(f"{found[1].decode()}/session", max_size=None) as socket:
            page = _FirefoxPage(socket)
            await page.begin()
            yield page
            await page.end()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
