"""Settings, read from the environment once, by entry points only, and frozen."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from platformdirs import user_data_path
from psycopg import ProgrammingError
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from talktime.errors import SettingError
from talktime.logs import LogFormat
from talktime.meter.state import Policy, RateCard, Scope, Tariff
from talktime.meter.units import MAX_RATE, format_credits, parse_credits, parse_seconds
from talktime.webhooks import WebhookSettings, webhook_of

SECRET_BYTES_MIN = 32
LEEWAY_SECONDS_MAX = 30
PER_SECOND_MAX = 1_000_000
CONNECTIONS_MAX = 1_000_000
ALGORITHMS = ("HS256", "RS256", "ES256")

_TOKEN_SETTINGS = ("ALGORITHM", "ISSUER", "AUDIENCE", "LEEWAY_SECONDS")


class UserMay(IntEnum):
    """What users may do with what is theirs; each also what comes before it."""

    READ = 1
    BEAT = 2
    CONTROL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """Which tokens (JWTs) of the host product are taken.

    With HS256 there is a `secret`; with the other algorithms, public keys in the file `jwks`. `leeway_s` is how far
    the clock that the token was made by may be from ours, in seconds.
    """

    algorithm: str
    secret: bytes | None = field(repr=False)
    jwks: Path | None
    issuer: str
    audience: str
    leeway_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How many requests a second one process takes; None is no limit.

    `per_user` is each user's, or advisor's; `per_service` each service key's; `refused` how many without a credential
    in force it answers to one client address in full.
    """

    per_user: int | None
    per_service: int | None
    refused: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that can be set. Durations are in microseconds.

    `database_url` is None where the embedded PostgreSQL of `home` is to be used; `service_key` where the environment
    has none; `tokens` where none are to be taken; `webhook` where nothing is to be told. Pages of `cors_origins` may
    read answers. `connections_max` is how many connections of clients one process serves at once. `log_requests` is
    whether each request is logged.
    """

    database_url: URL | None
    home: Path
    service_key: str | None = field(repr=False)
    policy: Policy
    heartbeat_us: int
    default_card: RateCard
    reconcile_us: int
    tokens: TokenSettings | None
    user_may: UserMay
    cors_origins: tuple[str, ...]
    limits: RequestLimits
    connections_max: int
    log_format: LogFormat
    log_requests: bool
    webhook: WebhookSettings | None

    @property
    def low_us(self) -> int | None:
        """How long low credits last; None where nobody is to be told."""
        return None if self.webhook is None else self.webhook.low_us


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
        tokens=_tokens(environment),
        user_may=_user_may(environment),
        cors_origins=_cors_origins(environment),
        limits=RequestLimits(
            per_user=_per_second(environment, "USER", "20"),
            per_service=_per_second(environment, "SERVICE", "none"),
            refused=_per_second(environment, "REFUSED", "10"),
        ),
        connections_max=_whole(environment, "TALKTIME_CONNECTIONS_MAX", "10000", CONNECTIONS_MAX),
        log_format=_log_format(environment),
        log_requests=_is_on(environment, "TALKTIME_LOG_REQUESTS"),
        webhook=webhook_of(environment, _seconds(environment, "TALKTIME_BALANCE_LOW_SECONDS", "60", zero=True)),
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


def kept_secret(path: Path) -> str:
    """Return the secret that is kept in a file; at its first use a random one is made there, for the owner alone."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written aside and linked: two starts at once agree on one secret, and a crash leaves a whole one or none.
        descriptor, fresh = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(SECRET_BYTES_MIN) + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            Path(fresh).unlink()
    return path.read_text(errors="replace").strip()


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


def _per_second(environment: Mapping[str, str], who: str, default: str) -> int | None:
    name = f"TALKTIME_{who}_REQUESTS_PER_SECOND"
    if (environment.get(name) or default) == "none":
        return None
    return _whole(environment, name, default, PER_SECOND_MAX, also=", or none")


def _whole(environment: Mapping[str, str], name: str, default: str, highest: int, *, also: str = "") -> int:
    text = environment.get(name) or default
    # Digits are counted first: int() takes long texts for an attack.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(highest)) and 1 <= int(text) <= highest):
        raise SettingError(name, f"must be an integer from 1 to {highest}{also}, not {text!r}")
    return int(text)


def _log_format(environment: Mapping[str, str]) -> LogFormat:
    name = "TALKTIME_LOG_FORMAT"
    text = environment.get(name) or LogFormat.TEXT
    try:
        return LogFormat(text)
    except ValueError:
        raise SettingError(name, f"must be one of {', '.join(LogFormat)}, not {text!r}") from None


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name) or "off"
    if text not in ("on", "off"):
        raise SettingError(name, f"must be on or off, not {text!r}")
    return text == "on"


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
    return parse_database_url(name, text) if text else None


