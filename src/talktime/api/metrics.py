"""What is seen from outside, for Prometheus: requests, batches and the pool of this process, and the whole's state.

Requests are measured as by Litestar's plugin, with two differences: the meters live in a registry of the application,
so that several applications fit in one process, and a request looks its meters up once instead of building their labels
six times.

Where `PROMETHEUS_MULTIPROC_DIR` names a folder, prometheus_client keeps the meters in files there, and each of the
processes that share it answers for all of them. What is read from the database is that of all processes anyhow.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from litestar.enums import ScopeType
from litestar.plugins.prometheus import PrometheusConfig, PrometheusMiddleware
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from talktime.api.requests import log_request

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

    from talktime.operations import Service

_PREFIX = "talktime"
_LABELS = ("method", "path", "status_code")
_LOOK_EVERY_S = 1
_FOLDER = os.environ.get("PROMETHEUS_MULTIPROC_DIR")


class Meters:
    """The meters of one application; those of requests under the names that Litestar's plugin would give them."""

    def __init__(self, *, log_requests: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.in_progress = 0  # of one event loop's requests, so a number will do
        self._log_requests = log_requests
        self._found: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        if _FOLDER is None:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
        self._requests = Counter(f"{_PREFIX}_requests", "Requests served", _LABELS, registry=self.registry)
        self._seconds = Histogram(
            f"{_PREFIX}_request_duration_seconds",
            "How long requests took",
            _LABELS,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
            registry=self.registry,
        )
        unanswered = Counter(
            f"{_PREFIX}_requests_unanswered",
            "Requests turned away with 503 because they took too long, there were too many connections, or all ended",
            registry=self.registry,
        )
        self.turned_away = unanswered.inc
        self._sizes = Histogram(
            f"{_PREFIX}_batch_size",
            "Chats that shared a statement (readings, heartbeats), or a request (many_heartbeats)",
            ("batch",),
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000),
            registry=self.registry,
        )
        self._in_progress = self._gauge("requests_in_progress", "Requests being served now")
        self._pool_size = self._gauge("pool_connections_max", "Connections that the pool has at most")
        self._pool_in_use = self._gauge("pool_connections_in_use", "Connections of the pool that are in use")
        self._pool_waiting = self._gauge("pool_waiting", "Commands and queries that wait for a connection of the pool")
        self._batch_waiting = self._gauge("batch_waiting", "Requests that wait in a batch, or for it", ("batch",))

    def _gauge(self, name: str, help_: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", help_, labels, registry=self.registry, multiprocess_mode="livesum")

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        labels = (method, path, status)
        found = self._found.get(labels)
        if found is None:
            found = self._found[labels] = (self._requests.labels(*labels), self._seconds.labels(*labels))
        counter, histogram = found
        counter.inc()
        histogram.observe(seconds)
        if self._log_requests:
            log_request(method, path, status, seconds)

    def watch(self, service: Service) -> None:
        """Measure the batches of a service from now on."""
        for name, batcher in service.batchers.items():
            batcher.observe = self._sizes.labels(name).observe
        self.observe_many = self._sizes.labels("many_heartbeats").observe

    def look(self, service: Service) -> None:
        """Take how things stand in this process now."""
        pool = service.database.pool
        self._in_progress.set(self.in_progress)
        self._pool_size.set(pool.size)
        self._pool_in_use.set(pool.in_use)
        self._pool_waiting.set(pool.waiting)
        for name, batcher in service.batchers.items():
            self._batch_waiting.labels(name).set(batcher.waiting)

    def exposition(self) -> bytes:
        """Return the meters in Prometheus' text format: those of all processes that share a folder, else this one's."""
        if _FOLDER is None:
            return generate_latest(self.registry)
        of_all = CollectorRegistry()
        MultiProcessCollector(of_all)  # type: ignore[no-untyped-call] # as below
        return generate_latest(of_all)


@asynccontextmanager
async def looked_at(meters: Meters, service: Service) -> AsyncIterator[None]:
    """Let the other processes of the folder see how things stand in this one, as long as it serves."""
    if _FOLDER is None:  # then whoever asks looks himself
        yield
        return
    _forget_dead_processes(_FOLDER)

    async def look() -> None:
        while True:
            meters.look(service)
            await asyncio.sleep(_LOOK_EVERY_S)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        mark_process_dead(os.getpid())  # type: ignore[no-untyped-call] # it has no types


def _forget_dead_processes(folder: str) -> None:
    """Forget what processes that were killed had in progress; what they counted stays counted."""
    for path in Path(folder).glob("gauge_live*_*.db"):
        if not Path("/proc", path.stem.rpartition("_")[2]).exists():
            path.unlink(missing_ok=True)


class MetricsMiddleware(PrometheusMiddleware):
    """Measures each request that has a route, by the route's path: ids would make labels without end."""

    def __init__(self, app: ASGIApp, config: MetricsConfig) -> None:
        super().__init__(app, config)
        self._meters = config.meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and measure it."""
        status = 500
        began = perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._meters.in_progress += 1
        try:
            await self.app(scope, receive, watch)
        finally:
            self._meters.in_progress -= 1
            if scope["type"] == ScopeType.HTTP:
                self._meters.observe(scope["method"], scope["path_template"], status, perf_counter() - began)


@dataclass
class MetricsConfig(PrometheusConfig):
    """Configures Litestar's plugin for one application."""

    prefix: str = _PREFIX
    group_path: bool = True
    middleware_class: type[PrometheusMiddleware] = MetricsMiddleware
    meters: Meters = field(default_factory=Meters)
