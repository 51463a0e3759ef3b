"""Batches: requests that arrive while a statement runs share the next one (group commit)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextvars import Context
from itertools import islice
from typing import Generic, TypeVar

from talktime.errors import DatabaseUnavailable, Overloaded

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

log = logging.getLogger(__name__)

ITEMS_MAX = 500
WAITING_MAX = 10_000
"""As many as a process takes connections by default: all of these may ask at once, and are answered.

Where more connections are allowed, those beyond had better come again than wait for longer than there is time.
"""


class Batcher(Generic[K, V]):
    """Answers items by the batch: one batch at a time, of all that came while the one before was under way.

    `answer` is given different items and returns what it has for each; for those that it leaves out, the answer is
    None. Whoever asks for the same item while it waits shares its answer.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]],
        *,
        items_max: int = ITEMS_MAX,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        self._answer = answer
        self._items_max = items_max
        self._waiting_max = waiting_max
        self._waiting: dict[K, list[asyncio.Future[V | None]]] = {}
        self._askers = 0
        self._working: asyncio.Task[None] | None = None
        self.observe: Callable[[int], None] = _unobserved
        """Called with the size of each batch."""

    @property
    def waiting(self) -> int:
        """How many wait for an answer."""
        return self._askers

    async def ask(self, item: K) -> V | None:
        """Return the answer for an item, asked for after this call began.

        Raises:
            Overloaded: too many wait already.
            Exception: whatever the answering of this item raised. What it raises for others is not this item's.
        """
        if self._askers >= self._waiting_max:
            raise Overloaded
        future: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(item, []).append(future)
        if self._working is None:
            # In a context of its own: what is logged of a batch is of no single request.
            self._working = asyncio.create_task(self._work(), context=Context())
        self._askers += 1
        try:
            return await future
        except asyncio.CancelledError:
            self._forget(item, future)
            raise
        finally:
            self._askers -= 1

    async def drain(self) -> None:
        """Wait until nobody waits."""
        while self._working is not None:
            # Not awaited itself: whoever gives up waiting here would cancel it, and with it those who wait for answers.
            await asyncio.wait([self._working])

    def _forget(self, item: K, future: asyncio.Future[V | None]) -> None:
        """Let nothing wait for one who gave up, unless others wait for it too or it is under way."""
        futures = self._waiting.get(item, [])
        if future in futures:
            futures.remove(future)
            if not futures:
                del self._waiting[item]

    async def _work(self) -> None:
        try:
            while self._waiting:
                items = list(islice(self._waiting, self._items_max))
                self.observe(len(items))
                await self._serve({item: self._waiting.pop(item) for item in items})
        finally:
            self._working = None

    async def _serve(self, batch: Mapping[K, Sequence[asyncio.Future[V | None]]], *, halved: bool = False) -> None:
        try:
            answers = await self._answer(list(batch))
        except DatabaseUnavailable as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            # One of them made it fail. By itself, it fails alone.
            if not halved:
                log.exception("a batch of %d failed; it is halved until it shows why", len(batch))
            items = list(batch.items())
            middle = len(items) // 2
            await self._serve(dict(items[:middle]), halved=True)
            await self._serve(dict(items[middle:]), halved=True)
        else:
            for item, futures in batch.items():
                for future in futures:
                    if not future.done():  # nobody waits for one that was cancelled
                        future.set_result(answers.get(item))


def _unobserved(_: int) -> None:
    """Leave it at that."""


def _fail(batch: Mapping[K, Sequence[asyncio.Future[V | None]]], error: Exception) -> None:
    for futures in batch.values():
        for future in futures:
            if not future.done():
                future.set_exception(error)
