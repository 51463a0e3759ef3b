"""`talktime import` and `talktime export-legacy`: what they print, and the report."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reconciler.sweep import sweep_and_record
from talktime.errors import MovingIncomplete
from talktime.legacy.exporting import export_all
from talktime.legacy.importing import BATCHES_AT_ONCE, Import, UserReport, import_all
from talktime.legacy.rows import Figures, Listed
from talktime.meter.units import format_credits
from talktime.process import run_until_signalled
from talktime.store.database import Database, provide_database

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from talktime.legacy.tables import Mapped
    from talktime.settings import Settings

log = logging.getLogger("talktime")

LOG_SECONDS = 10
_FIGURES = ("seconds", "free_seconds", "credits_used", "credits")
_HEAD = (
    *("user_id", "outcome", "records", "chats", "equal"),
    *(f"{name}_{when}" for when in ("before", "listed", "after") for name in _FIGURES),
)


def import_legacy(settings: Settings, source: URL, mapped: Mapped, *, dry_run: bool, report: Path | None) -> None:
    """Import an old database: a line on standard output for each thing that is listed, the rest on standard error.

    Raises:
        MovingIncomplete: it was stopped, or users could not be written, or figures differ.
    """
    with contextlib.ExitStack() as stack:
        write_row = _ignore if report is None else csv.writer(stack.enter_context(_open(report))).writerow
        write_row(_HEAD)
        url = stack.enter_context(provide_database(settings.database_url, settings.home))
        teller = stack.enter_context(_teller("importing", "rows"))
        reporter = _Reporter(teller, write_row)

        async def run(stop: asyncio.Event) -> Import:
            database = Database(url, pool_size=BATCHES_AT_ONCE)
            try:
                return await import_all(
                    database,
                    source,
                    mapped,
                    policy=settings.policy,
                    default_card=settings.default_card,
                    reporter=reporter,
                    stop=stop,
                    dry_run=dry_run,
                )
            finally:
                await database.close()

        made = run_until_signalled(run)
    print(made, "(dry run: nothing was written)" if dry_run else "", file=sys.stderr)
    if made.failed or made.unequal:
        message = f"{made.failed} users could not be written, {made.unequal} have other figures than before"
        raise MovingIncomplete(message)
    if not made.finished:
        message = "the import was stopped before its end; the same command goes on with it"
        raise MovingIncomplete(message)


def export_legacy(settings: Settings, target: URL, mapped: Mapped) -> None:
    """Materialize, and write the old tables.

    Raises:
        MovingIncomplete: it was stopped before it wrote, or an account could not be materialized.
    """
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(provide_database(settings.database_url, settings.home))
        teller = stack.enter_context(_teller("exporting", "rows"))

        async def run(stop: asyncio.Event) -> None:
            database = Database(url, pool_size=BATCHES_AT_ONCE)
            try:
                made = await sweep_and_record(database, stop, webhook=settings.webhook)
                if made.failed or stop.is_set():
                    message = f"nothing was exported: {made.failed} accounts could not be materialized"
                    raise MovingIncomplete(message if made.failed else "nothing was exported: it was stopped")
                for done in await export_all(database, target, mapped, progress=teller):
                    print(f"{done.table}\t{done.updated} updated\t{done.added} added")
            finally:
                await database.close()

        run_until_signalled(run)


def _open(report: Path) -> TextIO:
    try:
        return report.open("w", encoding="utf-8", newline="")
    except OSError as error:
        message = f"cannot write the report {report}: {error.strerror}"
        raise MovingIncomplete(message) from None


@contextlib.contextmanager
def _teller(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress: a bar on a terminal, elsewhere a line every so often."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    on_terminal = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not on_terminal) as bar:
        task = bar.add_task(what, total=None)
        said_at = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal said_at
            bar.update(task, completed=done, total=total)
            if not on_terminal and time.monotonic() >= said_at + LOG_SECONDS:
                said_at = time.monotonic()
                log.info("%s: %d of %d %s", what, done, total, unit)

        yield tell


@dataclass(slots=True)
class _Reporter:
    progress: Callable[[int, int], None]
    _write_row: Callable[[Sequence[object]], object]

    def user(self, report: UserReport) -> None:
        figures = (report.before, report.left_out, report.after)
        row = (report.user_id, report.outcome, report.records, report.chats, "yes" if report.is_equal else "NO")
        self._write_row([*row, *(text for one in figures for text in _texts(one))])

    def listed(self, listed: Listed) -> None:
        elapsed, free, cost, had = _texts(listed.figures)
        figures = f"seconds={elapsed} free_seconds={free} credits_used={cost} credits={had}"
        # Old ids and figures may hold anything, line breaks too.
        words = (repr(text)[1:-1] for text in (listed.user_id or "-", listed.row, listed.reason))
        print(*words, figures, sep="\t")


def _ignore(_: Sequence[object]) -> None:
    """Write no report."""


def _texts(figures: Figures) -> tuple[str, str, str, str]:
    # A second has as many microseconds as a credit has micro-credits.
    elapsed, free, cost, had = (format_credits(figure) for figure in figures)
    return elapsed, free, cost, had
