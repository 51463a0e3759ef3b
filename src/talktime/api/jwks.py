"""The public keys that tokens are verified with, in a file (JWKS, RFC 7517) that may be changed at any time."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import jwt

from talktime.errors import SettingError

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 5
"""How often the file is looked at; so how long a key that was taken out of it may still be taken."""
UNKNOWN_AGAIN_S = 1
"""How often a key id that is not known makes the file be looked at."""
RSA_BITS_MIN = 2048

_NAME = "TALKTIME_TOKEN_JWKS"
_KINDS = {"RS256": ("RSA", None, ("n", "e")), "ES256": ("EC", "P-256", ("x", "y"))}
_NOT_PUBLIC = {"k", "d", "p", "q", "dp", "dq", "qi", "oth", "priv"}


class KeyFile:
    """The keys of a file that are fit for one algorithm, read again when the file has changed.

    A change that cannot be used is logged, and the keys from before stay in force. `generation` counts the readings.
    """

    def __init__(self, path: Path, algorithm: str, *, ticks: Callable[[], float] = monotonic) -> None:
        """Read the file.

        Raises:
            SettingError: it cannot be read, or holds what it must not, or no key that can be used.
        """
        self._path = path
        self._algorithm = algorithm
        self._ticks = ticks
        self._looked_at, self._missed_at = ticks(), -math.inf
        self._mark = self._mark_now()
        self._trouble = ""
        self._keys = _read_keys(path, algorithm)
        self.generation = 0

    def look(self) -> None:
        """Read the file again, if it has not been looked at for a while and has changed since."""
        now = self._ticks()
        if now - self._looked_at >= LOOK_AGAIN_S:
            self._looked_at = now
            self._read_if_changed()

    def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return the key of this id; without an id, the one key, if there is but one.

        A key that is not known may be a new one: the file is looked at.
        """
        key = self._find(key_id)
        if key is None and self._ticks() - self._missed_at >= UNKNOWN_AGAIN_S:
            self._missed_at = self._ticks()
            self._read_if_changed()
            key = self._find(key_id)
        return key

    def _find(self, key_id: str | None) -> jwt.PyJWK | None:
        if key_id is not None:
            return self._keys.get(key_id)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _mark_now(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read_if_changed(self) -> None:
        # The mark is taken first: what is written while the file is read is a further change.
        mark = self._mark_now()
        if mark == self._mark:
            return
        try:
            self._keys = _read_keys(self._path, self._algorithm)
        except SettingError as error:
            # Tried again at the next look, for what is wrong need not change the mark; but told once.
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("%s; the keys from before stay in force", error)  # noqa: TRY400 - the traceback says no more
            return
        self._mark, self._trouble = mark, ""
        self.generation += 1
        log.info("%s: %d keys were read", _NAME, len(self._keys))


def _read_keys(path: Path, algorithm: str) -> dict[str | None, jwt.PyJWK]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise SettingError(_NAME, f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise SettingError(_NAME, f"{path} is not JSON") from None
    found = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise SettingError(_NAME, f"{path} must hold an object with a list of `keys`")
    if any(entry.get("kty") == "oct" or _NOT_PUBLIC & entry.keys() for entry in found):
        raise SettingError(_NAME, f"{path} holds a private or symmetric key; it must hold public keys only")
    keys: dict[str | None, jwt.PyJWK] = {}
    for entry in found:
        key = _key_of(entry, algorithm, path)
        if key is None:
            continue
        key_id = entry.get("kid")
        if key_id is not None and not isinstance(key_id, str):
            raise SettingError(_NAME, f"{path} holds a `kid` that is not a string")
        if key_id in keys:
            raise SettingError(_NAME, f"{path} holds two keys with " + (f"the kid {key_id!r}" if key_id else "no kid"))
        keys[key_id] = key
    if not keys:
        raise SettingError(_NAME, f"{path} holds no key that can be used for {algorithm}")
    return keys


def _key_of(entry: dict[str, Any], algorithm: str, path: Path) -> jwt.PyJWK | None:
    """Take one key of the file; None if it is for something else, or too weak."""
    kind, curve, members = _KINDS[algorithm]
    operations = entry.get("key_ops", ["verify"])
    if (
        entry.get("kty") != kind
        or entry.get("crv") != curve
        or entry.get("use", "sig") != "sig"
        or entry.get("alg", algorithm) != algorithm
        or not (isinstance(operations, list) and "verify" in operations)
    ):
        return None
    damaged = SettingError(_NAME, f"{path} holds a damaged {kind} key")
    if not all(isinstance(entry.get(name), str) for name in members):
        raise damaged
    try:
        key = jwt.PyJWK(entry, algorithm)
    except (jwt.PyJWTError, ValueError):
        raise damaged from None
    return None if kind == "RSA" and key.key.key_size < RSA_BITS_MIN else key
