"""The parts that make passes: against set-based SQL, the interval writer, a million chats, and long histories."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from sqlalchemy.engine import URL

from reconciler.sweep import BATCHES_AT_ONCE
from tests.bench import interval_writer
from tests.bench.bench import Bench
from tests.bench.figures import Figure, Target
from tests.bench.population import populate
from tests.bench.programs import BenchmarkFailed, module, started
from tests.bench.reconciling import reconcile
from tests.bench.rounds import S_US, Part, Run, alternate, per_second
from tests.bench.service import url_environment
from tests.database import connect

PATIENCE_S = 3_600
PERIOD_S = 15
RECONCILERS = 2
TIMERS_MAX = 50_000
INTERVAL_WRITERS = {
    "interval writer": "statements",
    "interval writer, one transaction": "transaction",
    "interval writer, not waiting for the disk": "unsafe",
}
HISTORY_USERS_MAX = 20_000
OLD_CHATS = 100
"""Of each user, where there is a history."""


@contextlib.contextmanager
def passing(bench: Bench, url: URL, name: str = "pass") -> Iterator[Callable[[], Run]]:
    """Yield what makes passes over all chats for the time of a round, in a process of its own."""
    environment = url_environment(url)
    with started(
        f"{name} worker", *module("tests.bench.passes"), folder=bench.folder, environment=environment
    ) as worker:

        def run() -> Run:
            made = worker.ask(PATIENCE_S, us=bench.options.seconds * S_US)
            if made["failed"]:
                worker.fail(f"could not write {made['failed']} accounts")
            return {"rate": per_second(made["chats"], made["elapsed_us"]), **made}

        yield run


def measure_pass(bench: Bench) -> Part:
    """A pass in one process against set-based SQL with the same row writes."""
    url = bench.population.url
    environment = url_environment(url)
    with (
        passing(bench, url) as run_pass,
        started(
            "set-based writer", *module("tests.bench.set_based"), folder=bench.folder, environment=environment
        ) as writer,
    ):

        def write_set_based(connections: int) -> Run:
            prepared = writer.ask(PATIENCE_S, prepare=True)
            made = writer.ask(PATIENCE_S, us=bench.options.seconds * S_US, connections=connections)
            return {"rate": per_second(made["chats"], made["elapsed_us"]), **prepared, **made}

        part = alternate(
            {
                "pass": run_pass,
                "set-based SQL": lambda: write_set_based(BATCHES_AT_ONCE),
                "set-based SQL, one connection": lambda: write_set_based(1),
            },
            bench.options.rounds,
            bench.progress,
        )
    part.notes["connections"] = BATCHES_AT_ONCE
    part.figures = [
        _pass_against(part, "set-based SQL", Target(at_least=0.6, aim=0.8)),
        _pass_against(part, "set-based SQL, one connection"),
    ]
    return part


def _pass_against(part: Part, baseline: str, target: Target | None = None) -> Figure:
    return Figure(
        name="pass, one process",
        unit="chats/s",
        runs=part.rates("pass"),
        baseline=baseline,
        baseline_runs=part.rates(baseline),
        target=target,
    )


def measure_writer(bench: Bench) -> Part:
    """A pass in one process against the interval writer."""
    url, chats = bench.population.url, bench.population.users
    timers = min(chats, TIMERS_MAX)
    with connect(url) as connection:
        interval_writer.prepare(connection, chats)
    environment = url_environment(url)
    with (
        passing(bench, url) as run_pass,
        started(
            "interval writer", *module("tests.bench.interval_writer"), folder=bench.folder, environment=environment
        ) as writer,
    ):
        writer.ask(PATIENCE_S, chats=chats)

        def write_intervals(way: str) -> Run:
            made = writer.ask(PATIENCE_S, way=way, timers=timers, us=bench.options.seconds * S_US)
            return {"rate": per_second(made["counted"], made["elapsed_us"]), **made}

        part = alternate(
            {"pass": run_pass, **{name: partial(write_intervals, way) for name, way in INTERVAL_WRITERS.items()}},
            bench.options.rounds,
            bench.progress,
        )
    part.figures = [
        _pass_against(part, name, Target(at_least=50) if way == "statements" else None)
        for name, way in INTERVAL_WRITERS.items()
    ]
    return part


def measure_million(bench: Bench) -> Part:
    """How many live chats two reconcilers write in a period; whether there are a million is for ``--chats`` to say."""
    part = Part()
    for number in range(bench.options.rounds + 1):
        run = reconcile(bench.population, bench.folder, processes=RECONCILERS)
        if number:
            part.rounds.append({"two reconcilers": run})
        else:
            part.warm_up = {"two reconcilers": run}
        bench.progress.say(
            f"{f'round {number} of {bench.options.rounds}' if number else 'warm-up'}: {run['chats']:,} chats in"
            f" {run['elapsed_us'] / S_US:,.1f} s"
        )
    runs = [round_["two reconcilers"] for round_ in part.rounds]
    part.notes["limit"] = _limit(runs)
    peaks = [process["memory_peak_bytes"] / S_US for run in runs for process in run["processes"]]
    part.figures = [
        Figure(
            name=f"chats written in {PERIOD_S} s by two reconcilers, of {bench.population.users:,}",
            unit="chats",
            runs=[PERIOD_S * run["rate"] for run in runs],
            target=Target(at_least=1_000_000, aim=1_500_000),
            note=part.notes["limit"],
        ),
        Figure(name="memory of each of them", unit="MB", runs=peaks, target=Target(below=200)),
    ]
    return part


def _limit(runs: list[Run]) -> str:
    """Say what the cores did while reconcilers worked, their start included."""

    def share(of: Callable[[Run], int]) -> float:
        whole = ("cores_busy_us", "cores_waiting_for_disks_us", "cores_idle_us")
        return 100 * median([of(run) / max(1, sum(int(run[name]) for name in whole)) for run in runs])

    reconcilers = share(lambda run: sum(process["cpu_us"] for process in run["processes"]))
    busy = share(lambda run: run["cores_busy_us"])
    waiting = share(lambda run: run["cores_waiting_for_disks_us"])
    return (
        f"all cores: {reconcilers:.0f} % reconcilers, {max(0, busy - reconcilers):.0f} % PostgreSQL and the rest,"
        f" {waiting:.0f} % waiting for disks, {max(0, 100 - busy - waiting):.0f} % idle"
    )


def measure_history(bench: Bench) -> Part:
    """Readings and passes where there is a long history against where there is none, each a database of its own.

    Raises:
        BenchmarkFailed: there would be no segments.
    """
    users = min(bench.options.chats, HISTORY_USERS_MAX, bench.options.segments // OLD_CHATS)
    if users < 1:
        message = f"at least {OLD_CHATS} segments are needed"
        raise BenchmarkFailed(message)
    each = bench.options.segments // (users * OLD_CHATS)
    with contextlib.ExitStack() as stack:
        empty_url, long_url = (stack.enter_context(bench.server.database()) for _ in range(2))
        bench.progress.say(f"making {users:,} users with {OLD_CHATS} old chats of {each} segments each, and charges")
        empty = populate(empty_url, users)
        long = populate(long_url, users, old_chats=OLD_CHATS, segments_each=each)
        empty_api, long_api = (stack.enter_context(bench.api(population)) for population in (empty, long))
        part = alternate(
            {
                "reading, no history": bench.polling(empty_api, "reading, no history").run,
                "reading, history": bench.polling(long_api, "reading, history").run,
                "pass, no history": stack.enter_context(passing(bench, empty_url, "pass without history")),
                "pass, history": stack.enter_context(passing(bench, long_url, "pass with history")),
            },
            bench.options.rounds,
            bench.progress,
        )
        with connect(long_url) as connection:
            counts = connection.execute(
                "SELECT (SELECT count(*) FROM segment), (SELECT count(*) FROM ledger_entry),"
                " (SELECT count(*) FROM chat), pg_database_size(current_database())"
            ).fetchone()
    assert counts is not None
    part.notes |= dict(zip(("segments", "ledger_entries", "chats", "database_bytes"), counts, strict=True))
    part.notes["users"] = users
    part.figures = [
        Figure(
            name=f"{side}, with {counts[0]:,} closed segments",
            unit=unit,
            runs=part.rates(f"{side}, history"),
            baseline="without",
            baseline_runs=part.rates(f"{side}, no history"),
            target=Target(at_least=0.9),
        )
        for side, unit in (("reading", "/s"), ("pass", "chats/s"))
    ]
    return part
