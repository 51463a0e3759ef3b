"""`talktime watch`: a chat's clock on a terminal, going on from reading to reading as pages do.

Between two readings nobody is asked: what is shown is `talktime.meter.reading.show` of the last one at the database's
time, estimated from this machine's monotonic clock. So it is right also while the database does not answer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from talktime import operations
from talktime.errors import DatabaseUnavailable
from talktime.meter.reading import Reading, Shown, show
from talktime.meter.state import ChatState
from talktime.meter.units import MICRO, ceil_div, format_credits
from talktime.operations import Service
from talktime.process import run_until_signalled
from talktime.store.database import Database, provide_database
from talktime.terminal import (
    clock_text,
    keep_quiet,
    local_time,
    tariff_in_words,
    utc_text,
    wait_in_words,
)

if TYPE_CHECKING:
    from talktime.settings import Settings

NO_ANSWER = "the database does not answer"

_DRIFT = 10_000  # two quartz clocks part by at most one part in so many
_BADGES = {
    ChatState.RUNNING: "bold white on green",
    ChatState.LAPSED: "black on yellow",
    ChatState.PAUSED: "black on yellow",
    ChatState.EXHAUSTED: "bold white on red",
    ChatState.ABANDONED: "white on bright_black",
    ChatState.ENDED: "white on bright_black",
}


def watch(settings: Settings, user_id: str, chat_id: str, *, every_us: int, once: bool) -> None:
    """Show a chat until a signal comes, or one reading of it if `once`: a panel on a terminal, else lines.

    Raises:
        ChatNotFound: there is no such chat.
        DatabaseUnavailable: the database does not answer the first time. Later it is waited for.
    """

    async def run(stop: asyncio.Event) -> None:
        database = Database(url, pool_size=1)
        service = Service(database, settings.policy, settings.default_card)

        console = Console()
        live = Live(console=console, auto_refresh=False)

        def redraw(view: View, *, news: bool) -> None:  # noqa: ARG001 - the panel is the same
            live.start()  # once there is something to see
            live.update(panel(view), refresh=True)

        on_terminal = sys.stdout.isatty() and not console.is_dumb_terminal
        try:
            await _follow(
                lambda: operations.read_chat(service, user_id, chat_id),
                stop,
                redraw if on_terminal else _print_news,
                every_us=every_us,
                once=once,
            )
        finally:
            live.stop()
            await database.close()

    keep_quiet()
    with provide_database(settings.database_url, settings.home) as url:
        run_until_signalled(run)


# --- which time, and what is shown at it ------------------------------------------------------------------------------


class ServerTime:
    """The database's time, estimated on a monotonic clock; all in microseconds.

    The database read its clock somewhere between the question and the answer. So each round trip bounds the distance
    of the two clocks, a quick one closely, and a slow one takes nothing from what quick ones told. The first one's
    middle is where the estimate begins.
    """

    def __init__(self) -> None:
        self._low: int | None = None
        self._high = 0
        self._sampled_at = 0

    def sample(self, sent: int, received: int, server: int) -> None:
        """Take in a round trip: when the question went and the answer came, and the time in the answer."""
        low, high = server - received, server - sent
        if self._low is not None:
            spread = (received - self._sampled_at) // _DRIFT
            narrow = max(low, self._low - spread), min(high, self._high + spread)
            # Where they cannot both be right, one of the clocks was set, and the last answer counts.
            low, high = narrow if narrow[0] <= narrow[1] else (low, high)
        self._low, self._high, self._sampled_at = low, high, received

    def now(self, monotonic: int) -> int:
        """Return the database's time."""
        return monotonic + ((self._low or 0) + self._high) // 2


@dataclass(frozen=True, slots=True)
class View:
    """What is seen of a chat at the instant `at`: its last reading, the figures now, and whether it is the newest."""

    reading: Reading
    at: int
    shown: Shown
    answered: bool

    @property
    def state(self) -> ChatState:
        """The state now. Where the clock stops by itself, it is that into which `advance` takes it there."""
        if not self._has_stopped:
            return self.reading.state
        of_credit = self.reading.accrues_until == self.reading.exhausts_at
        return ChatState.EXHAUSTED if of_credit else ChatState.LAPSED

    @property
    def ticks_in(self) -> int | None:
        """Microseconds until the clock shows another second, or stops; None if it stands still."""
        until = self.reading.accrues_until
        if until is None or self._has_stopped:
            return None
        return min(MICRO - self.shown.elapsed_us % MICRO, until - self.at)

    @property
    def _has_stopped(self) -> bool:
        until = self.reading.accrues_until
        return until is not None and self.at >= until


class Watched:
    """A chat as it was last read, and the time that goes on since."""

    def __init__(self) -> None:
        self.answered = True
        self._reading: Reading | None = None
        self._time = ServerTime()
        self._last: View | None = None

    def take(self, reading: Reading, sent: int, received: int) -> None:
        """Take in a reading and its round trip. One that is older than the last adds only its time."""
        self.answered = True
        self._time.sample(sent, received, reading.server_time)
        last = self._reading
        if last is None or (last.revision, last.as_of) <= (reading.revision, reading.as_of):
            self._reading = reading

    def look(self, monotonic: int) -> View | None:
        """Return what is to be shown, or None before the first reading.

        While the chat stays in its state and no command comes, neither time nor credits go back, however the estimate
        of the time is mended.
        """
        if self._reading is None:
            return None
        view = _onwards(self._reading, self._time.now(monotonic), self._last, answered=self.answered)
        self._last = view
        return view


