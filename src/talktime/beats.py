"""Heartbeats of many chats in one request, for whoever holds the connections of many users."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from talktime.errors import DatabaseUnavailable, TalktimeError
from talktime.meter.advance import advance
from talktime.meter.state import Account, ChatState
from talktime.operations import Service, heartbeat_at_length
from talktime.store.batches import ChatKey, Loaded, keep_running

if TYPE_CHECKING:
    from talktime.store.database import Line

T = TypeVar("T")

log = logging.getLogger(__name__)

Beaten: TypeAlias = ChatState | Exception
"""What became of a heartbeat: the chat's state now, or why there is none."""

ITEMS_AT_ONCE = 500
USERS_AT_ONCE = 8
SECONDS_MAX = 6
"""How long is waited for the database: then what is there is answered, and of the rest that it is not.

To break a statement off can take the driver 5 s more, and then there is still to be an answer in the server's time.
"""


async def heartbeats(service: Service, keys: Sequence[ChatKey]) -> list[Beaten]:
    """Renew the leases of many chats, as so many calls of `talktime.operations.heartbeat` in this order would.

    Returns what became of each. A chat that comes again gets the same answer again.

    Raises:
        DatabaseUnavailable: for none of them was there an answer.
    """
    found: dict[ChatKey, Beaten] = {}
    wanted = list(dict.fromkeys(keys))
    # What is not done in time is not done at all: later it would set clocks going again whose pages are long gone.
    try:
        async with asyncio.timeout(SECONDS_MAX):
            await _beat_all(service, found, wanted)
    except TimeoutError:
        late = DatabaseUnavailable("there was no answer in time; repeat the heartbeat")
        found = dict.fromkeys(wanted, late) | found
    if wanted and all(isinstance(beaten, DatabaseUnavailable) for beaten in found.values()):
        raise DatabaseUnavailable(str(found[wanted[0]]))
    return [found[key] for key in keys]


async def _beat_all(service: Service, found: dict[ChatKey, Beaten], wanted: Sequence[ChatKey]) -> None:
    chunks = [wanted[place : place + ITEMS_AT_ONCE] for place in range(0, len(wanted), ITEMS_AT_ONCE)]
    await _share(chunks, [partial(_beat_chunk, service, line, found) for line in service.lines])
    left: dict[str, list[ChatKey]] = defaultdict(list)
    for key in wanted:
        if key not in found:
            left[key[0]].append(key)
    await _share(left.values(), [partial(_beat_singly, service, found)] * USERS_AT_ONCE)


async def _share(work: Iterable[T], workers: Sequence[Callable[[T], Coroutine[Any, Any, None]]]) -> None:
    """Do the pieces of a work, each by whichever worker is free."""
    waiting = iter(work)

    async def go_on(worker: Callable[[T], Coroutine[Any, Any, None]]) -> None:
        for piece in waiting:
            await worker(piece)

    async with asyncio.TaskGroup() as tasks:
        for worker in workers:
            tasks.create_task(go_on(worker))


async def _beat_chunk(
    service: Service, line: Line, found: dict[ChatKey, Beaten], keys: Sequence[ChatKey], *, halved: bool = False
) -> None:
    try:
        beaten = await service.batch(line, keep_running, keys)
    except DatabaseUnavailable as error:
        found.update(dict.fromkeys(keys, error))
    except Exception:
        if not halved:
            log.exception("a batch of %d heartbeats failed; it is halved until it shows why", len(keys))
        # What fails by itself is left to go the full way, and the others get their answers.
        middle = len(keys) // 2
        if middle:
            await _beat_chunk(service, line, found, keys[:middle], halved=True)
            await _beat_chunk(service, line, found, keys[middle:], halved=True)
    else:
        found.update(_states(beaten))


def _states(beaten: Mapping[ChatKey, Loaded | None]) -> dict[ChatKey, ChatState]:
    """Return what the chats do now. Nothing is foretold, for no reading is asked for; a user's share an account."""
    found = dict.fromkeys(beaten, ChatState.RUNNING)
    views: dict[str, Account] = {}
    for (user_id, chat_id), loaded in beaten.items():
        if loaded is not None:
            if user_id not in views:
                views[user_id] = advance(loaded.account, max(loaded.now, loaded.account.at))
            found[user_id, chat_id] = views[user_id].chats[chat_id].state
    return found


async def _beat_singly(service: Service, found: dict[ChatKey, Beaten], keys: Sequence[ChatKey]) -> None:
    for key in keys:
        try:
            found[key] = (await heartbeat_at_length(service, *key)).state
        except TalktimeError as error:
            found[key] = error
        except Exception as error:
            log.exception("a heartbeat failed")
            found[key] = error
