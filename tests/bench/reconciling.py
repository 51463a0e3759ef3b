"""Reconcilers as they are run by users: ``python -m reconciler``, one or several at once, until all is written."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tests.bench.population import Population
from tests.bench.programs import Cores, Program, cpu_us, memory_bytes, module, started
from tests.bench.rounds import Run, per_second
from tests.bench.service import url_environment
from tests.database import connect

LOOK_AGAIN_S = 0.02

# What the passes themselves recorded: when they began, by the database's clock, and how long they took.
_PASSES = """
SELECT (extract(epoch FROM began_at - %(since)s) * 1000000)::bigint, took_us, accounts, chats, failed
FROM reconciler_pass WHERE began_at >= %(since)s ORDER BY began_at
"""
_COLUMNS = ("began_us", "took_us", "accounts", "chats", "failed")
_LEFT = "SELECT count(*) FROM account WHERE due_at IS NOT NULL AND materialized_through < %(since)s"


def reconcile(population: Population, folder: Path, *, processes: int) -> Run:
    """Let so many reconcilers make a pass each over all chats, at once.

    The time runs from when the first of the passes began to when the last of them was done, without the starting of the
    programs: those that repeat start once. One that began later writes again what another one had written by then.

    Raises:
        BenchmarkFailed: one of them ended badly, or they left something to do.
    """
    with connect(population.url) as connection, contextlib.ExitStack() as stack:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        since = {"since": row[0]}
        cores = Cores.now()
        began = time.perf_counter_ns()
        environment = url_environment(population.url)
        programs = [
            stack.enter_context(
                started(f"reconciler {n}", *module("reconciler"), folder=folder, environment=environment)
            )
            for n in range(processes)
        ]
        ended = watched(programs)
        with_start_us = (time.perf_counter_ns() - began) // 1000
        used = Cores.now().since(cores)
        passes = [dict(zip(_COLUMNS, found, strict=True)) for found in connection.execute(_PASSES, since).fetchall()]
        left = connection.execute(_LEFT, since).fetchone()
    for program, process in zip(programs, ended, strict=True):
        if process["exit_code"]:
            program.fail(f"ended with {process['exit_code']}")
    if left is None or left[0] or len(passes) != processes:
        programs[0].fail(f"and others left accounts {left}, and recorded {len(passes)} passes")
    first = min(found["began_us"] for found in passes)
    elapsed_us = max(found["began_us"] + found["took_us"] for found in passes) - first
    return {
        "rate": per_second(population.users, elapsed_us),
        "chats": population.users,
        "elapsed_us": elapsed_us,
        "elapsed_with_start_us": with_start_us,
        "passes": passes,
        "processes": ended,
        **used,
    }


def watched(programs: list[Program]) -> list[Run]:
    """Wait until programs have ended, and return for each its exit code, most memory, and time of computing."""
    seen: list[Run] = [{"exit_code": None, "memory_peak_bytes": 0, "cpu_us": 0} for _ in programs]
    while any(run["exit_code"] is None for run in seen):
        for program, run in zip(programs, seen, strict=True):
            if run["exit_code"] is None:
                run["memory_peak_bytes"] = max(run["memory_peak_bytes"], memory_bytes(program.pid))
                run["cpu_us"] = max(run["cpu_us"], cpu_us(program.pid))
                run["exit_code"] = program.process.poll()
        time.sleep(LOOK_AGAIN_S)
    return seen
