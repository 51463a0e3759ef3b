"""``python -m reconciler``: parse, wire, run, exit code."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reconciler.audit import Audit, audit
from reconciler.sweep import BATCHES_AT_ONCE, Pass, repeat, sweep_and_record
from talktime import operating
from talktime.errors import DatabaseUnavailable, SettingError
from talktime.logs import make_logs_discreet
from talktime.process import run_until_signalled, settle
from talktime.settings import home_folder, load_settings
from talktime.store.database import Database, provide_database

if TYPE_CHECKING:
    from collections.abc import Callable

    from reconciler.differences import Findings
    from talktime.webhooks import WebhookSettings

T = TypeVar("T")

log = logging.getLogger("reconciler")

DONE, SOME_FAILED, BAD_USE = 0, 1, 2
NO_DATABASE = os.EX_TEMPFAIL  # 75: cron and systemd read it as "try again later"

AUDIT_LOG_SECONDS = 30


def main(argv: Sequence[str] | None = None, prog: str = "python -m reconciler") -> int:
    """Run the reconciler; returns the exit code."""
    try:
        settings = load_settings()
        parser = _parser(prog, settings.reconcile_us / 1_000_000)
        options = parser.parse_args(argv)
        if options.json and not options.audit:
            parser.error("--json goes with --audit only")
    except SettingError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return BAD_USE
    # Lines for a log; a terminal that shows a progress bar needs only the trouble.
    on_terminal = sys.stderr.isatty() and options.every is None and options.duration is None
    logging.basicConfig(level=logging.WARNING if on_terminal else logging.INFO)
    make_logs_discreet(settings.log_format)
    # Until the passes begin, a SIGTERM unwinds the stack, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with provide_database(settings.database_url, options.home or settings.home) as url:
            settle()
            return run_until_signalled(
                lambda stop: _run(options, Database(url, pool_size=BATCHES_AT_ONCE), stop, settings.webhook)
            )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except DatabaseUnavailable as error:
        log.error("%s", error)  # noqa: TRY400 - an expected end, told in one line
        return NO_DATABASE


def _parser(prog: str, default_every_s: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Materialize durations and credits of all chats that are due: one pass, unless told otherwise.",
        epilog="exit codes: 0 done; 1 some account failed, or the audit found a difference or was stopped; 2 bad use;"
        " 75 no database",
    )
    parser.add_argument(
        "--every",
        type=_seconds,
        metavar="SECONDS",
        nargs="?",
        const=default_every_s,
        help=f"repeat, a pass every SECONDS (without a number: TALKTIME_RECONCILE_SECONDS, now {default_every_s:g})",
    )
    parser.add_argument(
        "--for",
        dest="duration",
        type=_seconds,
        metavar="SECONDS",
        help="repeat, and end after SECONDS (60 suits a crontab line: once a minute, four passes)",
    )
    parser.add_argument("--audit", action="store_true", help="check what is stored instead, and print each difference")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what the audit finds as JSON Lines: an object for each account that differs, and the totals last",
    )
    parser.add_argument("--home", type=home_folder, help="folder of the embedded PostgreSQL, if no URL is set")
    parser.set_defaults(default_every=default_every_s)
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        message = f"must be a number of seconds above 0, not {text!r}"
        raise argparse.ArgumentTypeError(message)
    return seconds


async def _run(
    options: argparse.Namespace, database: Database, stop: asyncio.Event, webhook: WebhookSettings | None = None
) -> int:
    try:
        made: Audit | Pass
        if options.audit:
            made = await _audit(database, stop, as_json=options.json)
            if not made.finished:
                log.error("the audit was stopped before its end")
                return SOME_FAILED
        elif options.every is not None or options.duration is not None:
            every_s = options.every or options.default_every
            made = await repeat(database, stop, every_s=every_s, for_s=options.duration, webhook=webhook)
        else:
            made = await _with_progress(
                "materializing",
                lambda progress: sweep_and_record(database, stop, progress=progress, webhook=webhook),
            )
            log.info("%s", made, extra={"fields": asdict(made)})
        return SOME_FAILED if made.failed else DONE
    finally:
        await database.close()


async def _audit(database: Database, stop: asyncio.Event, *, as_json: bool) -> Audit:
    def report(findings: Findings) -> None:
        for line in [json.dumps(findings.as_json())] if as_json else findings.lines():
            print(line)

    began = time.monotonic()
    made = await _with_progress(
        "auditing", lambda progress: audit(database, stop, report=report, progress=_logged(progress))
    )
    if made.finished:
        await operating.record_audit(
            database,
            took_us=round((time.monotonic() - began) * 1_000_000),
            accounts=made.accounts,
            differing=made.differing,
            differences=made.failed,
        )
    if as_json:
        print(json.dumps(made.as_json()))
    log.info("%s", made, extra={"fields": made.as_json()})
    return made


def _logged(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Have a line for the log too, every so often: an audit of many accounts takes a while."""
    said_at = time.monotonic()

    def noted(done: int, total: int) -> None:
        nonlocal said_at
        progress(done, total)
        if time.monotonic() >= said_at + AUDIT_LOG_SECONDS:
            said_at = time.monotonic()
            log.info("audited %d of %d accounts", done, total)

    return noted


async def _with_progress(what: str, run: Callable[[Callable[[int, int], None]], Coroutine[Any, Any, T]]) -> T:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # A terminal shows the bar; elsewhere it draws nothing.
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        return await run(lambda done, total: bar.update(task, completed=done, total=total))


if __name__ == "__main__":
    sys.exit(main())
