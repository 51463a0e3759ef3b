"""The `talktime` command: its parser, its dispatch and its exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from talktime.errors import DatabaseUnavailable, SettingError, TalktimeError
from talktime.meter.state import CreditKind
from talktime.meter.units import MAX_BLOCK_US, MAX_FREE_US, MICRO, parse_seconds
from talktime.settings import Settings, home_folder, load_settings

T = TypeVar("T")

FAILED, BAD_USE = 1, 2
NO_DATABASE = os.EX_TEMPFAIL
DEFAULT_PORT = 8000
TOKEN_SECONDS = 3600
POLL_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["reconcile"]:
        from reconciler.__main__ import main as reconcile  # noqa: PLC0415 - only this command needs it

        return reconcile(arguments[1:], prog="talktime reconcile")
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A command that runs until it is stopped has done its work when it is; another has not.
    stopped = 0 if options.until_stopped else 128
    # Until the service runs, a SIGTERM unwinds the stack, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(stopped and stopped + number))
    try:
        settings = load_settings()
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
    at_home = argparse.ArgumentParser(add_help=False)
    at_home.add_argument(
        "--home", type=home_folder, help="folder of the data (default: TALKTIME_HOME, else the user's)"
    )

    def command(among: Any, name: str, run: Callable[[Settings, argparse.Namespace], None], text: str) -> Any:  # noqa: ANN401 - argparse does not name its types
        made = among.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[at_home])
        made.set_defaults(run=run, until_stopped=run in (_up, _serve, _watch))
        return made

    up = command(commands, "up", _up, "start all of it on this machine: database, migrations, API, reconciler")
    up.add_argument("--no-demo", action="store_true", help="without the demo page and its sample data")
    serve = command(commands, "serve", _serve, "start the API alone")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    for service in (up, serve):
        service.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0 chooses a free one (default: 8000)")
    migrate = command(commands, "migrate", _migrate, "bring the database to the newest schema")
    migrate.add_argument("--citus", action="store_true", help="distribute the tables too, on a Citus cluster")
    commands.add_parser("reconcile", help="the same program as `python -m reconciler`", add_help=False)

    key = commands.add_parser("key", help="make, list and revoke service keys")
    keys = key.add_subparsers(dest="key_command", required=True, metavar="COMMAND")
    new = command(keys, "new", _key_new, "make a service key and print it, this once")
    revoke = command(keys, "revoke", _key_revoke, "take a service key out of force")
    for named in (new, revoke):
        named.add_argument("name", metavar="NAME")
    command(keys, "list", _key_list, "list the service keys of the database, the revoked ones too")

    token = command(commands, "token", _token, "print a token for a page, as the host product would sign it")
    token.add_argument("subject", metavar="USER", type=_id, help="id of the user")
    token.add_argument("--advisor", action="store_true", help="the id is an advisor's")
    token.add_argument(
        "--seconds", type=_whole_seconds, default=TOKEN_SECONDS, help=f"how long it is good (default: {TOKEN_SECONDS})"
    )

    credit = command(commands, "credit", _credit, "add credits to a user's balance, or take some")
    credit.add_argument("user_id", metavar="USER", type=_id)
    credit.add_argument("amount", metavar="AMOUNT", type=_amount, help="credits, such as 25 or 0.5")
    credit.add_argument(
        "--kind", choices=[str(kind) for kind in CreditKind], default=str(CreditKind.GRANT), help="(default: grant)"
    )
    credit.add_argument("--reason", metavar="TEXT", type=_memo, default="", help="kept in the ledger")
    credit.add_argument(
        "--key", type=_idempotency_key, help="a command repeated with the same key changes nothing (default: a new one)"
    )

    advisor = command(commands, "advisor", _advisor, "show an advisor's rate card, or change some of it")
    advisor.add_argument("advisor_id", metavar="ID", type=_id)
    advisor.add_argument("--credits-per-minute", dest="rate", metavar="CREDITS", type=_rate)
    advisor.add_argument("--free-seconds", dest="free_us", metavar="SECONDS", type=_time_up_to(MAX_FREE_US))
    advisor.add_argument("--first-seconds", dest="first_us", metavar="SECONDS", type=_time_up_to(MAX_BLOCK_US))
    advisor.add_argument("--increment-seconds", dest="increment_us", metavar="SECONDS", type=_time_up_to(MAX_BLOCK_US))

    _add_events(commands, command)

    watch = command(commands, "watch", _watch, "show a chat's clock as it runs")
    watch.add_argument("user_id", metavar="USER", type=_id)
    watch.add_argument("chat_id", metavar="CHAT", type=_id)
    watch.add_argument("--once", action="store_true", help="print one reading and end")
    watch.add_argument(
        "--every",
        dest="every_us",
        metavar="SECONDS",
        type=_time_up_to(MAX_BLOCK_US, least=MICRO // 10),
        default=POLL_SECONDS * MICRO,
        help=f"how often to ask the database (default: {POLL_SECONDS})",
    )
    return parser


def _add_events(commands: Any, command: Callable[..., Any]) -> None:  # noqa: ANN401 - argparse does not name its types
    events = commands.add_parser("events", help="list and retry events that were not delivered to the webhook")
    event_commands = events.add_subparsers(dest="events_command", required=True, metavar="COMMAND")
    listing = command(event_commands, "list", _events_list, "list the events that were sent and not delivered")
    listing.add_argument("--dead", action="store_true", help="only those that are not sent any more")
    retry = command(event_commands, "retry", _events_retry, "have dead events sent again, with the next pass")
    whose = retry.add_mutually_exclusive_group(required=True)
    whose.add_argument("user_id", metavar="USER", type=_id, nargs="?", help="those of a user")
    whose.add_argument("--all", action="store_true", help="those of all users")
    retry.add_argument("--number", type=_event_number, help="only this one of the user's")


def _parsed(parse: Callable[[str], T], text: str) -> T:
    """Return a value, or say what is wrong with its text as argparse wants it said."""
    try:
        return parse(text)
    except ValueError as error:
        message = f"{error}, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _require(rule: str, text: str, *, holds: bool) -> None:
    if not holds:
        message = f"{rule}, not {text!r}"
        raise argparse.ArgumentTypeError(message)


def _port(text: str) -> int:
    holds = text.isascii() and text.isdigit() and int(text) < 1 << 16
    _require("must be a number from 0 to 65535", text, holds=holds)
    return int(text)


def _whole_seconds(text: str) -> int:
    seconds_max = MAX_FREE_US // MICRO
    holds = re.fullmatch(r"[0-9]{1,9}", text) is not None and 0 < int(text) <= seconds_max
    _require(f"must be a whole number of seconds from 1 to {seconds_max}", text, holds=holds)
    return int(text)


def _event_number(text: str) -> int:
    _require("must be the number of an event", text, holds=re.fullmatch(r"[1-9][0-9]{0,17}", text) is not None)
    return int(text)


def _time_up_to(us_max: int, *, least: int = 0) -> Callable[[str], int]:
    def parse(text: str) -> int:
        us = _parsed(parse_seconds, text)
        _require(f"must be from {least / MICRO:g} to {us_max // MICRO} seconds", text, holds=least <= us <= us_max)
        return us

    return parse


# The API's rules. Its room is slow to import, so that waits until there is something to parse.


def _id(text: str) -> str:
    from talktime.api.params import ID_RULE, is_id  # noqa: PLC0415 - see above

    _require(ID_RULE, text, holds=is_id(text))
    return text


def _idempotency_key(text: str) -> str:
    from talktime.api.params import KEY_SCHEMA  # noqa: PLC0415 - see above

    holds = re.fullmatch(KEY_SCHEMA["pattern"], text) is not None
    _require("must be 1 to 255 printable ASCII characters", text, holds=holds)
    return text


def _amount(text: str) -> int:
    from talktime.api.bodies import Amount  # noqa: PLC0415 - see above

    return _parsed(Amount.parse, text)


def _rate(text: str) -> int:
    from talktime.api.bodies import Rate  # noqa: PLC0415 - see above

    return _parsed(Rate.parse, text)


def _memo(text: str) -> str:
    from talktime.api.bodies import Memo  # noqa: PLC0415 - see above

    return _parsed(Memo.parse, text)


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
