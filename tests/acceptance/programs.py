"""The programs around a story: the reconciler as it is run in production, and a page that runs the real client."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from talktime import web
from tests.acceptance.edges import EPOCH, Story, told
from tests.api.server import json_of
from tests.database import Clock
from tests.program import PATIENCE_S, Running, environment, running, said, written
from tests.support import S
from tests.web.network import Network, network

LEASE_US = 15 * S
ABANDON_US = 300 * S
CLIENT = Path(web.__file__).with_name("client") / "index.js"
PAGE = Path(__file__).with_name("page.js")

# --- the reconciler ---------------------------------------------------------------------------------------------------


async def reconciler(url: URL | str, *options: str) -> tuple[int, str, str]:
    """Run the reconciler to its end, as cron does; return its exit code, its output and its log."""
    variables = {"TALKTIME_DATABASE_URL": url if isinstance(url, str) else written(url)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "reconciler", *options),
        env=environment(**variables),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@contextmanager
def reconciling(url: URL, log: Path) -> Iterator[None]:
    """Let a reconciler pass many times a second. Its exit code says in the end that no pass of it failed."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "reconciler", "--every", "0.1"],
            env=environment(TALKTIME_DATABASE_URL=written(url)),
            stderr=file,
        )
    try:
        said(r"(pass accounts=)", log, process)
        yield
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(PATIENCE_S), log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@asynccontextmanager
async def reconciled(url: URL, clock: Clock, folder: Path, *, scope: str = "advisor") -> AsyncIterator[Story]:
    """Tell a story beside a reconciler that passes all the time, and end it with the audit that operators run."""
    async with told(url, clock, lease_us=LEASE_US, abandon_us=ABANDON_US, scope=scope) as story:
        with reconciling(url, folder / "reconciler.log"):
            yield story
        assert (0, "") == (await reconciler(url, "--audit"))[:2]


async def written_down(story: Story, chat_id: str = "c1", *, user_id: str = "u1") -> None:
    """Wait until the reconciler has written down how everything of this user is at this instant."""
    async with asyncio.timeout(PATIENCE_S):
        through_us, now_us = -1, 0
        while through_us != now_us:
            through_us, now_us = await story.read(chat_id, "materialized_through", "as_of", user_id=user_id)
            await asyncio.sleep(0.02)


# --- a page, on real time ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def metered(url: URL, folder: Path, *, lease: str, beat: str) -> AsyncIterator[tuple[Running, Network]]:
    """Run all of the product, with five passes a second, and a network before it; audit what it leaves.

    The user has 25 credits. A second with the advisor costs one, after the first three.
    """
    settings = {"LEASE_SECONDS": lease, "HEARTBEAT_SECONDS": beat, "RECONCILE_SECONDS": "0.2"}
    variables = {"TALKTIME_DATABASE_URL": written(url), **{f"TALKTIME_{name}": of for name, of in settings.items()}}
    up = ("up", "--no-demo", "--port", "0", "--home", folder / "home")
    with running(folder / "log", *up, **variables) as service:
        json_of(service.client.put("/v1/advisors/a1", json={"credits_per_minute": "60", "free_seconds": 3}))
        credit = {"kind": "purchase", "amount": "25"}
        json_of(service.client.post("/v1/users/u1/credits", json=credit, headers={"Idempotency-Key": "k"}), 201)
        port = service.client.base_url.port
        assert port is not None
        async with network(port, seed=1) as way:
            yield service, way
        assert 0 == service.end()
    assert (0, "") == (await reconciler(url, "--audit"))[:2]


def microseconds(timestamp: str) -> int:
    """Return an instant since 1970."""
    return (datetime.fromisoformat(timestamp) - EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Frame:
    """What was on display at an instant (microseconds since 1970)."""

    at: int
    elapsed_us: int
    text: str


@asynccontextmanager
async def page(
    origin: str, key: str, log: Path, *, user_id: str = "u1", chat_id: str = "c1", advisor_id: str = "a1"
) -> AsyncIterator[None]:
    """Open a chat's page until the block ends; it starts the chat if there is none yet."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine")
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(node, PAGE, CLIENT, origin, user_id, chat_id, advisor_id, key), stdout=file
        )
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not frames_of(log):
                assert process.returncode is None
                await asyncio.sleep(0.01)
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def frames_of(log: Path) -> list[Frame]:
    """Return all frames on which a time was displayed; the last line may be cut off."""
    whole, _, _ = log.read_text().rpartition("\n")
    return [Frame(**json.loads(line)) for line in whole.splitlines()]


def texts_of(frames: list[Frame]) -> list[str]:
    """Return what was on display, one after the other."""
    return [text for text, _ in groupby(frame.text for frame in frames)]
