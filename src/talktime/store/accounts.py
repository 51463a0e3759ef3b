"""Account states: locked for a change and saved (singly or in batches), or read in one snapshot.

`lock` and `lock_due` follow the locking order of this room, each step its own statement. `save` writes what a change
made different, with one statement per table whatever the number of accounts, all of one bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert
from sqlalchemy.dialects.postgresql import insert as insert_or_nothing

from talktime.meter.state import RESUMABLE, Account, Allowance, Chat, ChatState, StopReason, Tariff
from talktime.store import statements as sql
from talktime.store import tables
from talktime.store.ledger import LedgerEntry, entries_of, insert_history
from talktime.store.tables import bucket_of

if TYPE_CHECKING:
    from sqlalchemy import Row, Table, Update
    from sqlalchemy.ext.asyncio import AsyncConnection

_account, _allowance, _chat = tables.account, tables.allowance, tables.chat


@dataclass(frozen=True, slots=True)
class Stored:
    """An account as it is stored, and the number of its next ledger entry."""

    account: Account
    next_entry: int

    @property
    def booked(self) -> int:
        """The running sum of the ledger: the balance and what open segments had cost when it was materialized."""
        return self.account.balance + sum(chat.accrued for chat in self.account.chats.values())


@dataclass(frozen=True, slots=True)
class Beat:
    """A running chat whose row a fast heartbeat holds locked, and the instant that was read under the lock."""

    now: int
    lease_end: int


# --- locking ----------------------------------------------------------------------------------------------------------


async def lock(
    connection: AsyncConnection, user_id: str, *, chat_id: str | None = None, advisor_id: str | None = None
) -> tuple[Stored, int] | None:
    """Lock an account with its live chats and, in whatever state, the chat `chat_id`; then read the clock.

    Returns the stored account, with the allowances of its chats' advisors and of `advisor_id`, and the instant in
    microseconds; None if there is no such account.
    """
    bucket = bucket_of(user_id)
    accounts = (await connection.execute(sql.LOCK_ACCOUNT, {"in_bucket": bucket, "of_user": user_id})).all()
    if not accounts:
        return None
    stored, now = await lock_chats(connection, bucket, accounts, chat_id, advisor_id)
    return stored[0], now


async def lock_or_create(
    connection: AsyncConnection, user_id: str, *, chat_id: str | None = None, advisor_id: str | None = None
) -> tuple[Stored, int]:
    """Lock an account as `lock` does, and make it first, with a balance of zero, if there is none."""
    locked = await lock(connection, user_id, chat_id=chat_id, advisor_id=advisor_id)
    if locked is None:
        await connection.execute(
            insert_or_nothing(_account)
            .values(
                bucket=bucket_of(user_id), user_id=user_id, balance=0, materialized_through=0, next_entry=1, due_at=None
            )
            .on_conflict_do_nothing()
        )
        locked = await lock(connection, user_id, chat_id=chat_id, advisor_id=advisor_id)
    if locked is None:
        message = "an account row is never deleted"
        raise AssertionError(message)
    return locked


async def lock_due(
    connection: AsyncConnection, bucket: int, *, after: str, before: int, limit: int
) -> Sequence[Row[Any]]:
    """Lock the next account rows of a bucket, beyond the user id `after`, that have something to materialize.

    Accounts that somebody else holds are skipped, since whoever holds them advances them; so are those that were
    materialized at or after the instant `before`. Returns the rows in user_id order, for `lock_chats`.
    """
    found = await connection.execute(
        sql.LOCK_DUE_ACCOUNTS, {"in_bucket": bucket, "after_user": after, "before": before, "at_most": limit}
    )
    return found.all()


async def lock_chats(
    connection: AsyncConnection,
    bucket: int,
    accounts: Sequence[Row[Any]],
    chat_id: str | None = None,
    advisor_id: str | None = None,
) -> tuple[list[Stored], int]:
    """Lock the live chats of locked account rows, and in whatever state the chat `chat_id`; then read the clock."""
    user_ids = [row.user_id for row in accounts]
    users: dict[str, Any] = {"in_bucket": bucket, "of_users": user_ids}
    if chat_id is None:
        chats = (await connection.execute(sql.LOCK_LIVE_CHATS, users)).all()
    else:
        chats = (await connection.execute(sql.LOCK_LIVE_CHATS_AND_ONE, {**users, "of_chat": chat_id})).all()
    # The clock is read only now, under all locks: an instant read before waiting for them would lie in the past of
    # what the others did meanwhile. Allowances have no lock of their own; the account's is theirs.
    advisors = list({chat.advisor_id for chat in chats} | ({advisor_id} if advisor_id else set()))
    facts = (await connection.execute(sql.CLOCK_AND_ALLOWANCES, {**users, "of_advisors": advisors})).all()
    chats_of: dict[str, dict[str, Chat]] = defaultdict(dict)
    for row in chats:
        chats_of[row.user_id][row.chat_id] = chat_from(row)
    allowances_of: dict[str, dict[str, Allowance]] = defaultdict(dict)
    for row in facts:
        if row.advisor_id is not None:
            allowances_of[row.user_id][row.advisor_id] = Allowance(row.granted_us, row.used_us)
    stored = [
        Stored(
            Account(
                user_id=row.user_id,
                at=row.materialized_through,
                balance=row.balance,
                allowances=allowances_of[row.user_id],
                chats=chats_of[row.user_id],
            ),
            row.next_entry,
        )
        for row in accounts
    ]
    return stored, max(row.now for row in facts)


async def lock_beat(connection: AsyncConnection, user_id: str, chat_id: str) -> Beat | None:
    """Lock a running chat for a fast heartbeat, and read the clock; None if it does not run, or somebody holds it.

    What skips locks never waits, so lock and clock may share a statement.
    """
    row = (await connection.execute(sql.LOCK_BEATING_CHAT, _key(user_id, chat_id))).one_or_none()
    return None if row is None else Beat(row.now, row.last_heartbeat_at + row.lease_us)


async def save_beat(connection: AsyncConnection, user_id: str, chat_id: str, now: int) -> None:
    """Renew the lease of the chat that `lock_beat` locked; never backwards."""
    await connection.execute(sql.RENEW_LEASE, {**_key(user_id, chat_id), "beat_at": now})


def _key(user_id: str, chat_id: str) -> dict[str, Any]:
    return {"in_bucket": bucket_of(user_id), "of_user": user_id, "of_chat": chat_id}


# --- saving -----------------------------------------------------------------------------------------------------------


async def save(connection: AsyncConnection, changes: Sequence[tuple[Stored, Account]]) -> list[LedgerEntry]:
    """Write what has changed between each stored account and its next state; all accounts are of one bucket.

    Returns the ledger entries that were added.
    """
    bucket = bucket_of(changes[0][1].user_id)
    entries = [entry for stored, after in changes for entry in entries_of(after, stored.next_entry, stored.booked)]
    added: dict[str, int] = defaultdict(int)
    for entry in entries:
        added[entry.user_id] += 1
    await _update(
        connection,
        sql.UPDATE_ACCOUNTS,
        bucket,
        [
            {
                "user_id": after.user_id,
                "balance": after.balance,
                "materialized_through": after.at,
                "next_entry": stored.next_entry + added[after.user_id],
                "due_at": due_at(after),
            }
            for stored, after in changes
        ],
    )
    await _save_chats(connection, bucket, changes)
    await _save_allowances(connection, bucket, changes)
    await insert_history(connection, bucket, [after for _, after in changes], entries)
    return entries


async def _save_chats(connection: AsyncConnection, bucket: int, changes: Sequence[tuple[Stored, Account]]) -> None:
    new_chats, changed_chats, grown_chats = [], [], []
    for stored, after in changes:
        for chat in after.chats.values():
            before = stored.account.chats.get(chat.chat_id)
            if before is None:
                fixed = {"bucket": bucket, "advisor_id": chat.advisor_id, "started_at": chat.started_at}
                new_chats.append({**fixed, **_chat_row(after.user_id, chat)})
            elif _has_only_grown(before, chat):
                totals = {name: getattr(chat, name) for name in sql.CHAT_TOTALS}
                grown_chats.append({"user_id": after.user_id, "chat_id": chat.chat_id, **totals})
            elif chat is not before:
                changed_chats.append(_chat_row(after.user_id, chat))
    await _insert(connection, _chat, new_chats)
    await _update(connection, sql.UPDATE_CHATS, bucket, changed_chats)
    await _update(connection, sql.UPDATE_CHAT_TOTALS, bucket, grown_chats)


async def _save_allowances(connection: AsyncConnection, bucket: int, changes: Sequence[tuple[Stored, Account]]) -> None:
    new_allowances, used_allowances = [], []
    for stored, after in changes:
        for advisor_id, allowance in after.allowances.items():
            key = {"user_id": after.user_id, "advisor_id": advisor_id}
            granted = stored.account.allowances.get(advisor_id)
            if granted is None:
                figures = {"granted_us": allowance.granted_us, "used_us": allowance.used_us}
                new_allowances.append({"bucket": bucket, **key, **figures})
            elif allowance != granted:
                used_allowances.append({**key, "used_us": allowance.used_us})
    await _insert(connection, _allowance, new_allowances)
    await _update(connection, sql.UPDATE_ALLOWANCES, bucket, used_allowances)


def due_at(account: Account) -> int | None:
    """From when a pass has something to write for the account: always while a chat runs, else at an abandonment."""
    opened = [chat.opened_at for chat in account.chats.values() if chat.opened_at is not None]
    waiting = [chat.abandoned_at for chat in account.chats.values() if chat.state in RESUMABLE]
    return min(opened or waiting, default=None)


def _has_only_grown(before: Chat, after: Chat) -> bool:
    """Whether nothing but time has passed for a running chat, as for most chats in most passes."""
    # Whatever a command changes, it counts in the revision.
    return after.opened_at is not None and after.opened_at == before.opened_at and after.revision == before.revision


async def _insert(connection: AsyncConnection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        await connection.execute(insert(table), rows)


async def _update(connection: AsyncConnection, statement: Update, bucket: int, rows: list[dict[str, Any]]) -> None:
    if rows:
        values = {f"new_{name}": [row[name] for row in rows] for name in rows[0]}
        await connection.execute(statement, {"in_bucket": bucket, **values})


# --- reading ----------------------------------------------------------------------------------------------------------


async def load(connection: AsyncConnection, user_id: str, chat_id: str | None = None) -> tuple[Account, int] | None:
    """Read what a reading needs, in one statement and so in one snapshot, and lock nothing.

    Returns the account with its running chats, the chat `chat_id` if it exists, and their allowances; and the instant.
    None if there is no such account.
    """
    if chat_id is None:
        wanted, key = sql.READ_RUNNING, {"in_bucket": bucket_of(user_id), "of_user": user_id}
    else:
        wanted, key = sql.READ_RUNNING_AND_ONE, _key(user_id, chat_id)
    rows = (await connection.execute(wanted, key)).all()
    if not rows:
        return None
    found = [row for row in rows if row.chat_id is not None]
    account = Account(
        user_id=user_id,
        at=rows[0].materialized_through,
        balance=rows[0].balance,
        allowances={row.advisor_id: Allowance(row.granted_us, row.used_us) for row in found},
        chats={row.chat_id: chat_from(row) for row in found},
    )
    return account, rows[0].now


async def load_advisor(connection: AsyncConnection, user_id: str, chat_id: str) -> str | None:
    """Return the advisor of a chat, or None."""
    bucket = bucket_of(user_id)
    place = {"in_bucket": bucket, "of_user": user_id, "of_chat": chat_id}
    found: str | None = (await connection.execute(sql.ADVISOR_OF, place)).scalar_one_or_none()
    return found


async def load_chats(
    connection: AsyncConnection,
    user_id: str,
    *,
    states: Iterable[ChatState],
    after: tuple[int, str] | None,
    limit: int,
) -> list[tuple[Chat, Allowance]]:
    """Read a page of a user's chats whose stored state is one of `states`: newest start first, ties by chat id."""
    page = {
        "in_bucket": bucket_of(user_id),
        "of_user": user_id,
        "in_states": [str(state) for state in states],
        "at_most": limit,
    }
    if after is None:
        rows = await connection.execute(sql.CHATS_PAGE, page)
    else:
        rows = await connection.execute(
            sql.NEXT_CHATS_PAGE, {**page, "after_started_at": after[0], "of_chat": after[1]}
        )
    return [(chat_from(row), Allowance(row.granted_us, row.used_us)) for row in rows.all()]


