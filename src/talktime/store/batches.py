"""Readings and heartbeats by the batch, on a connection of the driver's own.

On a Citus cluster a batch goes bucket by bucket: there each function is called with the one bucket that its chats are
in, and its statements say so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from talktime.meter.state import Account
from talktime.store import statements as sql
from talktime.store.accounts import account_from
from talktime.store.sending import send
from talktime.store.tables import bucket_of, datetime_of

if TYPE_CHECKING:
    from psycopg import AsyncConnection, AsyncCursor

T = TypeVar("T")

ChatKey: TypeAlias = tuple[str, str]
"""A user id and a chat id."""


class Loaded(NamedTuple):
    """What readings need: the account with its running chats and those that were wanted, and the instant."""

    account: Account
    now: int


class Locked(NamedTuple):
    """Chats whose leases can be renewed, those of them that may have run out of credits, and the instant.

    `sent` are the parameters that name the first.
    """

    alive: Sequence[ChatKey]
    unsure: Sequence[ChatKey]
    now: int
    sent: dict[str, Any]


class BatchWork(Protocol[T]):
    """One of the functions below: chats, all of one bucket if there is one given -> what was found of each."""

    async def __call__(  # noqa: D102 - the class says it
        self, connection: AsyncConnection[Any], keys: Sequence[ChatKey], *, bucket: int | None = None
    ) -> dict[ChatKey, T]: ...


async def by_bucket(work: BatchWork[T], connection: AsyncConnection[Any], keys: Sequence[ChatKey]) -> dict[ChatKey, T]:
    """Do the work for one bucket after the other."""
    keys_in: dict[int, list[ChatKey]] = defaultdict(list)
    for key in keys:
        keys_in[bucket_of(key[0])].append(key)
    found: dict[ChatKey, T] = {}
    for bucket, those in keys_in.items():
        found |= await work(connection, those, bucket=bucket)
    return found


async def load_many(
    connection: AsyncConnection[Any], keys: Sequence[ChatKey], *, bucket: int | None = None
) -> dict[ChatKey, Loaded]:
    """Read what the readings of these chats need, in one statement and so in one snapshot, and lock nothing.

    Users without an account are left out. A chat that does not exist is not in its account.
    """
    reading = await _send_reading(connection, keys, bucket)
    return _loaded(keys, await reading.fetchall())


async def beat_many(
    connection: AsyncConnection[Any], keys: Sequence[ChatKey], *, bucket: int | None = None
) -> dict[ChatKey, Loaded]:
    """Renew the leases of those of these chats that run, in a transaction, and read what their readings need.

    Left out are chats whose clock does not run or whose lease has ended, and those that somebody holds locked.
    """
    locked = await lock_beating(connection, keys, bucket=bucket)
    return await renew(connection, locked, reading=locked.alive, bucket=bucket)


async def keep_running(
    connection: AsyncConnection[Any], keys: Sequence[ChatKey], *, bucket: int | None = None
) -> dict[ChatKey, Loaded | None]:
    """Renew leases as `beat_many` does, and read of whom more is needed than the chat's row to know that it runs.

    Of all others, None says that the clock runs.
    """
    locked = await lock_beating(connection, keys, bucket=bucket)
    read = await renew(connection, locked, reading=locked.unsure, bucket=bucket)
    return {**dict.fromkeys(locked.alive), **read}


async def lock_beating(
    connection: AsyncConnection[Any], keys: Sequence[ChatKey], *, bucket: int | None = None
) -> Locked:
    """Begin a transaction, lock the chats whose leases can be renewed, and read the clock.

    What locks in order and skips what is locked waits for nobody; so lock and clock may share a statement.
    """
    lock = sql.LOCK_BEATING_CHATS if bucket is None else sql.LOCK_BEATING_CHATS_IN_BUCKET
    sent = _arrays(keys, bucket)
    async with connection.pipeline():
        await connection.execute("BEGIN")
        locking = await send(connection, lock, sent)
    rows = await locking.fetchall()
    # One instant for all: that at which the last of them was locked.
    now = max((row[1] for row in rows), default=0)
    alive: list[ChatKey] = []
    unsure: list[ChatKey] = []
    for place, _, beat_at, lease_us, exhausts_at in rows:
        if now < beat_at + lease_us:
            alive.append(keys[place - 1])
            if exhausts_at is None or exhausts_at <= now:
                unsure.append(keys[place - 1])
    # As a rule it is all of them: then what was written down for the one statement serves for the other.
    if len(alive) < len(keys):
        sent = _arrays(alive, bucket) if alive else {}
    return Locked(alive, unsure, now, sent)


async def renew(
    connection: AsyncConnection[Any], locked: Locked, *, reading: Sequence[ChatKey], bucket: int | None = None
) -> dict[ChatKey, Loaded]:
    """Renew the leases of locked chats, never backwards; read what the readings of some of them need, and commit."""
    if not locked.alive:
        await connection.execute("COMMIT")
        return {}
    renewal = sql.RENEW_LEASES if bucket is None else sql.RENEW_LEASES_IN_BUCKET
    async with connection.pipeline():
        await send(connection, renewal, {**locked.sent, "at": datetime_of(locked.now)})
        read = await _send_reading(connection, reading, bucket) if reading else None
        await connection.execute("COMMIT")
    return {} if read is None else _loaded(reading, await read.fetchall())


async def _send_reading(
    connection: AsyncConnection[Any], keys: Sequence[ChatKey], bucket: int | None
) -> AsyncCursor[Any]:
    if bucket is None:
        leading = dict(keys)
        rows = [(bucket_of(user_id), user_id, chat_id, chat_id == leading[user_id]) for user_id, chat_id in keys]
        return await send(connection, sql.READ_WANTED, sql.arrays("of_", sql.READ_KEY, rows))
    users, chats = zip(*keys, strict=True)
    place = {"in_bucket": bucket, "of_users": sql.array_literal(users), "of_chats": sql.array_literal(chats)}
    return await send(connection, sql.READ_RUNNING_AND_THESE, place)


def _loaded(keys: Sequence[ChatKey], rows: Sequence[Sequence[Any]]) -> dict[ChatKey, Loaded]:
    """Put the rows together: one account for each user, with all that was read for any of this user's chats."""
    rows_of: dict[str, list[Sequence[Any]]] = defaultdict(list)
    for row in rows:
        rows_of[row[0]].append(row)
    loaded = {user_id: Loaded(*account_from(user_id, of_user)) for user_id, of_user in rows_of.items()}
    return {key: loaded[key[0]] for key in keys if key[0] in loaded}


def _arrays(keys: Sequence[ChatKey], bucket: int | None) -> dict[str, Any]:
    rows = [(bucket_of(user_id), user_id, chat_id) for user_id, chat_id in keys]
    return sql.arrays("of_", sql.CHAT_KEY, rows) | ({} if bucket is None else {"in_bucket": bucket})
