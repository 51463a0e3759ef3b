"""The `talktime` command: its parser, its dispatch and its exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from talktime import arguments
from talktime.errors import DatabaseUnavailable, SettingError, TalktimeError
from talktime.logs import make_logs_discreet
from talktime.meter.state import CreditKind
from talktime.meter.units import MAX_BLOCK_US, MAX_FREE_US, MICRO
from talktime.ops.files import ABOUT, show, write
from talktime.settings import Settings, home_folder, load_settings

FAILED, BAD_USE = 1, 2
NO_DATABASE = os.EX_TEMPFAIL
DEFAULT_PORT = 8000
TOKEN_SECONDS = 3600
POLL_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["reconcile"]:
        from reconciler.__main__ import main as reconcile  # noqa: PLC0415 - only this command needs it

        return reconcile(words[1:], prog="talktime reconcile")
    options = _parser().parse_args(words)
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A command that runs until it is stopped has done its work when it is; another has not.
    stopped = 0 if options.until_stopped else 128
    # Until the service runs, a SIGTERM unwinds the stack, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(stopped and stopped + number))
    try:
        settings = load_settings()
        make_logs_discreet(settings.log_format)
        if options.home is not None:
            settings = replace(settings, home=options.home)
        options.run(settings, options)
        sys.stdout.flush()
    except SettingError as error:
        print(f"talktime: {error}", file=sys.stderr)
        return BAD_USE
    except TalktimeError as error:
        print(f"talktime: {error}", file=sys.stderr)
        return NO_DATABASE if isinstance(error, DatabaseUnavailable) else FAILED
    except KeyboardInterrupt:
        return stopped and stopped + signal.SIGINT
    except BrokenPipeError:
        # Whoever read the output has had enough; nor may Python write what is left of it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


# --- parsing ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="talktime", description="Exact metering for chats that are paid by the minute."
    )
    parser.add_argument("--version", action="version", version=f"talktime {version('talktime')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_services, _add_keys, _add_people, _add_events, _add_moving, _add_files):
        add(commands)
    return parser


def _command(among: Any, name: str, run: Callable[[Settings, argparse.Namespace], None], text: str) -> Any:  # noqa: ANN401 - argparse does not name its types
    made = among.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    made.add_argument("--home", type=home_folder, help="folder of the data (default: TALKTIME_HOME, else the user's)")
    made.set_defaults(run=run, until_stopped=run in (_up, _serve, _watch))
    return made


def _add_services(commands: Any) -> None:  # noqa: ANN401 - as above
    up = _command(commands, "up", _up, "start all of it on this machine: database, migrations, API, reconciler")
    up.add_argument("--no-demo", action="store_true", help="without the demo page and its sample data")
    serve = _command(commands, "serve", _serve, "start the API alone")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    for service in (up, serve):
        service.add_argument(
            "--port", type=arguments.port, default=DEFAULT_PORT, help="0 chooses a free one (default: 8000)"
        )
    migrate = _command(commands, "migrate", _migrate, "bring the database to the newest schema")
    migrate.add_argument("--citus", action="store_true", help="distribute the tables too, on a Citus cluster")
    commands.add_parser("reconcile", help="the same program as `python -m reconciler`", add_help=False)


def _add_keys(commands: Any) -> None:  # noqa: ANN401 - as above
    key = commands.add_parser("key", help="make, list and revoke service keys")
    keys = key.add_subparsers(dest="key_command", required=True, metavar="COMMAND")
    new = _command(keys, "new", _key_new, "make a service key and print it, this once")
    revoke = _command(keys, "revoke", _key_revoke, "take a service key out of force")
    for named in (new, revoke):
        named.add_argument("name", metavar="NAME")
    _command(keys, "list", _key_list, "list the service keys of the database, the revoked ones too")


def _add_people(commands: Any) -> None:  # noqa: ANN401 - as above
    token = _command(commands, "token", _token, "print a token for a page, as the host product would sign it")
    token.add_argument("subject", metavar="USER", type=arguments.product_id, help="id of the user")
    token.add_argument("--advisor", action="store_true", help="the id is an advisor's")
    token.add_argument(
        "--seconds",
        type=arguments.whole_seconds,
        default=TOKEN_SECONDS,
        help=f"how long it is good (default: {TOKEN_SECONDS})",
    )

    credit = _command(commands, "credit", _credit, "add credits to a user's balance, or take some")
    credit.add_argument("user_id", metavar="USER", type=arguments.product_id)
    credit.add_argument("amount", metavar="AMOUNT", type=arguments.amount, help="credits, such as 25 or 0.5")
    credit.add_argument(
        "--kind", choices=[str(kind) for kind in CreditKind], default=str(CreditKind.GRANT), help="(default: grant)"
    )
    credit.add_argument("--reason", metavar="TEXT", type=arguments.memo, default="", help="kept in the ledger")
    credit.add_argument(
        "--key",
        type=arguments.idempotency_key,
        help="a command repeated with the same key changes nothing (default: a new one)",
    )

    advisor = _command(commands, "advisor", _advisor, "show an advisor's rate card, or change some of it")
    advisor.add_argument("advisor_id", metavar="ID", type=arguments.product_id)
    advisor.add_argument("--credits-per-minute", dest="rate", metavar="CREDITS", type=arguments.rate)
    advisor.add_argument("--free-seconds", dest="free_us", metavar="SECONDS", type=arguments.time_up_to(MAX_FREE_US))
    advisor.add_argument("--first-seconds", dest="first_us", metavar="SECONDS", type=arguments.time_up_to(MAX_BLOCK_US))
    advisor.add_argument(
        "--increment-seconds", dest="increment_us", metavar="SECONDS", type=arguments.time_up_to(MAX_BLOCK_US)
    )

    watch = _command(commands, "watch", _watch, "show a chat's clock as it runs")
    watch.add_argument("user_id", metavar="USER", type=arguments.product_id)
    watch.add_argument("chat_id", metavar="CHAT", type=arguments.product_id)
    watch.add_argument("--once", action="store_true", help="print one reading and end")
    watch.add_argument(
        "--every",
        dest="every_us",
        metavar="SECONDS",
        type=arguments.time_up_to(MAX_BLOCK_US, least=MICRO // 10),
        default=POLL_SECONDS * MICRO,
        help=f"how often to ask the database (default: {POLL_SECONDS})",
    )


def _add_events(commands: Any) -> None:  # noqa: ANN401 - as above
    events = commands.add_parser("events", help="list and retry events that were not delivered to the webhook")
    event_commands = events.add_subparsers(dest="events_command", required=True, metavar="COMMAND")
    listing = _command(event_commands, "list", _events_list, "list the events that were sent and not delivered")
    listing.add_argument("--dead", action="store_true", help="only those that are not sent any more")
    retry = _command(event_commands, "retry", _events_retry, "have dead events sent again, with the next pass")
    whose = retry.add_mutually_exclusive_group(required=True)
    whose.add_argument("user_id", metavar="USER", type=arguments.product_id, nargs="?", help="those of a user")
    whose.add_argument("--all", action="store_true", help="those of all users")
    retry.add_argument("--number", type=arguments.event_number, help="only this one of the user's")


def _add_moving(commands: Any) -> None:  # noqa: ANN401 - as above
    bring = _command(commands, "import", _import, "take over the users, chats and time records of an old system")
    bring.add_argument(
        "--source", metavar="URL", type=arguments.database_url, required=True, help="the old database; it is only read"
    )
    bring.add_argument("--dry-run", action="store_true", help="do and report all of it, and take it back at once")
    bring.add_argument("--report", metavar="FILE", type=Path, help="write each user's totals before and after, as CSV")
    export = _command(commands, "export-legacy", _export, "materialize, and write an old system's tables: the way back")
    export.add_argument("--target", metavar="URL", type=arguments.database_url, required=True, help="the old database")
    for moving in (bring, export):
        moving.add_argument(
            "--mapping",
            metavar="FILE",
            type=arguments.mapping,
            help="TOML: the old tables' and columns' names, where unusual",
        )


def _add_files(commands: Any) -> None:  # noqa: ANN401 - as above
    ops = commands.add_parser("ops", help="print files for those who run it: crontab, units, manifest, alert rules")
    kinds = ops.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, text in ABOUT.items():
        made = kinds.add_parser(kind, help=text, description=f"Print {text}.")
        made.add_argument("--to", type=Path, metavar="FOLDER", help="write each into a file of its own there instead")
        made.set_defaults(run=_ops, until_stopped=False, home=None)


# --- dispatch: each imports what it needs, so that help and mistakes are answered at once -----------------------------


def _up(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import serving  # noqa: PLC0415 - see above

    serving.up(settings, port=options.port, demo=not options.no_demo, key_command=_key_command(options.home))


def _serve(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import serving  # noqa: PLC0415 - see above

    serving.serve(settings, host=options.host, port=options.port, key_command=_key_command(options.home))


def _key_command(home: Path | None) -> str:
    """Return the command that makes a key where this one keeps its data."""
    return "`talktime key new NAME`" if home is None else f"`talktime key new NAME --home {shlex.quote(str(home))}`"


def _migrate(settings: Settings, options: argparse.Namespace) -> None:
    from talktime.store import citus  # noqa: PLC0415 - see above
    from talktime.store.database import provide_database  # noqa: PLC0415 - see above
    from talktime.store.schema import upgrade  # noqa: PLC0415 - see above

    if options.citus:
        if settings.database_url is None:
            raise SettingError("TALKTIME_DATABASE_URL", "must be set for --citus, to the coordinator of the cluster")
        citus.require_cluster(settings.database_url)  # before anything is changed
    with provide_database(settings.database_url, settings.home) as url:
        upgrade(url)
        done = citus.distribute(url) if options.citus else []
    print("the database has the newest schema")
    if options.citus:
        print(f"distributed: {', '.join(done)}" if done else "its tables were distributed before")


def _import(settings: Settings, options: argparse.Namespace) -> None:
    from talktime.legacy import moving, tables  # noqa: PLC0415 - see above

    mapped = options.mapping or tables.Mapped()
    moving.import_legacy(settings, options.source, mapped, dry_run=options.dry_run, report=options.report)


def _export(settings: Settings, options: argparse.Namespace) -> None:
    from talktime.legacy import moving, tables  # noqa: PLC0415 - see above

    moving.export_legacy(settings, options.target, options.mapping or tables.Mapped())


def _key_new(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.make_key(settings, options.name)


def _key_list(settings: Settings, _: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.show_keys(settings)


def _key_revoke(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.revoke(settings, options.name)


def _token(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.mint_token(settings, options.subject, advisor=options.advisor, seconds=options.seconds)


def _credit(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.credit(
        settings,
        options.user_id,
        amount=options.amount,
        kind=CreditKind(options.kind),
        memo=options.reason,
        key=options.key,
    )


def _advisor(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.advise(
        settings,
        options.advisor_id,
        rate=options.rate,
        free_us=options.free_us,
        first_us=options.first_us,
        increment_us=options.increment_us,
    )


def _events_list(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.show_events(settings, dead=options.dead)


def _events_retry(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import terminal  # noqa: PLC0415 - see above

    terminal.retry_events(settings, options.user_id, number=options.number)


def _watch(settings: Settings, options: argparse.Namespace) -> None:
    from talktime import watch  # noqa: PLC0415 - see above

    watch.watch(settings, options.user_id, options.chat_id, every_us=options.every_us, once=options.once)


def _ops(_: Settings, options: argparse.Namespace) -> None:
    if options.to is None:
        show(options.kind)
    else:
        write(options.kind, options.to)
