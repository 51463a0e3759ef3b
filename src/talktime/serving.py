"""The commands that serve: sockets, the server, what runs beside it, and what they say when they begin."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from sqlalchemy.engine import URL

from talktime.api.app import create_app
from talktime.api.connections import SURPLUS_MAX, Server
from talktime.api.tokens import local
from talktime.errors import DatabaseUnavailable, EmbeddedDatabaseError, KeyNameTaken, TalktimeError
from talktime.keys import active_keys, new_key
from talktime.operations import Service
from talktime.process import run_until_signalled, settle
from talktime.settings import Settings
from talktime.store.database import Database, provide_database
from talktime.store.embedded import revive_postgres
from talktime.web import pages
from talktime.web.demo import Demo, seed

LOOPBACK = "127.0.0.1"
CONNECTIONS_WAITING_MAX = 2048
REVIVE_EVERY_S = 1
FILES_BESIDE = SURPLUS_MAX + 200
"""Files that are open beside the connections served: those refused, the database's, logs, programs that are started."""
FIRST_KEY = "first"

log = logging.getLogger("talktime")


class CannotListen(TalktimeError):
    """The address is taken, or is none of this machine's."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"cannot listen on {host} port {port}: {reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be served. `all_of_it` means passes, a first service key and, if there is one, the demo too.

    `key_command` is how the user makes a service key of this database.
    """

    settings: Settings
    listener: socket.socket
    url: URL
    all_of_it: bool
    demo: Demo | None
    key_command: str


def up(settings: Settings, *, port: int, demo: bool, key_command: str) -> None:
    """Run database, migrations, API and reconciler on this machine until a signal comes."""
    from talktime.store.schema import upgrade  # noqa: PLC0415 - Alembic is slow to import

    with _listening(LOOPBACK, port) as listener, provide_database(settings.database_url, settings.home) as url:
        upgrade(url)
        tokens = local(settings.home) if settings.tokens is None else settings.tokens
        plan = _Plan(
            settings=replace(settings, tokens=tokens),
            listener=listener,
            url=url,
            all_of_it=True,
            # Where tokens are the host product's, this is no place to play with credits.
            demo=Demo(tokens) if demo and settings.tokens is None else None,
            key_command=key_command,
        )
        run_until_signalled(lambda stop: _run(plan, stop))


def serve(settings: Settings, *, host: str, port: int, key_command: str) -> None:
    """Run the API alone until a signal comes."""
    with _listening(host, port) as listener, provide_database(settings.database_url, settings.home) as url:
        plan = _Plan(settings=settings, listener=listener, url=url, all_of_it=False, demo=None, key_command=key_command)
        run_until_signalled(lambda stop: _run(plan, stop))


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind before anything else is started, so that a taken port costs nothing and is told plainly."""
    with contextlib.ExitStack() as stack:
        try:
            # The protocol has to be named: asyncio turns off Nagle's algorithm only where it is, and with it on every
            # answer on a kept connection would wait 40 ms for an acknowledgement.
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(CONNECTIONS_WAITING_MAX)
        except OSError as error:
            raise CannotListen(host, port, error.strerror or str(error)) from None
        yield listener


def _room_for(connections: int) -> int:
    """Let this process open as many files as it may, and return how many of these connections it can hold."""
    files_max = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # Systems set a low limit for programs of old that count on it, and a high one for those that do not; some that say
    # there is none do not take that.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY or connections + FILES_BESIDE <= files:
        return connections
    room = max(1, files - FILES_BESIDE)
    log.warning("this process may open %d files: it serves %d connections at once, not %d", files, room, connections)
    return room


async def _run(plan: _Plan, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    settings = plan.settings
    database = Database(plan.url)
    if plan.demo is not None:
        try:
            await seed(Service(database, settings.policy, settings.default_card, settings.low_us))
        except BaseException:
            await database.close()  # else the application does
            raise
    app = create_app(settings, lambda: database, pages=pages(plan.demo))
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are of what strangers send
    settle()
    turned_away = app.state["meters"].turned_away
    server = Server(app, connections_max=_room_for(settings.connections_max), turned_away=turned_away)
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[plan.listener]))
        stopping = tasks.create_task(stop.wait())
        telling = tasks.create_task(_tell(plan, database, server.listens))
        if plan.all_of_it:
            tasks.create_task(_reconcile(settings, plan.url, stop))
        if settings.database_url is None:
            tasks.create_task(_keep_up(settings.home, stop))
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        was_told = stop.is_set()
        stop.set()
        server.should_exit = True
        if not server.listens.is_set():
            telling.cancel()
    if not was_told:
        message = "the API ended by itself; the log says why"
        raise TalktimeError(message)


async def _tell(plan: _Plan, database: Database, listens: asyncio.Event) -> None:
    """Say, once the server listens, where, and with which key it is used."""
    await listens.wait()
    host, port = plan.listener.getsockname()[:2]
    origin = f"http://[{host}]:{port}" if plan.listener.family is socket.AF_INET6 else f"http://{host}:{port}"
    url = plan.settings.database_url
    print(f"talktime {version('talktime')}")
    print(f"listening on {origin}")
    print(f"documentation at {origin}/schema")
    # Not the whole URL: its query may hold a password too.
    print(
        f"data in {plan.settings.home}"
        if url is None
        else f"data in database {url.database} at {url.host}:{url.port or 5432}"
    )
    if plan.demo is not None:
        print(f"demo at {origin}/")
    print(f"console at {origin}/console", flush=True)
    try:
        lines = await _about_keys(plan, database)
    except DatabaseUnavailable:
        lines = [f"service keys: the database does not answer yet; {plan.key_command} makes one when it does"]
    print(*lines, sep="\n", flush=True)


async def _about_keys(plan: _Plan, database: Database) -> list[str]:
    """Return what there is to say about service keys, after making the first one where all is started here."""
    of_environment = plan.settings.service_key is not None
    in_force = len(await active_keys(database)) + of_environment
    if in_force:
        whence = ", one of them that of TALKTIME_SERVICE_KEY" if of_environment else ""
        return [f"service keys in force: {in_force}{whence}; {plan.key_command} makes another"]
    if plan.all_of_it:
        # Once in the life of a database: where it was revoked, nobody asked for another.
        with contextlib.suppress(KeyNameTaken):
            key = await new_key(database, FIRST_KEY)
            return [f"service key: {key}", f"it is shown only now; {plan.key_command} makes another"]
    return [f"no service key is in force: {plan.key_command} makes one"]


async def _reconcile(settings: Settings, url: URL, stop: asyncio.Event) -> None:
    from reconciler.sweep import BATCHES_AT_ONCE, repeat  # noqa: PLC0415 - only `up` needs it

    database = Database(url, pool_size=BATCHES_AT_ONCE)
    try:
        await repeat(database, stop, every_s=settings.reconcile_us / 1_000_000, webhook=settings.webhook)
    except DatabaseUnavailable:
        log.warning("stopping while the database is away")
    finally:
        await database.close()


async def _keep_up(home: Path, stop: asyncio.Event) -> None:
    """Start the embedded PostgreSQL again whenever it is found dead: nobody else would."""
    while not stop.is_set():
        try:
            if await asyncio.to_thread(revive_postgres, home):
                log.warning("the embedded PostgreSQL had died; it runs again")
        except EmbeddedDatabaseError as error:
            log.error("%s", error)  # noqa: TRY400 - the traceback says no more
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REVIVE_EVERY_S):
                await stop.wait()
