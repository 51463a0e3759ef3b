"""The statements on accounts and chats, each named. They are built once: building one costs more than sending it.

Every one of them pins the bucket; `talktime.store` says in which order the locking ones are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    Integer,
    Select,
    SmallInteger,
    Text,
    and_,
    bindparam,
    column,
    func,
    literal_column,
    or_,
    select,
    union_all,
    update,
)

from talktime.meter.state import LIVE, ChatState
from talktime.store import tables

if TYPE_CHECKING:
    from sqlalchemy import CompoundSelect, Table, Update

_account, _allowance, _chat = tables.account, tables.allowance, tables.chat

_CHAT_KEY = ("user_id", "chat_id")
CHAT_TOTALS = ("count_us", "elapsed_us", "free_us", "cost")
_CHAT_CHANGING = tuple(
    c.name for c in _chat.columns if c.name not in ("bucket", *_CHAT_KEY, "advisor_id", "started_at")
)

# Literals, not parameters: a prepared statement's generic plan can use the index of live chats only so.
_IS_LIVE = _chat.c.state.in_([literal_column(f"'{state}'") for state in sorted(LIVE)])
_IS_RUNNING = _chat.c.state == literal_column(f"'{ChatState.RUNNING}'")
_NOW = func.clock_timestamp(type_=tables.Instant).label("now")

CLOCK = select(_NOW)
"""The clock, where no row is at hand: the look-up of work due."""

_BUCKET = bindparam("in_bucket", type_=SmallInteger)
_USER = bindparam("of_user", type_=Text)
_USERS = func.any(bindparam("of_users", type_=ARRAY(Text)))
_CHAT = bindparam("of_chat", type_=Text)


def _update_of(table: Table, key: tuple[str, ...], changing: tuple[str, ...]) -> Update:
    """Build an UPDATE of many rows of one bucket, joined to an unnest of the values: lists named ``new_...``."""
    columns = [table.c[name] for name in (*key, *changing)]
    new = (
        func.unnest(*(bindparam(f"new_{c.name}", type_=ARRAY(c.type)) for c in columns))
        .table_valued(*(column(c.name, c.type) for c in columns))
        .render_derived(name="new")
    )
    return (
        update(table)
        .where(table.c.bucket == _BUCKET, *(table.c[name] == new.c[name] for name in key))
        .values({name: new.c[name] for name in changing})
    )


LOCK_ACCOUNT = (
    select(_account).where(_account.c.bucket == _BUCKET, _account.c.user_id == _USER).with_for_update(key_share=True)
)

LOCK_DUE_ACCOUNTS = (
    # What a pass writes can be derived again, so its commit need not wait for the disk; said here, in the first
    # statement, for this transaction alone.
    select(_account, func.set_config("synchronous_commit", "off", True))  # noqa: FBT003 - PostgreSQL's is_local
    .where(
        _account.c.bucket == _BUCKET,
        _account.c.user_id > bindparam("after_user", type_=Text),
        _account.c.due_at <= bindparam("before", type_=tables.Instant),
        _account.c.materialized_through < bindparam("before", type_=tables.Instant),
    )
    .order_by(_account.c.user_id)
    .limit(bindparam("at_most", type_=Integer))
    .with_for_update(key_share=True, skip_locked=True)
)

LOCK_LIVE_CHATS = (
    select(_chat)
    .where(_chat.c.bucket == _BUCKET, _chat.c.user_id == _USERS, _IS_LIVE)
    .order_by(_chat.c.user_id, _chat.c.chat_id)
    .with_for_update(key_share=True)
)

LOCK_LIVE_CHATS_AND_ONE = (
    select(_chat)
    .where(_chat.c.bucket == _BUCKET, _chat.c.user_id == _USERS, or_(_IS_LIVE, _chat.c.chat_id == _CHAT))
    .order_by(_chat.c.user_id, _chat.c.chat_id)
    .with_for_update(key_share=True)
)

CLOCK_AND_ALLOWANCES = (
    select(_NOW, _account.c.user_id, _allowance.c.advisor_id, _allowance.c.granted_us, _allowance.c.used_us)
    .select_from(_account)
    .outerjoin(
        _allowance,
        and_(
            _allowance.c.bucket == _BUCKET,
            _allowance.c.user_id == _account.c.user_id,
            _allowance.c.advisor_id == func.any(bindparam("of_advisors", type_=ARRAY(Text))),
        ),
    )
    .where(_account.c.bucket == _BUCKET, _account.c.user_id == _USERS)
)

LOCK_BEATING_CHAT = (
    select(_NOW, _chat.c.last_heartbeat_at, _chat.c.lease_us)
    .where(_chat.c.bucket == _BUCKET, _chat.c.user_id == _USER, _chat.c.chat_id == _CHAT, _IS_RUNNING)
    .with_for_update(key_share=True, skip_locked=True)
)

RENEW_LEASE = (
    update(_chat)
    .where(_chat.c.bucket == _BUCKET, _chat.c.user_id == _USER, _chat.c.chat_id == _CHAT)
    .values(last_heartbeat_at=func.greatest(_chat.c.last_heartbeat_at, bindparam("beat_at", type_=tables.Instant)))
)

UPDATE_ACCOUNTS = _update_of(_account, ("user_id",), ("balance", "materialized_through", "next_entry", "due_at"))
UPDATE_CHATS = _update_of(_chat, _CHAT_KEY, _CHAT_CHANGING)
UPDATE_CHAT_TOTALS = _update_of(_chat, _CHAT_KEY, CHAT_TOTALS)
UPDATE_ALLOWANCES = _update_of(_allowance, ("user_id", "advisor_id"), ("used_us",))


def _reading_of(wanted: Select[Any] | CompoundSelect[Any]) -> Select[Any]:
    """Build the one statement of a reading: the clock, the account, and the wanted chats with their allowances."""
    chat = wanted.subquery("wanted")
    return (
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
                _allowance.c.bucket == _BUCKET,
                _allowance.c.user_id == _USER,
                _allowance.c.advisor_id == chat.c.advisor_id,
            ),
        )
        .where(_account.c.bucket == _BUCKET, _account.c.user_id == _USER)
    )


_MY_CHATS = and_(_chat.c.bucket == _BUCKET, _chat.c.user_id == _USER)
_MY_RUNNING_CHATS = select(_chat).where(_MY_CHATS, _IS_RUNNING)
READ_RUNNING = _reading_of(_MY_RUNNING_CHATS)
READ_RUNNING_AND_ONE = _reading_of(
    # Two branches, each with an index of its own; one condition with OR would walk all of a user's past chats.
    union_all(_MY_RUNNING_CHATS, select(_chat).where(_MY_CHATS, _chat.c.chat_id == _CHAT, ~_IS_RUNNING))
)

ADVISOR_OF = select(_chat.c.advisor_id).where(_MY_CHATS, _chat.c.chat_id == _CHAT)

CHATS_PAGE = (
    select(_chat, _allowance.c.granted_us, _allowance.c.used_us)
    .join(
        _allowance,
        and_(
            _allowance.c.bucket == _BUCKET,
            _allowance.c.user_id == _USER,
            _allowance.c.advisor_id == _chat.c.advisor_id,
        ),
    )
    .where(_MY_CHATS, _chat.c.state == func.any(bindparam("in_states", type_=ARRAY(Text))))
    .order_by(_chat.c.started_at.desc(), _chat.c.chat_id.desc())
    .limit(bindparam("at_most", type_=Integer))
)

_AFTER = bindparam("after_started_at", type_=tables.Instant)
NEXT_CHATS_PAGE = CHATS_PAGE.where(
    or_(_chat.c.started_at < _AFTER, and_(_chat.c.started_at == _AFTER, _chat.c.chat_id < _CHAT))
)

WORK_DUE = (
    select(
        _account.c.bucket,
        func.count(),
        func.min(func.greatest(_account.c.materialized_through, _account.c.due_at, type_=tables.Instant)),
    )
    .where(_account.c.due_at <= bindparam("before", type_=tables.Instant))
    .group_by(_account.c.bucket)
    .order_by(_account.c.bucket)
)
