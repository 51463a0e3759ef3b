"""The application on a real socket, in the event loop of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

from httpx import AsyncClient, Response
from sqlalchemy.engine import URL

from talktime.api.app import create_app
from talktime.api.connections import Server
from talktime.settings import load_settings
from talktime.store.database import Database
from tests.api.requests import AUTH, KEY, UNLIMITED, Json

ANSWER_SECONDS_MAX = 30


@contextlib.asynccontextmanager
async def serving(url: URL, *, pages: Sequence[Any] = (), **variables: str) -> AsyncIterator[AsyncClient]:
    """Serve the application over a database and yield a client with the service key.

    The settings are those of an environment that holds the service key, no limits of requests, these variables and
    nothing else.
    """
    settings = load_settings({"TALKTIME_SERVICE_KEY": KEY, **UNLIMITED, **variables})
    app = create_app(settings, lambda: Database(url), pages=pages)
    turned_away = app.state["meters"].turned_away
    server = Server(app, connections_max=settings.connections_max, turned_away=turned_away)
    # With the protocol named, as the command does: asyncio turns off Nagle's algorithm only then.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await server.listens.wait()
        async with AsyncClient(base_url=origin, headers=AUTH, timeout=ANSWER_SECONDS_MAX, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        await task
        listener.close()


def json_of(response: Response, status: int = 200) -> Json:
    """Check that this is a success of that status, and return its JSON."""
    assert (status, "application/json") == (response.status_code, response.headers["content-type"]), response.text
    assert "no-store" == response.headers["cache-control"]
    return response.json()
