"""Running a program's event loop until it is done or told to stop."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_STOPPING = (signal.SIGINT, signal.SIGTERM)


def settle() -> None:
    """Keep what was loaded for good, all that there is so far, out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


def run_until_signalled(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run `main` with an event that SIGINT and SIGTERM set.

    Once it has returned, both signals are ignored: what is left to do is to stop what was started, and a second Ctrl-C
    must not leave it behind.
    """

    async def run() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Not the loop's own handlers: it restores the default ones when it closes, and those kill.
        for number in _STOPPING:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
        try:
            return await main(stop)
        finally:
            for number in _STOPPING:
                signal.signal(number, signal.SIG_IGN)

    return asyncio.run(run())
