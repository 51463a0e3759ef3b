"""The routes under /v1, behind their gate."""

from __future__ import annotations

import re
from typing import Any

from litestar import Request, Response, Router
from litestar.datastructures import CacheControlHeader

from talktime.api import routes
from talktime.api.auth import SECURITY_SCHEME, Gate
from talktime.api.bodies import check_no_body
from talktime.api.hot import raise_if_failed
from talktime.api.params import check_request
from talktime.api.schemas import JsonResponse

HANDLERS: list[Any] = [
    routes.put_advisor,
    routes.get_advisor,
    routes.post_credit,
    routes.get_account,
    routes.get_ledger,
    routes.start,
    routes.heartbeat,
    routes.heartbeats,
    routes.pause,
    routes.stop,
    routes.get_chat,
    routes.get_chats,
    routes.get_segments,
]


def v1_router(gate: Gate) -> Router:
    """Return the routes under /v1 behind their gate."""
    methods: dict[str, set[str]] = {}
    for handler in HANDLERS:
        for path in handler.paths:
            methods.setdefault(re.sub(r":\w+}", "}", f"/v1{path}"), {"OPTIONS"}).update(handler.http_methods)
    allowed = {path: ", ".join(sorted(found)) for path, found in methods.items()}

    # Not a guard: Litestar copies the whole handler for each guard, a sixth of the time that a reading takes here. A
    # handler with a `before_request` of its own would go past the gate; a test asks each route for its 401.
    async def enter(request: Request[Any, Any, Any]) -> Response[None] | None:
        raise_if_failed(request.scope)
        await gate.admit(request)
        check_request(request)
        if request.method == "OPTIONS":
            # Litestar's own answer forgets all methods of a path but those of its first handler.
            return Response(None, status_code=204, headers={"Allow": allowed[request.scope["path_template"]]})
        if request.method == "POST" and "body" not in request.route_handler.opt:
            await check_no_body(request)
        return None

    return Router(
        path="/v1",
        route_handlers=HANDLERS,
        before_request=enter,
        cache_control=CacheControlHeader(no_store=True),
        response_class=JsonResponse,
        security=[{SECURITY_SCHEME: []}],
    )
