"""What the database tells of the whole, for Prometheus: the same from every process, and of passes made by cron too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from talktime.errors import DatabaseUnavailable
from talktime.meter.units import MICRO
from talktime.operating import Outside, from_outside

if TYPE_CHECKING:
    from talktime.store.database import Database
    from talktime.store.operators import RecordedAudit, RecordedPass

log = logging.getLogger(__name__)

KEPT_S = 5.0
"""Whoever asks within this time is told the same, and the database is not asked."""
PATIENCE_S = 5.0


class OutsideMeters:
    """What was seen last, asked for by whoever looks, once at a time. Where there is no answer, that is all it says."""

    def __init__(self) -> None:
        self._seen: Outside | None = None
        self._until = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def exposition(self, database: Database) -> bytes:
        """Return it in Prometheus' text format."""
        if asyncio.get_running_loop().time() >= self._until:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(database))
            done, _ = await asyncio.wait([self._asking], timeout=PATIENCE_S)
            if not done:
                self._seen = None
        registry = CollectorRegistry()
        registry.register(_Families(self._seen))
        return generate_latest(registry)

    async def _ask(self, database: Database) -> None:
        try:
            self._seen = await from_outside(database)
        except DatabaseUnavailable:
            self._seen = None
        except Exception:
            log.exception("what is to be seen from outside could not be read")
            self._seen = None
        self._until = asyncio.get_running_loop().time() + KEPT_S


class _Families:
    def __init__(self, seen: Outside | None) -> None:
        self._seen = seen

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield _gauge("database_up", "Whether the database has answered this look", self._seen is not None)
        if self._seen is not None:
            yield from _waiting(self._seen)
            yield from _passes(self._seen.last_pass, self._seen.last_success)
            yield from _audit(self._seen.last_audit)


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"talktime_{name}", help_, value=value)


def _waiting(seen: Outside) -> Iterator[GaugeMetricFamily]:
    waiting = seen.waiting
    yield _gauge("reconcile_lag_seconds", "For how long the oldest work due waits for a pass", waiting.lag_us / MICRO)
    unmaterialized_s = waiting.unmaterialized_us / MICRO
    yield _gauge("unmaterialized_seconds", "Time that no pass has written yet, over all accounts", unmaterialized_s)
    behind_s = waiting.ahead_us / MICRO
    yield _gauge("clock_behind_seconds", "How far the database's clock is behind what was written", behind_s)
    yield _gauge("events_waiting", "Events that are to be sent to the webhook", waiting.events)
    yield _gauge("events_lag_seconds", "For how long the oldest of them waits", waiting.events_us / MICRO)
    yield _gauge("events_dead", "Events that are not sent any more until an operator says so", waiting.dead_events)


def _passes(last: RecordedPass | None, success: RecordedPass | None) -> Iterator[GaugeMetricFamily]:
    name, help_ = "reconciler_last_pass_timestamp_seconds", "When the last pass ended; 0 if none did in a day"
    yield _gauge(name, help_, _ended(last))
    name = "reconciler_last_success_timestamp_seconds"
    yield _gauge(
        name, "When the last pass ended that could write every account; 0 if none did in a day", _ended(success)
    )
    if last is not None:
        yield _gauge("reconciler_last_pass_duration_seconds", "How long the last pass took", last.took_us / MICRO)
        yield _gauge("reconciler_last_pass_accounts", "Accounts that the last pass wrote", last.accounts)
        yield _gauge("reconciler_last_pass_chats", "Chats that the last pass wrote", last.chats)
        yield _gauge("reconciler_last_pass_failed_accounts", "Accounts that the last pass could not write", last.failed)


def _ended(made: RecordedPass | None) -> float:
    return 0.0 if made is None else (made.began_at + made.took_us) / MICRO


def _audit(last: RecordedAudit | None) -> Iterator[GaugeMetricFamily]:
    ended_s = 0.0 if last is None else last.ended_at / MICRO
    yield _gauge("audit_timestamp_seconds", "When the last audit got to its end; 0 if none did in a year", ended_s)
    if last is not None:
        yield _gauge("audit_duration_seconds", "How long the last audit took", last.took_us / MICRO)
        yield _gauge("audit_accounts", "Accounts that the last audit checked", last.accounts)
        yield _gauge("audit_differing_accounts", "Accounts in which the last audit found a difference", last.differing)
        yield _gauge("audit_differences", "Differences that the last audit found", last.differences)