async def load_due(connection: AsyncConnection) -> tuple[dict[int, int], int, int]:
    """Look up the work due, as accounts per bucket; the instant; and since when the oldest of it is unmaterialized."""
    now: int = (await connection.execute(sql.CLOCK)).scalar_one()
    rows = (await connection.execute(sql.WORK_DUE, {"before": now})).all()
    return {bucket: count for bucket, count, _ in rows}, now, min((since for *_, since in rows), default=now)


# --- rows and values --------------------------------------------------------------------------------------------------


def chat_from(row: Row[Any]) -> Chat:
    """Return the value of a row of `chat`."""
    return Chat(
        chat_id=row.chat_id,
        advisor_id=row.advisor_id,
        state=ChatState(row.state),
        tariff=Tariff(row.rate, row.first_us, row.increment_us),
        lease_us=row.lease_us,
        abandon_after_us=row.abandon_after_us,
        last_heartbeat_at=row.last_heartbeat_at,
        started_at=row.started_at,
        revision=row.revision,
        start_key=row.start_key,
        stopped_at=row.stopped_at,
        stop_reason=None if row.stop_reason is None else StopReason(row.stop_reason),
        opened_at=row.opened_at,
        opened_count_us=row.opened_count_us,
        count_us=row.count_us,
        elapsed_us=row.elapsed_us,
        free_us=row.free_us,
        cost=row.cost,
    )


def _chat_row(user_id: str, chat: Chat) -> dict[str, Any]:
    return {
        "user_id": user_id,
        "chat_id": chat.chat_id,
        "state": str(chat.state),
        "rate": chat.tariff.rate,
        "first_us": chat.tariff.first_us,
        "increment_us": chat.tariff.increment_us,
        "lease_us": chat.lease_us,
        "abandon_after_us": chat.abandon_after_us,
        "last_heartbeat_at": chat.last_heartbeat_at,
        "revision": chat.revision,
        "start_key": chat.start_key,
        "stopped_at": chat.stopped_at,
        "stop_reason": None if chat.stop_reason is None else str(chat.stop_reason),
        "opened_at": chat.opened_at,
        "opened_count_us": chat.opened_count_us,
        "count_us": chat.count_us,
        "elapsed_us": chat.elapsed_us,
        "free_us": chat.free_us,
        "cost": chat.cost,
    }
