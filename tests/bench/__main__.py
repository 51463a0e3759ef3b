"""Benchmarks: ``uv run python -m tests.bench``. Ratios against baselines measured beside them, in one run.

Uses the PostgreSQL of TALKTIME_DATABASE_URL as it is set, in databases of its own that are dropped again, else an
embedded one, set for such a load: a quarter of the memory for its buffers, up to 4 GB, and 8 GB of log between
checkpoints (PostgreSQL's defaults, which `talktime up` has, are 128 MB and 1 GB). Prints a table, and writes a JSON
file with the raw numbers of every round. Other work on the machine slows all of it; the ratios suffer least.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tests.bench import report
from tests.bench.bench import Bench, Options
from tests.bench.database import caution, running_server
from tests.bench.figures import table_of
from tests.bench.pass_parts import measure_history, measure_million, measure_pass, measure_writer
from tests.bench.plots import draw
from tests.bench.programs import BenchmarkFailed
from tests.bench.requests_parts import measure_batch, measure_heartbeats, measure_memory, measure_readings
from tests.bench.rounds import Part, Progress
from tests.bench.whole import whole_design

PARTS: Mapping[str, Callable[[Bench], Part]] = {
    "readings": measure_readings,
    "heartbeats": measure_heartbeats,
    "batch": measure_batch,
    "pass": measure_pass,
    "writer": measure_writer,
    "million": measure_million,
    "memory": measure_memory,
    "history": measure_history,
}
MODEST = {"chats": 100_000, "segments": 1_000_000}
FULL = {"chats": 1_000_000, "segments": 10_000_000}
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for; returns the exit code."""
    parsed = _parser().parse_args(argv)
    sizes = FULL if parsed.full else MODEST
    options = Options(
        rounds=parsed.rounds,
        seconds=parsed.seconds,
        clients=parsed.clients,
        generators=parsed.generators,
        chats=parsed.chats or sizes["chats"],
        segments=parsed.segments or sizes["segments"],
        in_flight=parsed.in_flight,
    )
    path = parsed.json or report.default_path()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped then, too
    parts: dict[str, Part] = {}
    machine = report.machine()
    interrupted = False
    # The server's own account has to reach the folder above its home, which is closed by itself.
    with (
        tempfile.TemporaryDirectory(prefix="talktime-bench-") as folder,
        running_server(Path(folder) / "home") as server,
    ):
        database = server.about()
        bench = Bench(options=options, server=server, folder=Path(folder), progress=Progress())
        try:
            for name in [name for name in PARTS if name in parsed.parts] or PARTS:
                bench.progress.part = name
                parts[name] = _measured(bench, PARTS[name])
                report.write(path, report.document(options, database=database, machine=machine, parts=parts))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            bench.close()
    _show(parts, path, caution(database))
    if parsed.plot:
        drawn = path.with_suffix(".svg")
        report.write(drawn, draw([figure for part in parts.values() for figure in part.figures]))
        print(f"plot in {drawn}")
    if interrupted:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 1 if any(part.failures for part in parts.values()) else 0


def _measured(bench: Bench, measure: Callable[[Bench], Part]) -> Part:
    """Measure a part; if it fails, say so and let the others have their turn."""
    try:
        part = measure(bench)
    except BenchmarkFailed as failed:
        part = Part(failures=[str(failed)])
    except Exception as error:  # noqa: BLE001 - whatever it was, it is told, and ends the run with 1
        traceback.print_exc()
        part = Part(failures=[f"{type(error).__name__}: {error}"])
    for failure in part.failures:
        bench.progress.say(f"FAILED: {failure}")
    return part


def _show(parts: Mapping[str, Part], path: Path, warning: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    measured = [figure for part in parts.values() for figure in part.figures]
    console.print(table_of([*measured, *whole_design(parts)]))
    if warning:
        console.print(warning, markup=False, style="bold")
    for name, part in parts.items():
        for failure in part.failures:
            console.print(f"{name} FAILED: {failure}", markup=False, style="bold red")
    if parts:
        console.print(f"raw numbers in {path}", markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 all measured, targets met or not; 1 a part failed; 2 bad use; 130 interrupted",
    )
    parser.add_argument(
        "parts", nargs="*", type=_part, metavar="PART", help=f"out of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="of candidate and baseline in turns (default: 5)")
    parser.add_argument("--seconds", type=_positive, default=3, help="of each of them in a round (default: 3)")
    parser.add_argument("--clients", type=_positive, default=64, help="with a request in flight each (default: 64)")
    parser.add_argument("--generators", type=_positive, default=1, help="processes that send requests (default: 1)")
    parser.add_argument("--chats", type=_positive, help=f"running, one per user (default: {MODEST['chats']:,})")
    parser.add_argument("--segments", type=_positive, help=f"of the long history (default: {MODEST['segments']:,})")
    parser.add_argument("--in-flight", type=_positive, default=10_000, help="for the memory (default: 10,000)")
    parser.add_argument("--full", action="store_true", help="the sizes of the targets: 1,000,000 and 10,000,000")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: a new one in {report.FOLDER}/")
    parser.add_argument("--plot", action="store_true", help="draw the ratios of all rounds beside it, as an SVG")
    return parser


def _part(text: str) -> str:
    if text not in PARTS:
        message = f"there is no part {text!r}, only {', '.join(PARTS)}"
        raise argparse.ArgumentTypeError(message)
    return text


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        message = f"must be a whole number from 1 on, not {text!r}"
        raise argparse.ArgumentTypeError(message)
    return number


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before anything was measured
        sys.exit(INTERRUPTED)
