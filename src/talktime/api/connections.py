"""How the API is served: how long a client may take, how long an answer, and how many connections there may be.

uvicorn bounds how long a connection may be idle, and nothing else: a client that sends a byte now and then, or does
not read its answer, would hold its connection for ever. So every connection is looked at once a second, and cut if
what it is busy with has taken too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from talktime.api.framing import OneAtATime
from talktime.api.problems import UNAVAILABLE, RawProblem, raw_problem
from talktime.api.requests import id_header

HEAD_SECONDS_MAX = 10
"""From the first byte of a request, or from the beginning of the connection, to the end of its headers."""
EXCHANGE_SECONDS_MAX = 60
"""From there until the client has sent its body and taken its answer. Bodies have a limit of their own."""
ANSWER_SECONDS_MAX = 12
"""From there, or from the last of the body, until there is an answer: then it is that there is none."""
SHUTDOWN_SECONDS_MAX = 10

SURPLUS_MAX = 100
"""How many connections more than are served are told so. Those beyond are dropped without a word."""
_SURPLUS_SECONDS_MAX = 2
_TICKS_PER_SECOND = 10


def _uncounted() -> None:
    """Leave it at that."""


class _Config(uvicorn.Config):
    def __init__(self, app: Any, connections_max: int, turned_away: Callable[[], None]) -> None:  # noqa: ANN401 - uvicorn has types of its own
        super().__init__(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS_MAX,
        )
        self.connections_max = connections_max
        self.turned_away = turned_away


class Server(uvicorn.Server):
    """Serves an application within the limits above. Signals are left alone; `listens` is set once it does.

    `turned_away` is called with each request that is told 503 here, and so is none of the application's.
    """

    def __init__(self, app: Any, *, connections_max: int, turned_away: Callable[[], None] = _uncounted) -> None:  # noqa: ANN401 - as above
        self._timely = _Timely(app, turned_away)
        super().__init__(_Config(self._timely, connections_max, turned_away))
        self.listens = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to whoever runs the server."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.listens.set()

    async def on_tick(self, counter: int) -> bool:
        """Look for what takes too long, once a second; return whether to end."""
        if counter % _TICKS_PER_SECOND == 0:
            now = asyncio.get_running_loop().time()
            self._timely.give_up_late(now)
            for connection in list(self.server_state.connections):
                cast("Connection", connection).cut_if_overdue(now)
        return await super().on_tick(counter)


class Connection(OneAtATime):
    """A connection that is not held for ever, whatever the client does or leaves undone."""

    _busy_with: tuple[str, RequestResponseCycle | None] | None = None
    _busy_since = 0.0
    _is_surplus = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Take a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        surplus = len(self.connections) - cast("_Config", self.config).connections_max
        if surplus > SURPLUS_MAX:
            self.connections.discard(self)
            transport.abort()
        elif surplus > 0:
            self._is_surplus = True
            turned_away = cast("_Config", self.config).turned_away
            self.app = cast("Any", _Full(cast("ASGIApp", self.app), turned_away))

    def cut_if_overdue(self, now: float) -> None:
        """Cut the connection if what it was busy with when it was last looked at has taken too long."""
        busy_with = self._activity()
        if busy_with is None or busy_with != self._busy_with:
            self._busy_with, self._busy_since = busy_with, now
        elif now - self._busy_since >= self._patience(busy_with[0]):
            # Not closed: that would wait for the client to take what was sent before.
            self.transport.abort()

    def _activity(self) -> tuple[str, RequestResponseCycle | None] | None:
        """Return what the connection is busy with, and for which request; None if it is idle, which uvicorn bounds."""
        cycle = self.cycle
        is_sending = self.is_in_body or self.transport.get_write_buffer_size() > 0
        if cycle is not None and (is_sending or not cycle.response_complete):
            return "exchange", cycle
        if self.timeout_keep_alive_task is not None:
            return None
        return "head", cycle

    def _patience(self, activity: str) -> int:
        if activity == "exchange":
            return EXCHANGE_SECONDS_MAX
        return _SURPLUS_SECONDS_MAX if self._is_surplus else HEAD_SECONDS_MAX


# --- answers in time --------------------------------------------------------------------------------------------------


class _Timely:
    """An application whose requests are answered in time, if only that there is no answer."""

    def __init__(self, app: ASGIApp, turned_away: Callable[[], None]) -> None:
        self._app = app
        self._turned_away = turned_away
        self._exchanges: set[_Exchange] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._turned_away)
        self._exchanges.add(exchange)
        try:
            await exchange.run(self._app)
        finally:
            self._exchanges.discard(exchange)

    def give_up_late(self, now: float) -> None:
        """Tell those who have waited for too long that there is no answer."""
        for exchange in self._exchanges:
            exchange.give_up_if_late(now)


class _Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send, turned_away: Callable[[], None]) -> None:
        self._scope = scope
        self._turned_away = turned_away
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._waits_since = self._loop.time()
        self._is_answered = False
        self._giving_up: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self._hear, self._say)
        except asyncio.CancelledError:
            # The server ends, and has waited for long. Nobody else cancels a request.
            if self._giving_up is not None:
                return
            if self._is_answered:
                raise
            self._is_answered = True
            self._turned_away()
            answer = raw_problem(UNAVAILABLE, "the service is ending; repeat the request", {"connection": "close"})
            await _say(answer, self._scope, self._send)
        finally:
            if self._giving_up is not None:
                await self._giving_up

    async def _hear(self) -> Any:  # noqa: ANN401 - Litestar's union of messages
        message = await self._receive()
        # The time that a body takes is the client's.
        self._waits_since = self._loop.time()
        return message

    async def _say(self, message: Message) -> None:
        if self._giving_up is None:
            self._is_answered = True
            await self._send(message)

    def give_up_if_late(self, now: float) -> None:
        if self._is_answered or now - self._waits_since < ANSWER_SECONDS_MAX:
            return
        # The request is not cancelled: what it waits for has limits of its own, and is better left to end by itself.
        self._is_answered = True
        self._turned_away()
        answer = raw_problem(UNAVAILABLE, "there was no answer in time, and the outcome is unknown: repeat the request")
        self._giving_up = self._loop.create_task(_say(answer, self._scope, self._send))


class _Full:
    """An application that is for those who look whether the process is alive, and nobody else."""

    def __init__(self, app: ASGIApp, turned_away: Callable[[], None]) -> None:
        self._app = app
        self._turned_away = turned_away

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP and scope["path"] == "/livez":
            await self._app(scope, receive, send)
            return
        self._turned_away()
        answer = raw_problem(UNAVAILABLE, "there are too many connections; try again", {"connection": "close"})
        await _say(answer, scope, send)


async def _say(answer: RawProblem, scope: Scope, send: Send) -> None:
    headers = [*answer.headers, id_header(scope)]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})
