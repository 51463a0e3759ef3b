"""Readings and heartbeats by the batch, on a connection of the driver's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from talktime.meter.state import Account, Allowance, Chat
from talktime.store import statements as sql
from talktime.store.accounts import chat_from
from talktime.store.sending import send
from talktime.store.tables import bucket_of, datetime_of

if TYPE_CHECKING:
    from psycopg import AsyncConnection

ChatKey: TypeAlias = tuple[str, str]
"""A user id and a chat id."""

_CHAT_BEGINS = 4
"""Where the columns of the chat begin in a row of `READ_WANTED`; behind them are two of its allowance."""


class Loaded(NamedTuple):
    """What a reading needs: the account with its running chats and the chat that was wanted, and the instant."""

    account: Account
    now: int


async def load_many(connection: AsyncConnection[Any], keys: Sequence[ChatKey]) -> dict[ChatKey, Loaded]:
    """Read what the readings of these chats need, in one statement and so in one snapshot, and lock nothing.

    Users without an account are left out. A chat that does not exist is not in its account.
    """
    reading = await send(connection, sql.READ_WANTED, _arrays(keys))
    return _loaded(keys, await reading.fetchall())


async def beat_many(connection: AsyncConnection[Any], keys: Sequence[ChatKey]) -> dict[ChatKey, Loaded]:
    """Renew the leases of those of these chats that run, in a transaction, and read what their readings need.

    Left out are chats whose clock does not run or whose lease has ended, and those that somebody holds locked.
    """
    return await renew(connection, *await lock_beating(connection, keys))


async def lock_beating(connection: AsyncConnection[Any], keys: Sequence[ChatKey]) -> tuple[list[ChatKey], int]:
    """Begin a transaction, lock the chats whose leases can be renewed, and read the clock.

    What locks in order and skips what is locked waits for nobody; so lock and clock may share a statement.
    """
    async with connection.pipeline():
        await connection.execute("BEGIN")
        locking = await send(connection, sql.LOCK_BEATING_CHATS, _arrays(keys))
    rows = await locking.fetchall()
    # One instant for all: that at which the last of them was locked.
    now = max((now for _, now, _, _ in rows), default=0)
    return [keys[place - 1] for place, _, beat_at, lease_us in rows if now < beat_at + lease_us], now


async def renew(connection: AsyncConnection[Any], keys: Sequence[ChatKey], now: int) -> dict[ChatKey, Loaded]:
    """Renew the leases of locked chats, never backwards; read what their readings need, and commit."""
    if not keys:
        await connection.execute("COMMIT")
        return {}
    arrays = _arrays(keys)
    async with connection.pipeline():
        await send(connection, sql.RENEW_LEASES, {**arrays, "at": datetime_of(now)})
        reading = await send(connection, sql.READ_WANTED, arrays)
        await connection.execute("COMMIT")
    return _loaded(keys, await reading.fetchall())


def _arrays(keys: Sequence[ChatKey]) -> dict[str, str]:
    return sql.arrays("of_", sql.CHAT_KEY, [(bucket_of(user_id), user_id, chat_id) for user_id, chat_id in keys])


def _loaded(keys: Sequence[ChatKey], rows: Sequence[Sequence[Any]]) -> dict[ChatKey, Loaded]:
    """Put rows of `READ_WANTED` together: one for each chat that was found at a place, or one without a chat."""
    rows_at: dict[int, list[Sequence[Any]]] = defaultdict(list)
    for row in rows:
        rows_at[row[0]].append(row)
    found: dict[ChatKey, Loaded] = {}
    for place, group in rows_at.items():
        _, now, balance, at = group[0][:_CHAT_BEGINS]
        chats: dict[str, Chat] = {}
        allowances: dict[str, Allowance] = {}
        for row in group:
            if row[-1] is not None:
                chat = chat_from(row[_CHAT_BEGINS:-2])
                chats[chat.chat_id] = chat
                allowances[chat.advisor_id] = Allowance(row[-2], row[-1])
        user_id, _ = key = keys[place - 1]
        found[key] = Loaded(Account(user_id, at, balance, allowances, chats), now)
    return found