def parse_database_url(name: str, text: str) -> URL:
    """Return the URL of a PostgreSQL database, for its driver here.

    Raises:
        SettingError: it is none; says so of `name`.
    """
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


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(environment: Mapping[str, str]) -> TokenSettings | None:
    given = {name: environment.get(f"TALKTIME_TOKEN_{name}") or None for name in ("SECRET", "JWKS", *_TOKEN_SETTINGS)}
    secret, jwks, issuer = given["SECRET"], given["JWKS"], given["ISSUER"]
    if secret is None and jwks is None:
        for name in _TOKEN_SETTINGS:
            if given[name] is not None:
                raise _token_error(name, "is of no use without TALKTIME_TOKEN_SECRET or TALKTIME_TOKEN_JWKS")
        return None
    if secret is not None and jwks is not None:
        raise _token_error("JWKS", "must not be set together with TALKTIME_TOKEN_SECRET")
    algorithm = _token_algorithm(given["ALGORITHM"], symmetric=secret is not None)
    if issuer is None:
        raise _token_error("ISSUER", "is required: the `iss` of the tokens that are to be taken")
    return TokenSettings(
        algorithm=algorithm,
        secret=None if secret is None else _token_secret(secret),
        jwks=None if jwks is None else Path(jwks).absolute(),
        issuer=issuer,
        audience=given["AUDIENCE"] or "talktime",
        leeway_s=_token_leeway(given["LEEWAY_SECONDS"] or "10"),
    )


def _token_error(name: str, reason: str) -> SettingError:
    return SettingError(f"TALKTIME_TOKEN_{name}", reason)


def _token_algorithm(text: str | None, *, symmetric: bool) -> str:
    if text is None:
        if symmetric:
            return "HS256"
        raise _token_error("ALGORITHM", "is required with TALKTIME_TOKEN_JWKS: RS256 or ES256")
    if text not in ALGORITHMS:
        raise _token_error("ALGORITHM", f"must be one of {', '.join(ALGORITHMS)}, not {text!r}")
    if symmetric and text != "HS256":
        raise _token_error("ALGORITHM", f"must be HS256 with TALKTIME_TOKEN_SECRET; {text} wants TALKTIME_TOKEN_JWKS")
    if not symmetric and text == "HS256":
        raise _token_error("ALGORITHM", "must be RS256 or ES256 with TALKTIME_TOKEN_JWKS")
    return text


def _token_secret(text: str) -> bytes:
    secret = os.fsencode(text)
    if len(secret) < SECRET_BYTES_MIN:
        raise _token_error("SECRET", f"must be at least {SECRET_BYTES_MIN} bytes")
    return secret


def _token_leeway(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 2 and int(text) <= LEEWAY_SECONDS_MAX):  # noqa: PLR2004
        raise _token_error("LEEWAY_SECONDS", f"must be an integer from 0 to {LEEWAY_SECONDS_MAX}, not {text!r}")
    return int(text)


# --- users and pages --------------------------------------------------------------------------------------------------


def _user_may(environment: Mapping[str, str]) -> UserMay:
    name = "TALKTIME_USER_MAY"
    text = environment.get(name) or "beat"
    names = {may.name.lower(): may for may in UserMay}
    if text not in names:
        raise SettingError(name, f"must be one of {', '.join(names)}, not {text!r}")
    return names[text]


_ORIGIN = re.compile(r"(https?)://(?:[a-z0-9](?:[a-z0-9_.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PORT_MAX = 65_535


def _cors_origins(environment: Mapping[str, str]) -> tuple[str, ...]:
    name = "TALKTIME_CORS_ORIGINS"
    text = environment.get(name)
    if not text:
        return ()
    origins = [origin.strip() for origin in text.split(",")]
    for origin in origins:
        if not _is_origin(origin):
            raise SettingError(
                name,
                "must be origins as browsers send them, separated by commas: http or https, a host in lower case, a "
                "port if it is not the scheme's own, and nothing else, as in https://app.example.com; not "
                f"{origin!r}",
            )
    return tuple(dict.fromkeys(origins))


def _is_origin(text: str) -> bool:
    """Tell whether browsers send this as an origin: anything else would never be met, and so never be allowed."""
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    scheme, port = match.groups()
    return port is None or (int(port) <= _PORT_MAX and int(port) != _DEFAULT_PORTS[scheme])
