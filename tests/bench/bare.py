"""The framework's bare route, as a program: ``python -m tests.bench.bare``, told what to answer by a line of JSON.

The same server, in a process that is run as the API is, answers the same path with the bytes of one reading, always
the same ones: no credential is looked at, nothing is counted, validated, computed or made into JSON.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Annotated

from litestar import Litestar, get
from litestar.params import PathParameter

from talktime.api.connections import Server
from talktime.process import run_until_signalled

WAITING_MAX = 2048
CONNECTIONS_MAX = 10_000


def bare_app(answer: bytes) -> Litestar:
    """Return an application with a single route."""

    @get("/v1/users/{user_id:str}/chats/{chat_id:str}", media_type="application/json")
    async def constant(user_id: Annotated[str, PathParameter()], chat_id: Annotated[str, PathParameter()]) -> bytes:
        return answer

    return Litestar([constant], openapi_config=None, logging_config=None)


async def _serve(answer: bytes, stop: asyncio.Event) -> None:
    # With the protocol named, as the API does: asyncio turns off Nagle's algorithm only then.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(WAITING_MAX)
        server = Server(bare_app(answer), connections_max=CONNECTIONS_MAX)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listens.wait()
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await stop.wait()
        server.should_exit = True
        await serving


def main() -> int:
    """Serve until a signal comes."""
    answer = json.loads(sys.stdin.readline())["answer"].encode()
    run_until_signalled(lambda stop: _serve(answer, stop))
    return 0


if __name__ == "__main__":
    sys.exit(main())
