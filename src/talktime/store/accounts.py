"""Account states: locked for a change and saved (singly or in batches), or read in one snapshot.

`lock` and `lock_due` follow the locking order of this room, each step its own statement. `save` writes what a change
made different, with one statement per table whatever the number of accounts, all of one bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, Select, and_, bindparam, column, func, insert, literal_column, or_, select, union_all, update
from sqlalchemy.dialects.postgresql import insert as insert_or_nothing

from talktime.meter.state import LIVE, RESUMABLE, Account, Allowance, Chat, ChatState, StopReason, Tariff
from talktime.store import tables
from talktime.store.ledger import LedgerEntry, entries_of, insert_history
from talktime.store.tables import bucket_of

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Row, Table
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.selectable import TableValuedAlias

_account, _allowance, _chat = tables.account, tables.allowance, tables.chat

_CHAT_KEY = ("user_id", "chat_id")
_CHAT_FIXED = ("bucket", *_CHAT_KEY, "advisor_id", "started_at")
_CHAT_CHANGING = tuple(c.name for c in _chat.columns if c.name not in _CHAT_FIXED)
# Literals, not parameters: a prepared statement's generic plan can use the index of live chats only so.
_IS_LIVE = _chat.c.state.in_([literal_column(f"'{state}'") for state in sorted(LIVE)])
_IS_RUNNING = _chat.c.state == literal_column(f"'{ChatState.RUNNING}'")
_NOW = func.clock_timestamp(type_=tables.Instant).label("now")


@dataclass(frozen=True, slots=True)
class Stored:
    """An account as it is stored, and the number of its next ledger entry."""

    account: Account
    next_entry: int

    @property
    def booked(self) -> int:
        """The running sum of the ledger: the balance and what open segments had cost when it was materialized."""
        return self.account.balance + sum(
            chat.cost - _closed_cost(chat) for chat in self.account.chats.values() if chat.opened_at is not None
        )


@dataclass(frozen=True, slots=True)
class Beat:
    """A running chat whose row a fast heartbeat holds locked, and the instant that was read under the lock."""

    now: int
    lease_end: int


def _closed_cost(chat: Chat) -> int:
    return chat.cost - chat.tariff.cost(chat.count_us) + chat.tariff.cost(chat.opened_count_us)


# --- locking ----------------------------------------------------------------------------------------------------------


async def lock(
    connection: AsyncConnection, user_id: str, *, chat_id: str | None = None, advisor_id: str | None = None
) -> tuple[Stored, int] | None:
    """Lock an account with its live chats and, in whatever state, the chat `chat_id`; then read the clock.

    Returns the stored account, with the allowances of its chats' advisors and of `advisor_id`, and the instant in
    microseconds; None if there is no such account.
    """
    bucket = bucket_of(user_id)
    accounts = (
        await connection.execute(
            select(_account)
            .where(_account.c.bucket == bucket, _account.c.user_id == user_id)
            .with_for_update(key_share=True)
        )
    ).all()
    if not accounts:
        return None
    wanted = _IS_LIVE if chat_id is None else or_(_IS_LIVE, _chat.c.chat_id == chat_id)
    stored, now = await _lock_chats(connection, bucket, accounts, wanted, [advisor_id] if advisor_id else [])
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
) -> tuple[list[Stored], int]:
    """Lock the next accounts of a bucket, beyond the user id `after`, that have something to materialize.

    Accounts that somebody else holds are skipped, since whoever holds them advances them; so are those that were
    materialized at or after the instant `before`. Returns the accounts in user_id order, and the instant.
    """
    accounts = (
        await connection.execute(
            select(_account)
            .where(
                _account.c.bucket == bucket,
                _account.c.user_id > after,
                _account.c.due_at <= before,
                _account.c.materialized_through < before,
            )
            .order_by(_account.c.user_id)
            .limit(limit)
            .with_for_update(key_share=True, skip_locked=True)
        )
    ).all()
    if not accounts:
        return [], before
    return await _lock_chats(connection, bucket, accounts, _IS_LIVE, [])


async def _lock_chats(
    connection: AsyncConnection,
    bucket: int,
    accounts: Sequence[Row[Any]],
    wanted: ColumnElement[bool],
    advisor_ids: list[str],
) -> tuple[list[Stored], int]:
    user_ids = [row.user_id for row in accounts]
    chats = (
        await connection.execute(
            select(_chat)
            .where(_chat.c.bucket == bucket, _chat.c.user_id == func.any(user_ids), wanted)
            .order_by(_chat.c.user_id, _chat.c.chat_id)
            .with_for_update(key_share=True)
        )
    ).all()
    # The clock is read only now, under all locks: an instant read before waiting for them would lie in the past of
    # what the others did meanwhile. Allowances have no lock of their own; the account's is theirs.
    facts = (
        await connection.execute(
            select(_NOW, _account.c.user_id, _allowance.c.advisor_id, _allowance.c.granted_us, _allowance.c.used_us)
            .select_from(_account)
            .outerjoin(
                _allowance,
                and_(
                    _allowance.c.bucket == bucket,
                    _allowance.c.user_id == _account.c.user_id,
                    _allowance.c.advisor_id == func.any([*{chat.advisor_id for chat in chats}, *advisor_ids]),
                ),
            )
            .where(_account.c.bucket == bucket, _account.c.user_id == func.any(user_ids))
        )
    ).all()
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
    row = (
        await connection.execute(
            select(_NOW, _chat.c.last_heartbeat_at, _chat.c.lease_us)
            .where(
                _chat.c.bucket == bucket_of(user_id),
                _chat.c.user_id == user_id,
                _chat.c.chat_id == chat_id,
                _IS_RUNNING,
            )
            .with_for_update(key_share=True, skip_locked=True)
        )
    ).one_or_none()
    return None if row is None else Beat(row.now, row.last_heartbeat_at + row.lease_us)


async def save_beat(connection: AsyncConnection, user_id: str, chat_id: str, now: int) -> None:
    """Renew the lease of the chat that `lock_beat` locked; never backwards."""
    await connection.execute(
        update(_chat)
        .where(_chat.c.bucket == bucket_of(user_id), _chat.c.user_id == user_id, _chat.c.chat_id == chat_id)
        .values(last_heartbeat_at=func.greatest(_chat.c.last_heartbeat_at, bindparam("now", now, tables.Instant)))
    )


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
        _account,
        bucket,
        ("user_id",),
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
    chats = [
        (chat.chat_id in stored.account.chats, _chat_row(bucket, after.user_id, chat))
        for stored, after in changes
        for chat in after.chats.values()
        if chat is not stored.account.chats.get(chat.chat_id)
    ]
    await _insert(connection, _chat, [row for is_old, row in chats if not is_old])
    changing = (*_CHAT_KEY, *_CHAT_CHANGING)
    await _update(
        connection, _chat, bucket, _CHAT_KEY, [{name: row[name] for name in changing} for is_old, row in chats if is_old]
    )
    allowances = [
        (
            advisor_id in stored.account.allowances,
            {
                "bucket": bucket,
                "user_id": after.user_id,
                "advisor_id": advisor_id,
                "granted_us": allowance.granted_us,
                "used_us": allowance.used_us,
            },
        )
        for stored, after in changes
        for advisor_id, allowance in after.allowances.items()
        if allowance != stored.account.allowances.get(advisor_id)
    ]
    await _insert(connection, _allowance, [row for is_old, row in allowances if not is_old])
    key = ("user_id", "advisor_id")
    await _update(
        connection,
        _allowance,
        bucket,
        key,
        [{name: row[name] for name in (*key, "used_us")} for is_old, row in allowances if is_old],
    )
    await insert_history(connection, bucket, [after for _, after in changes], entries)
    return entries


def due_at(account: Account) -> int | None:
    """From when a pass has something to write for the account: always while a chat runs, else at an abandonment."""
    opened = [chat.opened_at for chat in account.chats.values() if chat.opened_at is not None]
    waiting = [chat.abandoned_at for chat in account.chats.values() if chat.state in RESUMABLE]
    return min(opened or waiting, default=None)


async def _insert(connection: AsyncConnection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        await connection.execute(insert(table), rows)


async def _update(
    connection: AsyncConnection, table: Table, bucket: int, key: tuple[str, ...], rows: list[dict[str, Any]]
) -> None:
    """Set all columns of `rows` but the key's, in one statement joined to an unnest of the values."""
    if not rows:
        return
    names = list(rows[0])
    new = _unnest(table, names)
    await connection.execute(
        update(table)
        .where(table.c.bucket == bindparam("the_bucket", bucket), *(table.c[name] == new.c[name] for name in key))
        .values({name: new.c[name] for name in names if name not in key}),
        {f"new_{name}": [row[name] for row in rows] for name in names},
    )


