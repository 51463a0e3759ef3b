"""Settings, read from the environment once, by entry points only, and frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_path
from psycopg import ProgrammingError
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from talktime.errors import SettingError
from talktime.meter.state import Policy, RateCard, Scope, Tariff
from talktime.meter.units import MAX_RATE, format_credits, parse_credits, parse_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that can be set. Durations are in microseconds.

    `database_url` is None where the embedded PostgreSQL of `home` is to be used, `service_key` where the one kept in
    `home` is.
    """

    database_url: URL | None
    home: Path
    service_key: str | None = field(repr=False)
    policy: Policy
    heartbeat_us: int
    default_card: RateCard
    reconcile_us: int


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from ``TALKTIME_...`` variables.

    Raises:
        SettingError: a value is out of its domain; one line that names the variable.
    """
    lease_us = _seconds(environment, "TALKTIME_LEASE_SECONDS", "15")
    heartbeat_us = _seconds(environment, "TALKTIME_HEARTBEAT_SECONDS", "5")
    abandon_after_us = _seconds(environment, "TALKTIME_ABANDON_AFTER_SECONDS", "300")
    if 2 * heartbeat_us > lease_us:
        raise SettingError("TALKTIME_HEARTBEAT_SECONDS", "must be at most half of TALKTIME_LEASE_SECONDS")
    if abandon_after_us <= lease_us:
        raise SettingError("TALKTIME_ABANDON_AFTER_SECONDS", "must be more than TALKTIME_LEASE_SECONDS")
    return Settings(
        database_url=_database_url(environment),
        home=_home(environment),
        service_key=_service_key(environment),
        policy=Policy(_scope(environment), lease_us, abandon_after_us),
        heartbeat_us=heartbeat_us,
        default_card=RateCard(
            Tariff(_rate(environment)), _seconds(environment, "TALKTIME_FREE_SECONDS", "180", zero=True)
        ),
        reconcile_us=_seconds(environment, "TALKTIME_RECONCILE_SECONDS", "15"),
    )


def home_folder(text: str) -> Path:
    """Return the absolute path of a folder, with ``~`` for a user's home.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        message = "must be a folder; there is no such user"
        raise ValueError(message) from None


def _home(environment: Mapping[str, str]) -> Path:
    name = "TALKTIME_HOME"
    try:
        return home_folder(environment.get(name) or str(user_data_path("talktime")))
    except ValueError as error:
        raise SettingError(name, str(error)) from None


def _seconds(environment: Mapping[str, str], name: str, default: str, *, zero: bool = False) -> int:
    text = environment.get(name) or default
    try:
        us = parse_seconds(text)
    except ValueError as error:
        raise SettingError(name, f"{error}, not {text!r}") from None
    if us < 0 or (us == 0 and not zero):
        raise SettingError(name, f"must be {'0 or more' if zero else 'more than 0'}, not {text!r}")
    return us


def _rate(environment: Mapping[str, str]) -> int:
    name = "TALKTIME_CREDITS_PER_MINUTE"
    text = environment.get(name) or "1"
    try:
        rate = parse_credits(text)
    except ValueError as error:
        raise SettingError(name, f"{error}, not {text!r}") from None
    if not 0 <= rate <= MAX_RATE:
        raise SettingError(name, f"must be between 0 and {format_credits(MAX_RATE)}, not {text!r}")
    return rate


def _scope(environment: Mapping[str, str]) -> Scope:
    name = "TALKTIME_EXCLUSIVE"
    text = environment.get(name) or Scope.ADVISOR
    try:
        return Scope(text)
    except ValueError:
        raise SettingError(name, f"must be one of {', '.join(Scope)}, not {text!r}") from None


def _database_url(environment: Mapping[str, str]) -> URL | None:
    name = "TALKTIME_DATABASE_URL"
    text = environment.get(name)
    if not text:
        return None
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # The text may hold a password, so it is not repeated.
        raise SettingError(name, "must be a URL such as postgresql://user:password@host:5432/database") from None
    options = {option: value if isinstance(value, str) else ",".join(value) for option, value in url.query.items()}
    try:
        make_conninfo(**options)
    except ProgrammingError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(name, f"must be a URL with options that PostgreSQL knows: {reason}") from None
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise SettingError(name, "must be a URL with a port from 1 to 65535")
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise SettingError(name, "must be a postgresql:// URL")
    return url.set(drivername="postgresql+psycopg")


def _service_key(environment: Mapping[str, str]) -> str | None:
    name = "TALKTIME_SERVICE_KEY"
    key = environment.get(name)
    if not key:
        return None
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:  # noqa: PLR2004
        raise SettingError(name, "must be at least 16 printable ASCII characters without spaces")
    return key
