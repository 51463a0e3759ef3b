"""What an answer costs before there is anything to say: ``python -m tests.bench.bare``, told by a line of JSON.

The API's own server (`talktime.api.connections.Server`), in a process that is run as the API is, answers with the bytes
of one reading, always the same ones: no credential is looked at, nothing is counted, validated, computed or made into
JSON. There are two such programs:

- the framework's bare route: Litestar finds the route of the path, and makes the answer. Readings of the API do not go
  through these steps (`talktime.api.hot`), so this is what a reading is compared with, and not the least it can cost.
- the server alone: an ASGI application of a few lines that gives these bytes to whoever asks anything. Nothing that
  this server carries can be faster.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

from litestar import Litestar, get
from litestar.enums import ScopeType
from litestar.params import PathParameter
from litestar.types import ASGIApp, Receive, Scope, Send

from talktime.api.connections import Server
from talktime.process import run_until_signalled

WAITING_MAX = 2048
CONNECTIONS_MAX = 10_000


def framework_app(answer: bytes) -> ASGIApp:
    """Return an application of the framework with a single route."""

    @get("/v1/users/{user_id:str}/chats/{chat_id:str}", media_type="application/json")
    async def constant(user_id: Annotated[str, PathParameter()], chat_id: Annotated[str, PathParameter()]) -> bytes:
        return answer

    return Litestar([constant], openapi_config=None, logging_config=None)


def raw_app(answer: bytes) -> ASGIApp:
    """Return an application without a framework."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]

    async def constant(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer, "more_body": False})

    return constant


APPS: Mapping[str, Callable[[bytes], ASGIApp]] = {"bare route": framework_app, "server alone": raw_app}


async def _serve(app: ASGIApp, stop: asyncio.Event) -> None:
    # With the protocol named, as the API does: asyncio turns off Nagle's algorithm only then.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(WAITING_MAX)
        server = Server(app, connections_max=CONNECTIONS_MAX)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listens.wait()
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await stop.wait()
        server.should_exit = True
        await serving


def main() -> int:
    """Serve until a signal comes."""
    told = json.loads(sys.stdin.readline())
    app = APPS[told["app"]](told["answer"].encode())
    run_until_signalled(lambda stop: _serve(app, stop))
    return 0


if __name__ == "__main__":
    sys.exit(main())
