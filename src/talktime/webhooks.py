"""Where what happens is told: the settings of webhooks."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from talktime.errors import SettingError

SECRET_BYTES = range(24, 65)
"""How long the secrets of Standard Webhooks are."""

_SECRET = re.compile(r"whsec_([A-Za-z0-9+/]+={0,2})")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSettings:
    """The address that events are sent to, and the secrets that sign them: with each, so that one can be replaced.

    Credits that last for no longer than `low_us` are low.
    """

    url: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    low_us: int


def webhook_of(environment: Mapping[str, str], low_us: int) -> WebhookSettings | None:
    """Read ``TALKTIME_WEBHOOK_...``; None where no address is set.

    Raises:
        SettingError: a value is out of its domain. It is not repeated, for it is a secret, or may hold one.
    """
    url, secrets = (environment.get(f"TALKTIME_WEBHOOK_{name}", "") for name in ("URL", "SECRET"))
    if not url:
        if secrets:
            raise SettingError("TALKTIME_WEBHOOK_SECRET", "is of no use without TALKTIME_WEBHOOK_URL")
        return None
    if not _is_fit(url):
        raise SettingError("TALKTIME_WEBHOOK_URL", "must be an https:// URL, or http:// to a loopback address")
    found = tuple(secrets.split())
    if not found or not all(map(_is_secret, found)):
        reason = "must be whsec_ and 24 to 64 bytes in base64, or several such with spaces between them"
        raise SettingError("TALKTIME_WEBHOOK_SECRET", reason)
    return WebhookSettings(url=url, secrets=found, low_us=low_us)


def _is_fit(text: str) -> bool:
    if not text.isascii() or not text.isprintable() or " " in text:
        return False
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        return False
    return bool(host) and port != 0 and (url.scheme == "https" or (url.scheme == "http" and host in _LOOPBACK))


def _is_secret(text: str) -> bool:
    match = _SECRET.fullmatch(text)
    with contextlib.suppress(ValueError):
        return match is not None and len(base64.b64decode(match[1], validate=True)) in SECRET_BYTES
    return False
