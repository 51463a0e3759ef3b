"""Counts and durations of requests, for Prometheus.

This is Litestar's plugin with two differences: the meters live in a registry of the application, so that several
applications fit in one process, and a request looks its meters up once instead of building their labels six times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from litestar.enums import ScopeType
from litestar.plugins.prometheus import PrometheusConfig, PrometheusMiddleware
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

_PREFIX = "talktime"
_LABELS = ("method", "path", "status_code")


class Meters:
    """The meters of one application, under the names that Litestar's plugin would give them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.in_progress = 0  # of one event loop's requests, so a number will do
        being_served = Gauge(f"{_PREFIX}_requests_in_progress", "Requests being served now", registry=self.registry)
        being_served.set_function(lambda: self.in_progress)
        self._requests = Counter(f"{_PREFIX}_requests", "Requests served", _LABELS, registry=self.registry)
        self._seconds = Histogram(
            f"{_PREFIX}_request_duration_seconds",
            "How long requests took",
            _LABELS,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
            registry=self.registry,
        )
        self._found: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        labels = (method, path, status)
        found = self._found.get(labels)
        if found is None:
            found = self._found[labels] = (self._requests.labels(*labels), self._seconds.labels(*labels))
        counter, histogram = found
        counter.inc()
        histogram.observe(seconds)


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