def _unnest(table: Table, names: Iterable[str]) -> TableValuedAlias:
    columns: list[Column[Any]] = [table.c[name] for name in names]
    return (
        func.unnest(*(bindparam(f"new_{c.name}", type_=ARRAY(c.type)) for c in columns))
        .table_valued(*(column(c.name, c.type) for c in columns))
        .render_derived(name="new")
    )


# --- reading ----------------------------------------------------------------------------------------------------------


async def load(connection: AsyncConnection, user_id: str, chat_id: str | None = None) -> tuple[Account, int] | None:
    """Read what a reading needs, in one statement and so in one snapshot, and lock nothing.

    Returns the account with its running chats, the chat `chat_id` if it exists, and their allowances; and the instant.
    None if there is no such account.
    """
    bucket = bucket_of(user_id)
    mine = and_(_chat.c.bucket == bucket, _chat.c.user_id == user_id)
    running = select(_chat).where(mine, _IS_RUNNING)
    wanted = running if chat_id is None else union_all(running, select(_chat).where(mine, _chat.c.chat_id == chat_id, ~_IS_RUNNING))
    chat = wanted.subquery("wanted")
    rows = (
        await connection.execute(
            select(
                _NOW,
                _account.c.balance,
                _account.c.materialized_through,
                *chat.columns,
                _allowance.c.granted_us,
                _allowance.c.used_us,
            )
            .select_from(_account)
            .outerjoin(chat, chat.c.bucket == _account.c.bucket)
            .outerjoin(
                _allowance,
                and_(
                    _allowance.c.bucket == bucket,
                    _allowance.c.user_id == user_id,
                    _allowance.c.advisor_id == chat.c.advisor_id,
                ),
            )
            .where(_account.c.bucket == bucket, _account.c.user_id == user_id)
        )
    ).all()
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


