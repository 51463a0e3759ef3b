"""The service keys in force, held in memory, since every request asks for one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from talktime.errors import DatabaseUnavailable
from talktime.keys import ENVIRONMENT, digest_of

READ_AGAIN_S = 5
"""How long a revoked key may still open: what is held is read again when it is this old."""
UNKNOWN_AGAIN_S = 1
"""How often keys that are not known may make the ring ask the database: a flood of them is no flood of queries."""


class KeyRing:
    """The environment's key, and those of the database as they were a moment ago.

    Keys are looked up by their SHA-256. How long that takes tells something of digests at most, and nobody can choose
    the digest of what is tried, nor find a key by its digest.
    """

    def __init__(
        self,
        environment_key: str | None,
        load: Callable[[], Awaitable[Mapping[bytes, str]]],
        *,
        ticks: Callable[[], float] = monotonic,
    ) -> None:
        self._environment = None if environment_key is None else digest_of(environment_key)
        self._load = load
        self._ticks = ticks
        self._names: Mapping[bytes, str] = {}
        self._loaded_at = self._missed_at = self._failed_at = -math.inf
        self._loading = asyncio.Lock()

    def is_environment(self, digest: bytes) -> bool:
        """Tell whether this is the digest of the environment's key; that needs no database."""
        return digest == self._environment

    async def find(self, digest: bytes) -> str | None:
        """Return the name of the key in force that has this digest.

        Raises:
            DatabaseUnavailable: the database cannot be asked.
        """
        if self.is_environment(digest):
            return ENVIRONMENT
        if self._is_stale(digest):
            # Those who wait here find it done, or failed, by the one before them.
            async with self._loading:
                if self._is_stale(digest):
                    await self._read()
                    if digest not in self._names:
                        self._missed_at = self._ticks()
        return self._names.get(digest)

    def _is_stale(self, digest: bytes) -> bool:
        now = self._ticks()
        if now - self._loaded_at >= READ_AGAIN_S:
            return True
        return digest not in self._names and now - self._missed_at >= UNKNOWN_AGAIN_S

    async def _read(self) -> None:
        began = self._ticks()
        if began - self._failed_at < UNKNOWN_AGAIN_S:
            message = "the database is not available"
            raise DatabaseUnavailable(message)
        try:
            self._names = await self._load()
        except DatabaseUnavailable:
            self._failed_at = self._ticks()
            raise
        self._loaded_at = began
