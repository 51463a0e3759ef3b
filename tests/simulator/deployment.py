"""What is deployed over one database: API processes with their settings, and reconcilers; started, killed, replaced."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from signal import SIGKILL

from reconciler.sweep import Pass
from talktime.errors import DatabaseUnavailable
from tests.database import Clock
from tests.meter.histories import SCOPES, Settings
from tests.simulator.processes import Processes, Reconcilers
from tests.simulator.readings import seconds
from tests.simulator.service import KEY, PATIENCE_S, Api, differ

APIS = 2
LEASES_US = (2, 4, 20, 50)


class Deployment:
    """Two API processes and two reconcilers. Each API process has settings of its own, as in a rolling deployment."""

    def __init__(self, seed: int, *, url: str, processes: Processes, clock: Clock, totals: Counter[str]) -> None:
        self.log: deque[str] = deque(maxlen=40)
        self.clock = clock
        self.reconcilers = Reconcilers(url)
        self._url = url
        self._processes = processes
        self._totals = totals
        self._rng = random.Random(f"settings {seed}")  # of its own: how many processes there are depends on races
        self.apis = [self._new_api() for _ in range(APIS)]

    def cut(self) -> None:
        """Let all connections to the database be lost."""
        self._totals["cuts"] += 1
        self.clock.connection.execute(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'talktime'"
        )

    def audit(self) -> None:
        """Audit what is stored.

        Raises:
            Difference: something does not add up.
        """
        found = self.reconcilers.audit()
        if found:
            differ("the audit", "\n".join(found))

    def sweep_and_die(self, *, batch_accounts: int, die_at: int) -> int:
        """Begin a pass that dies at its so-many-th event, if it gets there; returns the process's id."""
        return self._processes.sweep(self._url, batch_accounts=batch_accounts, die_at=die_at)

    def end_of(self, passes: Sequence[Future[Pass]], *, may_fail: bool = False) -> None:
        """Wait until passes have ended.

        Raises:
            Difference: one failed, though it may not.
        """
        for one in passes:
            self._totals["passes"] += 1
            try:
                made = one.result(PATIENCE_S)
            except DatabaseUnavailable:
                if not may_fail:
                    raise
                continue
            if made.failed and not may_fail:
                differ("a reconciler", made)

    def end_of_doomed(self, pid: int, *, may_fail: bool = False) -> None:
        """Wait until a pass that was to die has ended, one way or the other."""
        code = self._processes.wait(pid)
        self._totals["passes"] += 1
        if code == -SIGKILL:
            self._totals["killed reconcilers"] += 1
        elif code != 0 and not may_fail:
            differ("a reconciler", f"exit code {code}")
        self.settle()

    def _new_api(self) -> Api:
        rng = self._rng
        lease_us = rng.choice(LEASES_US)
        settings = Settings(rng.choice(SCOPES), lease_us, lease_us + rng.choice((1, 10, 60)))
        variables = {
            "TALKTIME_SERVICE_KEY": KEY,
            "TALKTIME_EXCLUSIVE": settings.scope,
            "TALKTIME_LEASE_SECONDS": seconds(settings.lease_us),
            "TALKTIME_HEARTBEAT_SECONDS": seconds(1),
            "TALKTIME_ABANDON_AFTER_SECONDS": seconds(settings.abandon_after_us),
        }
        api = Api(*self._processes.serve(self._url, variables), settings)
        self.log.append(f"    new API process {api.pid}: {settings}")
        return api

    def replace(self, place: int) -> None:
        """Replace an API process, dead or alive, by another one."""
        self.apis[place].close()
        self._processes.kill(self.apis[place].pid)
        self.apis[place] = self._new_api()

    def bury(self, dead: set[int], doomed: set[int]) -> None:
        """Replace API processes that died, which only doomed ones may."""
        for place, api in enumerate(self.apis):
            if api.pid in dead:
                if api.pid not in doomed:
                    differ(f"API process {api.pid}", "died by itself")
                self._totals["killed APIs"] += 1
                self.replace(place)
        if dead:
            self.settle()

    def settle(self) -> None:
        """Wait until the database has rolled back what dead processes were at."""
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'talktime' AND state <> 'idle'"
        )
        patient_until = time.monotonic() + PATIENCE_S
        while self.clock.connection.execute(query).fetchone() != (0,):
            if time.monotonic() > patient_until:
                differ("the database", "it goes on with what dead processes began")
            time.sleep(0.002)

    def close(self) -> None:
        """End what runs."""
        for api in self.apis:
            api.close()
        try:
            self._processes.kill_all()
        finally:
            self.reconcilers.close()
