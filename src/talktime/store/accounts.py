"""Account states: locked for a change and saved (singly or in batches), or read in one snapshot.

`lock` and `lock_due` follow the locking order of this room, each step its own statement. `save` writes what a change
made different, with one statement per table whatever the number of accounts, all of one bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from sqlalchemy import insert
from sqlalchemy.dialects.postgresql import insert as insert_or_nothing

from talktime.meter.state import RESUMABLE, Account, Allowance, Chat, ChatState, StopReason, Tariff
from talktime.store import statements as sql
from talktime.store import tables
from talktime.store.exhaustion import first_exhaustion
from talktime.store.ledger import LedgerEntry, entries_of, insert_history
from talktime.store.outbox import events_of, insert_events
from talktime.store.sending import driver_of, send
from talktime.store.tables import bucket_of, datetime_of

if TYPE_CHECKING:
    from psycopg import AsyncConnection as Driver
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

_account, _allowance, _chat = tables.account, tables.allowance, tables.chat

_ACCOUNT_COLUMNS = len(_account.columns)
_CHAT_BEGINS = 4
"""Where the columns of the chat begin in a row of a reading; behind them are two of its allowance."""


class Stored(NamedTuple):
    """An account as it is stored, the number of its next ledger entry, and from when a pass has something to write.

    `exhausts_at` is what is stored of each of its chats (`first_exhaustion`). `next_event` is the number of its next
    event, None before the first; `low_at` since when its credits are known to be low, if they are.
    """

    account: Account
    next_entry: int
    due_at: int | None
    next_event: int | None
    low_at: int | None
    exhausts_at: Mapping[str, int | None]

    @property
    def booked(self) -> int:
        """The running sum of the ledger: the balance and what open segments had cost when it was materialized."""
        return self.account.balance + sum(chat.accrued for chat in self.account.chats.values())


# --- locking ----------------------------------------------------------------------------------------------------------


async def lock(
    connection: AsyncConnection, user_id: str, *, chat_id: str | None = None, advisor_id: str | None = None
) -> tuple[Stored, int] | None:
    """Lock an account with its live chats and, in whatever state, the chat `chat_id`; then read the clock.

    Returns the stored account, with the allowances of its chats' advisors and of `advisor_id`, and the instant in
    microseconds; None if there is no such account.
    """
    bucket = bucket_of(user_id)
    driver = await driver_of(connection)
    async with driver.pipeline():  # in one go with its BEGIN
        locking = await send(driver, sql.LOCK_ACCOUNT, {"in_bucket": bucket, "of_user": user_id})
    accounts = await locking.fetchall()
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
) -> Sequence[Sequence[Any]]:
    """Lock the next account rows of a bucket, beyond the user id `after`, that have something to materialize.

    Accounts that somebody else holds are skipped, since whoever holds them advances them; so are those that were
    materialized at or after the instant `before`. Returns the rows in user_id order, for `lock_chats`.
    """
    place = {"in_bucket": bucket, "after_user": after, "before": datetime_of(before), "at_most": limit}
    driver = await driver_of(connection)
    async with driver.pipeline():
        locking = await send(driver, sql.LOCK_DUE_ACCOUNTS, place)
    return await locking.fetchall()


async def lock_chats(
    connection: AsyncConnection,
    bucket: int,
    accounts: Sequence[Sequence[Any]],
    chat_id: str | None = None,
    advisor_id: str | None = None,
) -> tuple[list[Stored], int]:
    """Lock the live chats of locked account rows, and in whatever state the chat `chat_id`; then read the clock."""
    user_ids = [row[1] for row in accounts]
    place: dict[str, Any] = {"in_bucket": bucket, "of_users": sql.array_literal(user_ids), "of_user": user_ids[0]}
    driver = await driver_of(connection)
    if chat_id is None:
        locking = await send(driver, sql.LOCK_LIVE_CHATS, place)
    else:
        locking = await send(driver, sql.LOCK_LIVE_CHATS_AND_ONE, {**place, "of_chat": chat_id})
    chats_of: dict[str, dict[str, Chat]] = {user_id: {} for user_id in user_ids}
    exhaustions_of: dict[str, dict[str, int | None]] = {user_id: {} for user_id in user_ids}
    # The clock is to be had even where there is no allowance: the first account stands there in any case.
    pairs: set[tuple[str, str | None]] = {(user_ids[0], advisor_id)}
    for row in await locking.fetchall():
        chat = chat_from(row)
        chats_of[row[1]][chat.chat_id] = chat
        exhaustions_of[row[1]][chat.chat_id] = row[-1]
        pairs.add((row[1], chat.advisor_id))
    # The clock is read only now, under all locks: an instant read before waiting for them would lie in the past of
    # what the others did meanwhile. Allowances have no lock of their own; the account's is theirs.
    facts = await send(driver, sql.CLOCK_AND_ALLOWANCES, {**place, **sql.arrays("of_", sql.PAIR, pairs)})
    allowances_of: dict[str, dict[str, Allowance]] = {user_id: {} for user_id in user_ids}
    rows = await facts.fetchall()
    for _, user_id, advisor, granted_us, used_us in rows:
        if advisor is not None:
            allowances_of[user_id][advisor] = Allowance(granted_us, used_us)
    stored = [
        Stored(
            Account(user_id, at, balance, allowances_of[user_id], chats_of[user_id]),
            *(next_entry, due_at, next_event, low_at, exhaustions_of[user_id]),
        )
        for _, user_id, balance, at, next_entry, due_at, next_event, low_at in (a[:_ACCOUNT_COLUMNS] for a in accounts)
    ]
    now: int = rows[0][0]
    return stored, now


# --- saving -----------------------------------------------------------------------------------------------------------


async def save(
    connection: AsyncConnection, changes: Sequence[tuple[Stored, Account]], low_us: int | None = None
) -> list[LedgerEntry]:
    """Write what has changed between each stored account and its next state; all accounts are of one bucket.

    What is to be told of it too, unless `low_us`, how long low credits last, is None. Returns the entries added.
    """
    bucket = bucket_of(changes[0][1].user_id)
    entries: list[LedgerEntry] = []
    events: NewRows = []
    # Of most accounts in most passes only the balance changes, and the instant, which is the same for all.
    at = changes[0][1].at
    grown: Rows = []
    changed: Rows = []
    for stored, after in changes:
        added = entries_of(after, stored.next_entry, stored.booked) if after.journal else []
        entries += added
        told, low_at = events_of(bucket, stored, after, low_us)
        events += told
        due = due_at(after)
        if added or told or due != stored.due_at or low_at != stored.low_at or after.at != at:
            numbers = stored.next_entry + len(added), told[-1]["number"] + 1 if told else stored.next_event
            changed.append((after.user_id, after.balance, after.at, numbers[0], due, numbers[1], low_at))
        else:
            grown.append((after.user_id, after.balance))
    new_chats, changed_chats, grown_chats = _chats_to_save(bucket, changes)
    new_allowances, used_allowances = _allowances_to_save(bucket, changes)
    driver = await driver_of(connection)
    async with driver.pipeline():
        await _update(driver, sql.UPDATE_GROWN_ACCOUNTS, bucket, grown, at=datetime_of(at))
        await _update(driver, sql.UPDATE_ACCOUNTS, bucket, changed)
        await _update(driver, sql.UPDATE_CHAT_TOTALS, bucket, grown_chats)
        await _update(driver, sql.UPDATE_CHATS, bucket, changed_chats)
        await _update(driver, sql.UPDATE_ALLOWANCES, bucket, used_allowances)
    await _insert(connection, _chat, new_chats)
    await _insert(connection, _allowance, new_allowances)
    await insert_history(connection, bucket, [after for _, after in changes], entries)
    await insert_events(connection, events)
    return entries


Rows: TypeAlias = list[Sequence[Any]]
NewRows: TypeAlias = list[Mapping[str, Any]]


def _chats_to_save(bucket: int, changes: Iterable[tuple[Stored, Account]]) -> tuple[NewRows, Rows, Rows]:
    """Return the chats that are new, those that were changed, and those that have only grown."""
    new: NewRows = []
    changed: Rows = []
    grown: Rows = []
    for stored, after in changes:
        running_on: list[Chat] = []
        others: list[Chat] = []
        for chat_id, chat in after.chats.items():
            before = stored.account.chats.get(chat_id)
            if before is not None and _has_only_grown(before, chat):
                running_on.append(chat)
            elif chat is not before:
                others.append(chat)
        exhausts_at = _exhaustion_to_save(stored, after, running_on, others)
        for chat in running_on:
            if stored.exhausts_at[chat.chat_id] == exhausts_at:
                grown.append((after.user_id, chat.chat_id, chat.count_us, chat.elapsed_us, chat.free_us, chat.cost))
            else:
                others.append(chat)
        for chat in others:
            row = row_of(bucket, after.user_id, chat, exhausts_at)
            if chat.chat_id in stored.account.chats:
                changed.append([row[column.name] for column in sql.UPDATE_CHATS.columns])
            else:
                new.append(row)
    return new, changed, grown


def _exhaustion_to_save(
    stored: Stored, after: Account, running_on: Sequence[Chat], others: Sequence[Chat]
) -> int | None:
    """Return when credits run out first. Time alone leaves that as it was, so most passes need not find it out."""
    if others or after.journal:
        return first_exhaustion(after)
    known = {stored.exhausts_at[chat.chat_id] for chat in running_on}
    return known.pop() if len(known) == 1 and None not in known else first_exhaustion(after)


def _allowances_to_save(bucket: int, changes: Iterable[tuple[Stored, Account]]) -> tuple[NewRows, Rows]:
    """Return the allowances that are new, and those of which something was used."""
    new: NewRows = []
    used: Rows = []
    for stored, after in changes:
        if after.allowances is stored.account.allowances:
            continue
        for advisor_id, allowance in after.allowances.items():
            granted = stored.account.allowances.get(advisor_id)
            if granted is None:
                place = {"bucket": bucket, "user_id": after.user_id, "advisor_id": advisor_id}
                new.append({**place, **allowance._asdict()})
            elif allowance.used_us != granted.used_us:
                used.append((after.user_id, advisor_id, allowance.used_us))
    return new, used


def due_at(account: Account) -> int | None:
    """From when a pass has something to write for the account: always while a chat runs, else at an abandonment."""
    chats = account.chats.values()
    opened = [chat.opened_at for chat in chats if chat.opened_at is not None]
    return min(opened or [chat.abandoned_at for chat in chats if chat.state in RESUMABLE], default=None)


def _has_only_grown(before: Chat, after: Chat) -> bool:
    """Whether nothing but time has passed for a running chat, as for most chats in most passes."""
    # Whatever a command changes, it counts in the revision.
    return after.opened_at is not None and after.opened_at == before.opened_at and after.revision == before.revision


async def _insert(connection: AsyncConnection, table: Table, rows: NewRows) -> None:
    if rows:
        await connection.execute(insert(table), rows)


async def _update(driver: Driver[Any], update: sql.UpdateOfMany, bucket: int, rows: Rows, **same: datetime) -> None:
    if rows:
        values = {"in_bucket": bucket, **sql.arrays("new_", update.columns, rows), **same}
        await send(driver, update.statement, values)


# --- reading ----------------------------------------------------------------------------------------------------------


async def load(connection: AsyncConnection, user_id: str, chat_id: str | None = None) -> tuple[Account, int] | None:
    """Read what a reading needs, in one statement and so in one snapshot, and lock nothing.

    Returns the account with its running chats, the chat `chat_id` if it exists, and their allowances; and the instant.
    None if there is no such account.
    """
    place = {"in_bucket": bucket_of(user_id), "of_users": sql.array_literal([user_id])}
    if chat_id is None:
        found = await connection.execute(sql.READ_RUNNING, place)
    else:
        found = await connection.execute(
            sql.READ_RUNNING_AND_THESE, {**place, "of_chats": sql.array_literal([chat_id])}
        )
    rows = found.all()
    return account_from(user_id, rows) if rows else None


def account_from(user_id: str, rows: Sequence[Sequence[Any]]) -> tuple[Account, int]:
    """Return the account and the instant in the rows of a reading, one for each of its chats, or one without a chat."""
    _, now, balance, at = rows[0][:_CHAT_BEGINS]
    chats: dict[str, Chat] = {}
    allowances: dict[str, Allowance] = {}
    for row in rows:
        if row[-1] is not None:
            chat = chat_from(row[_CHAT_BEGINS:-2])
            chats[chat.chat_id] = chat
            allowances[chat.advisor_id] = Allowance(row[-2], row[-1])
    return Account(user_id, at, balance, allowances, chats), now


async def load_advisor(connection: AsyncConnection, user_id: str, chat_id: str) -> str | None:
    """Return the advisor of a chat, or None."""
    place = {"in_bucket": bucket_of(user_id), "of_user": user_id, "of_chat": chat_id}
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
        "in_states": sql.array_literal(states),
        "at_most": limit,
    }
    if after is None:
        rows = await connection.execute(sql.CHATS_PAGE, page)
    else:
        rows = await connection.execute(
            sql.NEXT_CHATS_PAGE, {**page, "after_started_at": after[0], "of_chat": after[1]}
        )
    return [(chat_from(row[:-2]), Allowance(row.granted_us, row.used_us)) for row in rows.all()]


async def load_due(connection: AsyncConnection) -> tuple[dict[int, int], int, int]:
    """Look up the work due, as accounts per bucket; the instant; and since when the oldest of it is unmaterialized."""
    now: int = (await connection.execute(sql.CLOCK)).scalar_one()
    rows = (await connection.execute(sql.WORK_DUE, {"before": now})).all()
    return {bucket: count for bucket, count, _ in rows}, now, min((since for *_, since in rows), default=now)


# --- rows and values --------------------------------------------------------------------------------------------------


def chat_from(row: Sequence[Any]) -> Chat:
    """Return the value of a row of `chat`: of all its columns in their order. What is foretold is no part of it."""
    _, _, chat_id, advisor_id, state, rate, first_us, increment_us, lease_us, abandon_after_us = row[:10]
    last_heartbeat_at, started_at, revision, start_key, stopped_at, reason = row[10:16]
    return Chat(
        chat_id,
        advisor_id,
        _STATES[state],
        Tariff(rate, first_us, increment_us),
        lease_us,
        abandon_after_us,
        last_heartbeat_at,
        started_at,
        revision,
        start_key,
        stopped_at,
        None if reason is None else _REASONS[reason],
        *row[16:22],
    )


_STATES = {str(state): state for state in ChatState}
_REASONS = {str(reason): reason for reason in StopReason}


def row_of(bucket: int, user_id: str, chat: Chat, exhausts_at: int | None) -> dict[str, Any]:
    """Return the row of `chat` that `chat_from` reads, and with it, if the chat runs, when its credits run out."""
    values = chat._asdict()
    rate, first_us, increment_us = values.pop("tariff")
    return {
        **values,
        "bucket": bucket,
        "user_id": user_id,
        "state": str(chat.state),
        "rate": rate,
        "first_us": first_us,
        "increment_us": increment_us,
        "stop_reason": None if chat.stop_reason is None else str(chat.stop_reason),
        "exhausts_at": None if chat.opened_at is None else exhausts_at,
    }
