"""What may stand on the command line: each reads a word, or says what is wrong with it as argparse wants it said."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from talktime.errors import OldTablesError, SettingError
from talktime.meter.units import MAX_FREE_US, MICRO, parse_seconds
from talktime.settings import parse_database_url

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from talktime.legacy.tables import Mapped

T = TypeVar("T")


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


def port(text: str) -> int:
    """A port; 0 chooses a free one."""
    holds = text.isascii() and text.isdigit() and int(text) < 1 << 16
    _require("must be a number from 0 to 65535", text, holds=holds)
    return int(text)


def whole_seconds(text: str) -> int:
    """A whole number of seconds, at least one."""
    seconds_max = MAX_FREE_US // MICRO
    holds = re.fullmatch(r"[0-9]{1,9}", text) is not None and 0 < int(text) <= seconds_max
    _require(f"must be a whole number of seconds from 1 to {seconds_max}", text, holds=holds)
    return int(text)


def event_number(text: str) -> int:
    """The number of an event."""
    _require("must be the number of an event", text, holds=re.fullmatch(r"[1-9][0-9]{0,17}", text) is not None)
    return int(text)


def time_up_to(us_max: int, *, least: int = 0) -> Callable[[str], int]:
    """Return a reader of seconds, as microseconds, from the least to the most."""

    def parse(text: str) -> int:
        us = _parsed(parse_seconds, text)
        _require(f"must be from {least / MICRO:g} to {us_max // MICRO} seconds", text, holds=least <= us <= us_max)
        return us

    return parse


def database_url(text: str) -> URL:
    """The URL of a PostgreSQL database."""
    try:
        return parse_database_url("this", text)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("this: ")) from None


def mapping(text: str) -> Mapped:
    """A file with an old system's names."""
    from talktime.legacy.tables import load_mapping  # noqa: PLC0415 - see below

    try:
        return load_mapping(Path(text))
    except OldTablesError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# The API's rules. Its room is slow to import, so that waits until there is something to parse.


def product_id(text: str) -> str:
    """An id of the host product."""
    from talktime.api.params import ID_RULE, is_id  # noqa: PLC0415 - see above

    _require(ID_RULE, text, holds=is_id(text))
    return text


def idempotency_key(text: str) -> str:
    """An Idempotency-Key."""
    from talktime.api.params import KEY_SCHEMA  # noqa: PLC0415 - see above

    holds = re.fullmatch(KEY_SCHEMA["pattern"], text) is not None
    _require("must be 1 to 255 printable ASCII characters", text, holds=holds)
    return text


def amount(text: str) -> int:
    """A positive amount, in micro-credits."""
    from talktime.api.bodies import Amount  # noqa: PLC0415 - see above

    return _parsed(Amount.parse, text)


def rate(text: str) -> int:
    """A rate, in micro-credits a minute."""
    from talktime.api.bodies import Rate  # noqa: PLC0415 - see above

    return _parsed(Rate.parse, text)


def memo(text: str) -> str:
    """What the ledger says of a credit."""
    from talktime.api.bodies import Memo  # noqa: PLC0415 - see above

    return _parsed(Memo.parse, text)
