"""Everything that is stored of an account, for those who check it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from talktime.meter.state import Account, Allowance, Chat, Segment
from talktime.store import tables
from talktime.store.accounts import chat_from
from talktime.store.ledger import LedgerEntry, entry_from, segment_from

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class History:
    """An account with all its chats, allowances, closed segments (oldest first per chat) and ledger entries."""

    account: Account
    next_entry: int
    due_at: int | None
    segments: dict[str, list[Segment]]
    entries: list[LedgerEntry]


async def load_buckets(connection: AsyncConnection) -> dict[int, int]:
    """Count the accounts in each bucket that has any."""
    account = tables.account
    rows = await connection.execute(select(account.c.bucket, func.count()).group_by(account.c.bucket))
    return dict(sorted((bucket, count) for bucket, count in rows.all()))


async def is_unused(connection: AsyncConnection) -> bool:
    """Tell whether there is neither an account nor a rate card; for one snapshot."""
    card = await connection.scalar(select(tables.advisor.c.advisor_id).limit(1))
    return card is None and not await load_buckets(connection)


async def load_histories(connection: AsyncConnection, *, bucket: int, after: str, limit: int) -> list[History]:
    """Read the next accounts of a bucket beyond the user id `after`; for one snapshot, so that all of it agrees."""
    account, chat, allowance = tables.account, tables.chat, tables.allowance
    segment, entry = tables.segment, tables.ledger_entry
    accounts = (
        await connection.execute(
            select(account)
            .where(account.c.bucket == bucket, account.c.user_id > after)
            .order_by(account.c.user_id)
            .limit(limit)
        )
    ).all()
    users = func.any([row.user_id for row in accounts])
    chats: dict[str, dict[str, Chat]] = defaultdict(dict)
    for row in await connection.execute(select(chat).where(chat.c.bucket == bucket, chat.c.user_id == users)):
        chats[row.user_id][row.chat_id] = chat_from(row)
    allowances: dict[str, dict[str, Allowance]] = defaultdict(dict)
    for row in await connection.execute(
        select(allowance).where(allowance.c.bucket == bucket, allowance.c.user_id == users)
    ):
        allowances[row.user_id][row.advisor_id] = Allowance(row.granted_us, row.used_us)
    segments: dict[str, dict[str, list[Segment]]] = defaultdict(lambda: defaultdict(list))
    for row in await connection.execute(
        select(segment).where(segment.c.bucket == bucket, segment.c.user_id == users).order_by(segment.c.started_at)
    ):
        segments[row.user_id][row.chat_id].append(segment_from(row))
    entries: dict[str, list[LedgerEntry]] = defaultdict(list)
    for row in await connection.execute(
        select(entry).where(entry.c.bucket == bucket, entry.c.user_id == users).order_by(entry.c.number)
    ):
        entries[row.user_id].append(entry_from(row))
    return [
        History(
            Account(
                user_id=row.user_id,
                at=row.materialized_through,
                balance=row.balance,
                allowances=allowances[row.user_id],
                chats=chats[row.user_id],
            ),
            row.next_entry,
            row.due_at,
            segments[row.user_id],
            entries[row.user_id],
        )
        for row in accounts
    ]
