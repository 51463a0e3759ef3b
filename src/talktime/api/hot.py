"""The requests that pages send all the time, served without the steps that a framework takes for any request.

Of all that Litestar does for a request a reading needs little, and the rest takes longer than the reading. So a
request for a hot route that is plain in every respect goes straight to the route's own handler: through the same gate
and the same checks, and counted by the same meters. Every other request is Litestar's, and so is every answer but a
reading: what is raised here is raised again there, and its exception handlers answer.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from litestar.enums import ScopeType
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from talktime.api.bodies import ApiRequest, says_no_body
from talktime.api.headers import complete, completing, encode_headers
from talktime.api.requests import begin_request, id_header
from talktime.api.schemas import JSON, ReadyAnswer, encoded

if TYPE_CHECKING:
    from litestar import Litestar
    from litestar.types import HTTPScope, Receive, Scope, Send

    from talktime.api.metrics import Meters

_CHAT = "/v1/users/{user_id}/chats/{chat_id}"
_PATH = re.compile(r"/v1/users/([^/]+)/chats/([^/]+)(/heartbeat)?")
_ROUTES = (("GET", None, _CHAT), ("POST", "/heartbeat", f"{_CHAT}/heartbeat"))

_HOST = re.compile(rb"[a-z0-9.-]+(:\d{1,5})?|\[[0-9a-f:.]+\](:\d{1,5})?", re.IGNORECASE)
_UNUSUAL = frozenset({b"origin", b"expect", b"upgrade"})
_FAILED = "talktime.failed"


class _Hot(NamedTuple):
    """A hot route: its handler, what goes before it, its path as meters name it, and the headers of its answers."""

    handler: HTTPRouteHandler
    enter: Callable[[ApiRequest], Awaitable[object]]
    template: str
    headers: list[tuple[bytes, bytes]]


class HotRoutes:
    """An application that serves the hot routes of another one, and leaves to that one what it does not serve."""

    def __init__(self, app: Litestar, meters: Meters) -> None:
        self.framework = completing(app.asgi_handler)
        self._meters = meters
        routes = {route.path_format: route for route in app.routes if isinstance(route, HTTPRoute)}
        self._hot = {(method, ending): _hot(routes[template], method) for method, ending, template in _ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == ScopeType.HTTP:
            begin_request(scope)
            if _is_plain(scope):
                match = _PATH.fullmatch(scope["path"])
                hot = self._hot.get((scope["method"], match[3])) if match else None
                if match and hot:
                    await self._serve(hot, {"user_id": match[1], "chat_id": match[2]}, scope, receive, send)
                    return
        await self.framework(scope, receive, send)

    async def _serve(self, hot: _Hot, ids: dict[str, str], scope: HTTPScope, receive: Receive, send: Send) -> None:
        began = perf_counter()
        scope["path_params"] = ids
        scope["route_handler"] = hot.handler
        scope["path_template"] = hot.template
        request = ApiRequest(scope, receive, send)
        self._meters.in_progress += 1
        try:
            await hot.enter(request)
            content = await hot.handler.fn(request, **ids)
        except Exception as error:  # noqa: BLE001 - it is raised again where all errors are answered
            scope["state"][_FAILED] = error
        finally:
            self._meters.in_progress -= 1
        if _FAILED in scope["state"]:
            await self.framework(scope, receive, send)
            return
        try:
            headers = [*hot.headers, id_header(scope)]
            await ReadyAnswer(hot.handler.status_code, headers, encoded(content))(scope, receive, send)
        finally:
            self._meters.observe(scope["method"], hot.template, hot.handler.status_code, perf_counter() - began)


def raise_if_failed(scope: Scope) -> None:
    """Raise again what this request raised as that of a hot route."""
    error = scope["state"].get(_FAILED)
    if error is not None:
        raise cast("Exception", error)


def _hot(route: HTTPRoute, method: str) -> _Hot:
    handler = route.route_handler_map[cast("Any", method)][0]
    named = {header.name: str(header.value) for header in handler.resolve_response_headers()}
    headers = encode_headers({"Content-Type": JSON, **named})
    headers += complete(headers)
    return _Hot(handler, cast("Any", handler.resolve_before_request()), route.path_format, headers)


def _is_plain(scope: Scope) -> bool:
    """Tell whether there is nothing in the head of a request that the framework would have to look at."""
    if scope["query_string"] or scope.get("root_path"):
        return False
    hosts = 0
    for name, value in scope["headers"]:
        if name == b"host":
            hosts += 1
            if _HOST.fullmatch(value) is None:
                return False
        elif name in _UNUSUAL:
            return False
    return hosts == 1 and says_no_body(scope["headers"])
