"""The `talktime` command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from talktime.errors import DatabaseUnavailable, EmbeddedDatabaseError, SettingError, TalktimeError
from talktime.process import run_until_signalled
from talktime.settings import Settings, home_folder, load_settings
from talktime.store.database import Database, provide_database
from talktime.store.embedded import revive_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from litestar import Litestar

FAILED, BAD_USE = 1, 2
NO_DATABASE = os.EX_TEMPFAIL
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8000
SHUTDOWN_SECONDS_MAX = 10
CONNECTIONS_WAITING_MAX = 2048
REVIVE_EVERY_S = 1


class CannotListen(TalktimeError):
    """The address is taken, or is none of this machine's."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"cannot listen on {host} port {port}: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["reconcile"]:
        from reconciler.__main__ import main as reconcile  # noqa: PLC0415 - only this command needs it

        return reconcile(arguments[1:], prog="talktime reconcile")
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Until the service runs, a SIGTERM unwinds the stack, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = load_settings()
        if options.home is not None:
            settings = replace(settings, home=options.home)
        run = {"up": _up, "serve": _serve, "migrate": _migrate}[options.command]
        run(settings, options)
    except SettingError as error:
        print(f"talktime: {error}", file=sys.stderr)
        return BAD_USE
    except TalktimeError as error:
        print(f"talktime: {error}", file=sys.stderr)
        return NO_DATABASE if isinstance(error, DatabaseUnavailable) else FAILED
    except KeyboardInterrupt:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="talktime", description="Exact metering for chats that are paid by the minute."
    )
    parser.add_argument("--version", action="version", version=f"talktime {version('talktime')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start all of it on this machine: database, migrations, API, reconciler")
    serve = commands.add_parser("serve", help="start the API alone")
    migrate = commands.add_parser("migrate", help="bring the database to the newest schema")
    commands.add_parser("reconcile", help="the same program as `python -m reconciler`", add_help=False)
    for command in (up, serve, migrate):
        command.add_argument(
            "--home",
            type=home_folder,
            help="folder of the data and the key (default: TALKTIME_HOME, else the user's)",
        )
    for command in (up, serve):
        command.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0 chooses a free one (default: 8000)")
    serve.add_argument("--host", default=LOOPBACK, help="address to listen on (default: loopback only)")
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        message = f"must be a number from 0 to 65535, not {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _up(settings: Settings, options: argparse.Namespace) -> None:
    from reconciler.sweep import BATCHES_AT_ONCE  # noqa: PLC0415 - only `up` needs it
    from talktime.store.schema import upgrade  # noqa: PLC0415 - Alembic is slow to import

    with _listening(LOOPBACK, options.port) as listener, provide_database(settings.database_url, settings.home) as url:
        upgrade(url)
        database, reconciling = Database(url), Database(url, pool_size=BATCHES_AT_ONCE)
        run_until_signalled(lambda stop: _run(settings, listener, stop, database=database, reconciling=reconciling))


def _serve(settings: Settings, options: argparse.Namespace) -> None:
    with (
        _listening(options.host, options.port) as listener,
        provide_database(settings.database_url, settings.home) as url,
    ):
        run_until_signalled(lambda stop: _run(settings, listener, stop, database=Database(url)))


def _migrate(settings: Settings, _: argparse.Namespace) -> None:
    from talktime.store.schema import upgrade  # noqa: PLC0415 - Alembic is slow to import

    with provide_database(settings.database_url, settings.home) as url:
        upgrade(url)
    print("the database has the newest schema")


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


def _service_key(settings: Settings) -> str:
    """Return the key of the environment, else the one kept in the home folder, made there if there is none."""
    if settings.service_key is not None:
        return settings.service_key
    path = settings.home / "service_key"
    if not path.exists():
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written aside and linked: two starts at once agree on one key, and a crash leaves a whole key or none.
        descriptor, fresh = tempfile.mkstemp(prefix="service_key.", dir=settings.home)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            Path(fresh).unlink()
    return path.read_text().strip()


async def _run(
    settings: Settings,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    database: Database,
    reconciling: Database | None = None,
) -> None:
    """Serve the API until `stop` is set, with passes beside it if there are connections for them."""
    import uvicorn  # noqa: PLC0415 - not every command needs it

    from talktime.api.app import create_app  # noqa: PLC0415 - Litestar is slow to import

    class Server(uvicorn.Server):
        """Uvicorn without its signal handlers: ours stop the passes as well."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _announce(settings, key, listener)

    key = _service_key(settings)
    app: Litestar = create_app(settings, key, lambda: database)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS_MAX,
        )
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listener]))
        stopping = tasks.create_task(stop.wait())
        if reconciling is not None:
            tasks.create_task(_reconcile(settings, reconciling, stop))
        if settings.database_url is None:
            tasks.create_task(_keep_up(settings.home, stop))
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        was_told = stop.is_set()
        stop.set()
        server.should_exit = True
    if not was_told:
        message = "the API ended by itself; the log says why"
        raise TalktimeError(message)


def _announce(settings: Settings, key: str, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    print(f"talktime {version('talktime')}")
    origin = f"http://[{host}]:{port}" if listener.family is socket.AF_INET6 else f"http://{host}:{port}"
    print(f"listening on {origin}")
    print(f"documentation at {origin}/schema")
    url = settings.database_url
    # Not the whole URL: its query may hold a password too.
    print(
        f"data in {settings.home}"
        if url is None
        else f"data in database {url.database} at {url.host}:{url.port or 5432}"
    )
    print(f"service key: {key}", flush=True)


async def _keep_up(home: Path, stop: asyncio.Event) -> None:
    """Start the embedded PostgreSQL again whenever it is found dead: nobody else would."""
    log = logging.getLogger("talktime")
    while not stop.is_set():
        try:
            if await asyncio.to_thread(revive_postgres, home):
                log.warning("the embedded PostgreSQL had died; it runs again")
        except EmbeddedDatabaseError as error:
            log.error("%s", error)  # noqa: TRY400 - the traceback says no more
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REVIVE_EVERY_S):
                await stop.wait()


async def _reconcile(settings: Settings, database: Database, stop: asyncio.Event) -> None:
    from reconciler.sweep import repeat  # noqa: PLC0415 - only `up` needs it

    try:
        await repeat(database, stop, every_s=settings.reconcile_us / 1_000_000)
    except DatabaseUnavailable:
        logging.getLogger("talktime").warning("stopping while the database is away")
    finally:
        await database.close()