async def load_chats(
    connection: AsyncConnection,
    user_id: str,
    *,
    states: Iterable[ChatState],
    after: tuple[int, str] | None,
    limit: int,
) -> list[tuple[Chat, Allowance]]:
    """Read a page of a user's chats whose stored state is one of `states`: newest start first, ties by chat id."""
    bucket = bucket_of(user_id)
    query: Select[Any] = (
        select(_chat, _allowance.c.granted_us, _allowance.c.used_us)
        .join(
            _allowance,
            and_(
                _allowance.c.bucket == bucket,
                _allowance.c.user_id == user_id,
                _allowance.c.advisor_id == _chat.c.advisor_id,
            ),
        )
        .where(_chat.c.bucket == bucket, _chat.c.user_id == user_id, _chat.c.state == func.any([str(s) for s in states]))
        .order_by(_chat.c.started_at.desc(), _chat.c.chat_id.desc())
        .limit(limit)
    )
    if after is not None:
        started_at, chat_id = after
        instant = bindparam("after_started_at", started_at, tables.Instant)
        query = query.where(
            or_(_chat.c.started_at < instant, and_(_chat.c.started_at == instant, _chat.c.chat_id < chat_id))
        )
    return [
        (chat_from(row), Allowance(row.granted_us, row.used_us)) for row in (await connection.execute(query)).all()
    ]


async def load_due(connection: AsyncConnection) -> tuple[dict[int, int], int, int]:
    """Look up the work due, as accounts per bucket; the instant; and since when the oldest of it is unmaterialized."""
    now: int = (await connection.execute(select(_NOW))).scalar_one()
    rows = (
        await connection.execute(
            select(_account.c.bucket, func.count(), func.min(_account.c.materialized_through))
            .where(_account.c.due_at <= bindparam("now", now, tables.Instant))
            .group_by(_account.c.bucket)
            .order_by(_account.c.bucket)
        )
    ).all()
    return {bucket: count for bucket, count, _ in rows}, now, min((oldest for *_, oldest in rows), default=now)


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


def _chat_row(bucket: int, user_id: str, chat: Chat) -> Mapping[str, Any]:
    return {
        "bucket": bucket,
        "user_id": user_id,
        "chat_id": chat.chat_id,
        "advisor_id": chat.advisor_id,
        "state": str(chat.state),
        "rate": chat.tariff.rate,
        "first_us": chat.tariff.first_us,
        "increment_us": chat.tariff.increment_us,
        "lease_us": chat.lease_us,
        "abandon_after_us": chat.abandon_after_us,
        "last_heartbeat_at": chat.last_heartbeat_at,
        "started_at": chat.started_at,
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
