"""Histories run to their end: one, or many in several processes."""

from __future__ import annotations

import atexit
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from itertools import islice

from sqlalchemy.engine import URL

from tests.database import Databases, connect, simulated_clock
from tests.simulator.history import History
from tests.simulator.processes import Processes


class Failure(Exception):
    """A history in which the service showed what it must not; how to repeat it, and its last steps."""


def run_history(databases: Databases, processes: Processes, seed: int, steps: int) -> Counter[str]:
    """Run one history on a database of its own; returns what it did, counted.

    Raises:
        Failure: service and reference differ.
    """
    url = databases.create()
    try:
        with simulated_clock(url) as clock:
            history = History(seed, url=url.render_as_string(hide_password=False), processes=processes, clock=clock)
            try:
                history.begin()
                for _ in range(steps):
                    history.step()
                history.end()
            except Exception as error:  # whatever it is, it must be told how to repeat it
                log = "\n".join(history.log)
                command = f"uv run python -m tests.simulator --first {seed} --histories 1 --steps {steps}"
                where = f"history {seed}, step {history.totals['steps']}"
                message = f"{log}\n\n{where}: {type(error).__name__}: {error}\n\nto repeat it: {command}"
                raise Failure(message) from error
            finally:
                history.close()
            history.totals["histories"] += 1
            return history.totals
    finally:
        databases.drop(url)


def run_histories(databases: Databases, seeds: range, steps: int, *, at_once: int) -> Iterator[Counter[str]]:
    """Run many histories, several at once; yields what each did.

    Raises:
        Failure: service and reference differ in one of them; the others are given up.
    """
    waiting = iter(seeds)
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        running: set[Future[Counter[str]]] = set()
        try:
            while True:
                for seed in islice(waiting, at_once - len(running)):
                    running.add(pool.submit(_run_elsewhere, databases.server, databases.prefix, seed, steps))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@cache
def _own_processes() -> Processes:
    processes = Processes()
    atexit.register(processes.close)
    return processes


def _run_elsewhere(server: URL, prefix: str, seed: int, steps: int) -> Counter[str]:
    with connect(server) as admin:
        return run_history(Databases(server, admin, prefix, iter([seed])), _own_processes(), seed, steps)
