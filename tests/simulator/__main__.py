"""``python -m tests.simulator``: run histories until there is a difference, or no more are asked for."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.database import provided_databases, running_server
from tests.simulator.runs import Failure, run_histories

STEPS = 500
REPORT_EVERY_S = 60


def main() -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--histories", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the seed of the first; the others follow")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each history (default {STEPS})")
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, help="how many at once (default: all cores)"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is stopped
    choice = os.environ.get("TALKTIME_TEST_DATABASE") or "auto"
    image = os.environ.get("TALKTIME_TEST_IMAGE") or "postgres:17"
    seeds = range(options.first, options.first + options.histories)
    totals: Counter[str] = Counter()
    began = told = time.monotonic()
    columns = TextColumn("histories"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        running_server(choice, image) as server,
        provided_databases(server.url) as databases,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("", total=len(seeds))
        try:
            for made in run_histories(databases, seeds, options.steps, at_once=options.at_once):
                totals += made
                bar.advance(task)
                if time.monotonic() - told > REPORT_EVERY_S:
                    told = time.monotonic()
                    print(_told(totals, told - began), file=sys.stderr)
        except Failure as failure:
            print(failure)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    print(_told(totals, time.monotonic() - began))
    print("no difference")
    return 0


def _told(totals: Counter[str], took_s: float) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(totals.items())) + f" in {took_s:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