def _onwards(reading: Reading, at: int, last: View | None, *, answered: bool) -> View:
    view = View(reading, at, show(reading, at), answered)
    if last is None or (last.reading.state, last.reading.revision) != (reading.state, reading.revision):
        return view
    at = max(at, last.at)
    shown = show(reading, at)
    shown = shown._replace(
        elapsed_us=max(shown.elapsed_us, last.shown.elapsed_us),
        credits_used=max(shown.credits_used, last.shown.credits_used),
    )
    return View(reading, at, shown, answered)


# --- following --------------------------------------------------------------------------------------------------------


class _Draw(Protocol):
    def __call__(self, view: View, *, news: bool) -> None:
        """Show a view; `news` where the database was just asked."""


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


async def _follow(
    ask: Callable[[], Awaitable[Reading]], stop: asyncio.Event, draw: _Draw, *, every_us: int, once: bool
) -> None:
    """Ask for a reading now and then, and draw after each answer and at each second of the chat's clock."""
    watched = Watched()
    stopping = asyncio.create_task(stop.wait())
    asking: asyncio.Task[None] | None = None
    ask_at, news = _monotonic_us(), False
    try:
        while not stop.is_set():
            now = _monotonic_us()
            if asking is None and now >= ask_at:
                asking = asyncio.create_task(_ask(ask, watched))
                ask_at = now + every_us
            view = watched.look(now)
            if view is not None:
                draw(view, news=news)
                if once:
                    break
            waits = [ask_at - now] if asking is None else []
            if view is not None and view.ticks_in is not None:
                waits.append(view.ticks_in)
            events = {stopping} if asking is None else {stopping, asking}
            timeout_s = min(waits) / MICRO if waits else None
            await asyncio.wait(events, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            news = asking is not None and asking.done()
            if asking is not None and news:
                asking.result()  # raises what `_ask` did
                asking = None
    finally:
        tasks = [stopping] if asking is None else [stopping, asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(ask: Callable[[], Awaitable[Reading]], watched: Watched) -> None:
    sent = _monotonic_us()
    try:
        reading = await ask()
    except DatabaseUnavailable:
        if watched.look(sent) is None:
            raise
        watched.answered = False
    else:
        watched.take(reading, sent, _monotonic_us())


# --- drawing ----------------------------------------------------------------------------------------------------------


def _print_news(view: View, *, news: bool) -> None:
    if not news:
        return
    if view.answered:
        print(line(view), flush=True)
    else:
        print(f"talktime: {NO_ANSWER}", file=sys.stderr)


def line(view: View) -> str:
    """Write a view for programs: names and values, separated by tabs."""
    reading, shown = view.reading, view.shown
    figures = {
        "at": utc_text(view.at),
        "state": view.state,
        "elapsed_us": shown.elapsed_us,
        "free_left_us": shown.free_left_us,
        "credits_used": format_credits(shown.credits_used),
        "balance": format_credits(shown.balance),
        "accrues_until": utc_text(reading.accrues_until),
        "exhausts_at": utc_text(reading.exhausts_at),
    }
    return "\t".join(f"{name}={value}" for name, value in figures.items())


def panel(view: View) -> Panel:
    """Draw a view for people."""
    reading, shown = view.reading, view.shown
    rows = {
        "state": Text(f" {view.state} ", _BADGES[view.state]),
        "time": Text(clock_text(shown.elapsed_us), "bold"),
        # What is left is rounded up, so that both clocks change at the same moment.
        "free time left": Text(clock_text(ceil_div(shown.free_left_us, MICRO) * MICRO)),
        "credits used": Text(format_credits(shown.credits_used)),
        "balance": Text(format_credits(shown.balance)),
        "tariff": Text(tariff_in_words(reading.tariff)),
        "credits run out": Text(runs_out_in_words(view)),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, "dim"), value)
    trouble = [] if view.answered else [Text(outage_in_words(reading), "bold red")]
    title = Text(f"{reading.user_id} {reading.chat_id} with {reading.advisor_id}")
    return Panel(Group(grid, *trouble), title=title, expand=False)


def runs_out_in_words(view: View) -> str:
    """Say when the credits run out, if all goes on as it does."""
    at = view.reading.exhausts_at
    if view.state is not ChatState.RUNNING:
        return "not while the clock stands still"
    if at is None:
        return "never"
    return f"in {wait_in_words(at - view.at)}, at {_time_of_day(at)}"


def outage_in_words(reading: Reading) -> str:
    """Say that the database does not answer, and how far the last reading reaches."""
    until = reading.accrues_until
    if until is None:
        return f"{NO_ANSWER}; shown as of {_time_of_day(reading.as_of)}"
    return f"{NO_ANSWER}; shown until {_time_of_day(until)}"


def _time_of_day(at: int) -> str:
    return local_time(at).format("YYYY-MM-DD HH:mm:ss")
