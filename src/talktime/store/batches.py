"""Readings and heartbeats by the batch, on a connection of the driver's own.

What SQLAlchemy does for a statement costs here as much as the whole batch. So these few statements are built with it
and sent past it: as text, with arrays as literals, and in one go (a pipeline) where none waits for another. Instants
come as integers straight from PostgreSQL's binary format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from psycopg.adapt import Loader
from psycopg.pq import Format
from sqlalchemy.dialects.postgresql import psycopg as dialect

from talktime.meter.state import Account, Allowance, Chat
from talktime.store import statements as sql
from talktime.store.accounts import chat_from
from talktime.store.tables import EPOCH, bucket_of, datetime_of

if TYPE_CHECKING:
    from psycopg import AsyncConnection, AsyncCursor
    from sqlalchemy.sql import ClauseElement

ChatKey: TypeAlias = tuple[str, str]
"""A user id and a chat id."""

_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy's dialects come without types


def _text(statement: ClauseElement) -> str:
    return str(statement.compile(dialect=_DIALECT))


_LOCK = _text(sql.LOCK_BEATING_CHATS)
_RENEW = _text(sql.RENEW_LEASES)
_READ = _text(sql.READ_WANTED)

_CHAT_BEGINS = 4
"""Where the columns of the chat begin in a row of `READ_WANTED`; behind them are two of its allowance."""

_YEAR_2000_US = (datetime(2000, 1, 1, tzinfo=UTC) - EPOCH).days * 86_400 * 1_000_000


class _InstantLoader(Loader):
    """Reads ``timestamptz`` as microseconds since 1970: PostgreSQL sends those since 2000, as a 64-bit integer."""

    format = Format.BINARY

    def load(self, data: bytes | bytearray | memoryview) -> int:
        """Return the instant."""
        return int.from_bytes(data, "big", signed=True) + _YEAR_2000_US


class Loaded(NamedTuple):
    """What a reading needs: the account with its running chats and the chat that was wanted, and the instant."""

    account: Account
    now: int


async def load_many(connection: AsyncConnection[Any], keys: Sequence[ChatKey]) -> dict[ChatKey, Loaded]:
    """Read what the readings of these chats need, in one statement and so in one snapshot, and lock nothing.

    Users without an account are left out. A chat that does not exist is not in its account.
    """
    reading = _cursor(connection)
    await reading.execute(_READ, _arrays(keys))
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
    locking = _cursor(connection)
    async with connection.pipeline():
        await connection.execute("BEGIN")
        await locking.execute(_LOCK, _arrays(keys))
    rows = await locking.fetchall()
    # One instant for all: that at which the last of them was locked.
    now = max((now for _, now, _, _ in rows), default=0)
    return [keys[place - 1] for place, _, beat_at, lease_us in rows if now < beat_at + lease_us], now


async def renew(connection: AsyncConnection[Any], keys: Sequence[ChatKey], now: int) -> dict[ChatKey, Loaded]:
    """Renew the leases of locked chats, never backwards; read what their readings need, and commit."""
    reading = _cursor(connection)
    async with connection.pipeline():
        if keys:
            arrays = _arrays(keys)
            await connection.execute(_RENEW, {**arrays, "at": datetime_of(now)})
            await reading.execute(_READ, arrays)
        await connection.execute("COMMIT")
    return _loaded(keys, await reading.fetchall()) if keys else {}


def _cursor(connection: AsyncConnection[Any]) -> AsyncCursor[Any]:
    cursor = connection.cursor(binary=True)
    cursor.adapters.register_loader("timestamptz", _InstantLoader)
    return cursor


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
