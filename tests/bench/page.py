"""What the JavaScript client costs a page: ``uv run python -m tests.bench.page [--seconds 30]``.

A chat runs on a page that has nothing but the client and one text that is rewritten at each change. Chromium says how
long the main thread was busy; the same page without the client is subtracted.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from playwright.async_api import CDPSession, async_playwright

from tests.program import run, running

HEARTBEAT_S = 5

BEGIN = """async ({ token, userId }) => {
  const { ChatClock, formatDuration } = await import("/client/index.js");
  const text = document.body.appendChild(document.createElement("p"));
  const clock = new ChatClock({ userId, chatId: "c1", token });
  clock.subscribe(() => { text.textContent = clock.shown.ready ? formatDuration(clock.shown.elapsedUs) : ""; });
  await new Promise((done) => setTimeout(done, 3000));
}"""


async def measure(seconds: int) -> None:
    """Run the page and print what it cost."""
    with tempfile.TemporaryDirectory(prefix="talktime-bench.") as folder:
        home = Path(folder) / "home"
        with running(Path(folder) / "log", "up", "--port", "0", "--home", home) as service:
            chat = "/v1/users/u1/chats/c1"
            service.client.post(f"{chat}/start", json={"advisor_id": "a1"}).raise_for_status()
            token = run("token", "u1", "--home", home).stdout.strip()
            async with async_playwright() as playwright:
                chromium = await playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                page = await chromium.new_page()
                requests: list[str] = []
                page.on("request", lambda request: requests.append(urlsplit(request.url).path))
                session = await page.context.new_cdp_session(page)
                await session.send("Performance.enable")
                await page.goto(f"{service.client.base_url}/livez")
                await asyncio.sleep(3)
                idle = await busy_ms(session, seconds)
                await page.evaluate(BEGIN, {"token": token, "userId": "u1"})
                requests.clear()
                busy = await busy_ms(session, seconds)
                await chromium.close()
    print(f"{'main thread, ms a second':<34}{'scripts':>10}{'all tasks':>12}")
    for name, (script, task) in (("the page alone", idle), ("with a running clock", busy)):
        print(f"{name:<34}{script / seconds:>10.3f}{task / seconds:>12.3f}")
    print(f"{'the clock':<34}{(busy[0] - idle[0]) / seconds:>10.3f}{(busy[1] - idle[1]) / seconds:>12.3f}")
    print(f"requests in {seconds} s: {len(requests)}, at one heartbeat in {HEARTBEAT_S} s")


async def busy_ms(session: CDPSession, seconds: int) -> tuple[float, float]:
    """Return for how long scripts, and all tasks, kept the main thread busy."""
    before = await metrics(session)
    await asyncio.sleep(seconds)
    after = await metrics(session)
    script, task = (1000 * (after[name] - before[name]) for name in ("ScriptDuration", "TaskDuration"))
    return script, task


async def metrics(session: CDPSession) -> dict[str, float]:
    """Ask Chromium for its counters."""
    answer = await session.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in answer["metrics"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30)
    asyncio.run(measure(parser.parse_args().seconds))
