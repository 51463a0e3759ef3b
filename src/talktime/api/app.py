"""The application: its routes, what goes around requests, and the lifetime of its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from litestar import Litestar, Request, Response, get
from litestar.config.cors import CORSConfig
from litestar.datastructures import ResponseHeader, State
from litestar.exceptions import HTTPException
from prometheus_client import CONTENT_TYPE_LATEST

from talktime import operations
from talktime.api.auth import Gate
from talktime.api.bodies import BODY_BYTES_MAX, ApiRequest
from talktime.api.docs import SCHEMA_PLUGIN, openapi_config, problems
from talktime.api.hot import HotRoutes
from talktime.api.keyring import KeyRing
from talktime.api.limits import Limits
from talktime.api.metrics import Meters, MetricsConfig, looked_at
from talktime.api.outside import OutsideMeters
from talktime.api.params import IDEMPOTENCY_KEY, check_path
from talktime.api.problems import (
    Refusal,
    answer_domain_error,
    answer_framework_error,
    answer_refusal,
    answer_unexpected,
)
from talktime.api.requests import HEADER as REQUEST_ID
from talktime.api.router import v1_router
from talktime.api.schemas import Health, JsonResponse
from talktime.api.tokens import Tokens
from talktime.errors import DatabaseUnavailable, TalktimeError
from talktime.keys import active_keys
from talktime.operations import Service
from talktime.settings import Settings
from talktime.store.database import Database

PREFLIGHT_SECONDS = 600


def create_app(settings: Settings, open_database: Callable[[], Database], *, pages: Sequence[Any] = ()) -> Litestar:
    """Make the application, with `pages` as further route handlers.

    It opens the database when it starts and closes it when it shuts down. A database that cannot be reached does not
    keep it from starting: requests are answered with 503 until it can.

    Raises:
        SettingError: the keys for tokens cannot be used.
    """

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        service = Service(
            database=open_database(), policy=settings.policy, default_card=settings.default_card, low_us=settings.low_us
        )
        app.state["service"] = service
        metrics.meters.watch(service)
        try:
            async with looked_at(metrics.meters, service):
                yield
        finally:
            await service.close()

    async def load_keys() -> dict[bytes, str]:
        return await active_keys(cast("Service", app.state["service"]).database)

    gate = Gate(
        KeyRing(settings.service_key, load_keys),
        None if settings.tokens is None else Tokens(settings.tokens),
        settings.user_may,
        Limits(settings.limits),
    )
    metrics = MetricsConfig(meters=Meters(log_requests=settings.log_requests))

    def answer_unrouted(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
        """Answer Litestar's own errors. Which paths there are is no secret; /schema lists them."""
        if "route_handler" not in request.scope and request.scope["path"].startswith("/v1/"):
            try:
                check_path(request)
            except Refusal as refusal:
                return answer_refusal(request, refusal)
        return answer_framework_error(request, error)

    app = Litestar(
        route_handlers=[v1_router(gate), livez, readyz, metrics_page, *pages],
        lifespan=[lifespan],
        state=State(
            {
                "gate": gate,
                "heartbeat_us": settings.heartbeat_us,
                "meters": metrics.meters,
                "outside": OutsideMeters(),
            }
        ),
        middleware=[metrics.middleware],
        request_class=ApiRequest,
        request_max_body_size=BODY_BYTES_MAX,
        exception_handlers={
            Refusal: answer_refusal,
            TalktimeError: answer_domain_error,
            HTTPException: answer_unrouted,
            Exception: answer_unexpected,
        },
        openapi_config=openapi_config(),
        plugins=[SCHEMA_PLUGIN],
        # Litestar's logging would reconfigure the root logger of whoever made the application; and its debug pages,
        # which the environment can switch on, show a stranger the code.
        logging_config=None,
        debug=False,
        pdb_on_exception=False,
        **_cors(settings.cors_origins),
    )
    app.asgi_handler = HotRoutes(app, metrics.meters)
    return app


def _cors(origins: Sequence[str]) -> dict[str, Any]:
    """Let pages of these origins call: with a token in a header, never with cookies."""
    if not origins:
        return {}
    config = CORSConfig(
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "PUT"],
        allow_headers=["Authorization", "Content-Type", IDEMPOTENCY_KEY, REQUEST_ID],
        expose_headers=["Retry-After", "WWW-Authenticate", REQUEST_ID],
        max_age=PREFLIGHT_SECONDS,
    )
    # Also where no origin was sent: such an answer must not be kept for a page of another origin.
    return {"cors_config": config, "response_headers": [ResponseHeader(name="Vary", value="Origin")]}


@get(
    "/livez",
    summary="Is the process alive?",
    description="Always, if it answers at all.",
    tags=["operations"],
    response_class=JsonResponse,
)
async def livez() -> Health:
    """Tell that the process is alive."""
    return Health("alive")


@get(
    "/readyz",
    summary="Can requests be served?",
    description="Asks the database.",
    tags=["operations"],
    response_class=JsonResponse,
    responses=problems(DatabaseUnavailable),
)
async def readyz(request: ApiRequest) -> Health:
    """Tell whether requests can be served."""
    # Anybody may ask, as often as he likes; the database is asked once at a time.
    state = request.app.state
    asking: asyncio.Task[None] | None = state.get("asking")
    if asking is None or asking.done():
        asking = state["asking"] = asyncio.create_task(operations.ready(cast("Service", state["service"])))
    await asyncio.shield(asking)
    return Health("ready")


@get("/metrics", include_in_schema=False)
async def metrics_page(request: ApiRequest) -> Response[bytes]:
    """Return the meters of the processes, and what the database tells of the whole, in Prometheus' text format."""
    state = request.app.state
    service, meters = cast("Service", state["service"]), cast("Meters", state["meters"])
    meters.look(service)
    whole = await cast("OutsideMeters", state["outside"]).exposition(service.database)
    own = await asyncio.to_thread(meters.exposition)
    return Response(own + whole, headers={"Content-Type": CONTENT_TYPE_LATEST})
