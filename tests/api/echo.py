"""A page that says what it heard, and one that waits until a test lets it go on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from litestar import Request, get, post, route

from tests.api.requests import Json


@dataclass
class Echo:
    """The pages, and what they were asked, in order."""

    heard: list[str] = field(default_factory=list)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    def pages(self) -> list[Any]:
        return [self._echo(), self._waiting(), self._unread()]

    def _echo(self) -> Any:  # noqa: ANN401 - Litestar's type of a decorated function
        @route("/echo", http_method=["GET", "POST", "HEAD"], include_in_schema=False, status_code=200)
        async def echo(request: Request[Any, Any, Any]) -> Json:
            body = (await request.body()).decode("latin-1")
            self.heard.append(f"{request.method} {request.url.query}")
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.scope["headers"]]
            return {"method": request.method, "query": request.url.query, "headers": headers, "body": body}

        return echo

    def _waiting(self) -> Any:  # noqa: ANN401 - as above
        @get("/waiting", include_in_schema=False)
        async def waiting() -> str:
            self.heard.append("waiting")
            await self.goes_on.wait()
            return "went on"

        return waiting

    def _unread(self) -> Any:  # noqa: ANN401 - as above
        @post("/unread", include_in_schema=False, status_code=200)
        async def unread() -> str:
            return "not read"

        return unread
