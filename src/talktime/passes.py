"""The reconciler's part of a pass: what is due, and one batch of it, materialized in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from talktime.errors import DatabaseUnavailable, LockTimeout
from talktime.meter.advance import advance
from talktime.store import accounts

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.store.database import Database


class BatchFailed(Exception):
    """A batch could not be materialized and was rolled back; `user_ids` are the accounts that it held."""

    def __init__(self, user_ids: list[str]) -> None:
        self.user_ids = user_ids
        super().__init__(f"{len(user_ids)} accounts from {user_ids[0]!r} to {user_ids[-1]!r} were not materialized")


async def due(database: Database) -> tuple[dict[int, int], int, int]:
    """Look up the work due: accounts per bucket, the instant of the look-up, and the oldest materialized instant."""
    return await database.transaction(accounts.load_due)


async def materialize(
    database: Database, bucket: int, *, after: str, before: int, limit: int, low_us: int | None = None
) -> tuple[int, int, str | None]:
    """Write one batch of due accounts of a bucket as they stand now.

    Takes accounts beyond the user id `after` that were not materialized since the instant `before`. Returns how many
    accounts and chats were written, and the last user id, or None if the bucket has nothing more. What happened to them
    is to be told, unless `low_us`, how long low credits last, is None.

    Raises:
        BatchFailed: an account of the batch cannot be written.
        DatabaseUnavailable: no answer.
    """
    held: list[str] = []

    async def work(connection: AsyncConnection) -> tuple[int, int, str | None]:
        rows = await accounts.lock_due(connection, bucket, after=after, before=before, limit=limit)
        held[:] = [row[1] for row in rows]
        if not held:
            return 0, 0, None
        batch, now = await accounts.lock_chats(connection, bucket, rows)
        changes = [(stored, advance(stored.account, max(now, stored.account.at))) for stored in batch]
        await accounts.save(connection, changes, low_us)
        return len(batch), sum(len(a.chats) for _, a in changes), held[-1] if len(batch) == limit else None

    try:
        return await database.transaction(work)
    except Exception as error:
        # A database that is away is nobody's fault; a row that somebody holds, or that cannot be written, is one's.
        if not held or (isinstance(error, DatabaseUnavailable) and not isinstance(error, LockTimeout)):
            raise
        raise BatchFailed(held) from error
