"""The statements on accounts and chats, each named. They are built once: building one costs more than sending it.

Arrays are sent as their literals (`array_literal`).

Every one of them pins the bucket; `talktime.store` says in which order the locking ones are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    Boolean,
    Column,
    Integer,
    Select,
    SmallInteger,
    Text,
    and_,
    bindparam,
    cast,
    column,
    delete,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import distinct_on

from talktime.meter.state import LIVE, ChatState
from talktime.store import tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Cast, ColumnElement, CompoundSelect, Table, Update
    from sqlalchemy.types import TypeEngine

_account, _allowance, _chat, _event = tables.account, tables.allowance, tables.chat, tables.event

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
_CHAT = bindparam("of_chat", type_=Text)


def array_literal(values: Iterable[object]) -> str:
    """Write values as PostgreSQL reads an array, instants as datetimes.

    To let the driver adapt them one by one would cost several times as much.
    """
    elements = list(values)
    kinds = set(map(type, elements))
    # Most arrays are of numbers, or of ids in which there is nothing to escape: those need no look at each element.
    if kinds == {int}:
        return "{" + ",".join(map(str, elements)) + "}"
    if kinds == {str}:
        quoted = '"' + '","'.join(map(str, elements)) + '"'
        if "\\" not in quoted and quoted.count('"') == 2 * len(elements):
            return "{" + quoted + "}"
    return "{" + ",".join(map(_element, elements)) + "}"


def arrays(prefix: str, columns: Sequence[Column[Any]], rows: Iterable[Sequence[Any]]) -> dict[str, str]:
    """Write rows of values as an array for each column, the parameters named with this prefix."""
    return {
        prefix + column.name: array_literal(
            (None if value is None else tables.datetime_of(value) for value in values)
            if isinstance(column.type, tables.Instant)
            else values
        )
        for column, values in zip(columns, zip(*rows, strict=True), strict=True)
    }


def _element(value: object) -> str:
    if isinstance(value, int):
        return str(value)
    if value is None:
        return "NULL"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _array(name: str, element: TypeEngine[Any]) -> Cast[Any]:
    """Build a parameter that takes an `array_literal`."""
    return cast(bindparam(name, type_=Text), ARRAY(element))


def _unnest(alias: str, prefix: str, columns: Sequence[Column[Any]], *, numbered: bool = False) -> Any:  # noqa: ANN401 - SQLAlchemy has no name for it
    """Build a table out of an array for each column, their parameters named with this prefix."""
    return (
        func.unnest(*(_array(prefix + c.name, c.type) for c in columns))
        .table_valued(*(column(c.name, c.type) for c in columns), with_ordinality="place" if numbered else None)
        .render_derived(name=alias)
    )


USERS = func.any(_array("of_users", Text()))


class UpdateOfMany(NamedTuple):
    """An UPDATE of many rows of one bucket, joined to an unnest of `arrays` of the values of `columns`: ``new_...``."""

    statement: Update
    columns: Sequence[Column[Any]]


def _update_of(table: Table, key: tuple[str, ...], changing: tuple[str, ...], *, at: str | None = None) -> UpdateOfMany:
    """Build an UPDATE of many rows; the column `at` has the same value in all of them, the parameter ``at``."""
    columns = [table.c[name] for name in (*key, *changing)]
    new = _unnest("new", "new_", columns)
    values = {name: new.c[name] for name in changing}
    if at is not None:
        values[at] = bindparam("at", type_=tables.Instant)
    matching = (table.c[name] == new.c[name] for name in key)
    return UpdateOfMany(update(table).where(table.c.bucket == _BUCKET, *matching).values(values), columns)


LOCK_ACCOUNT = (
    select(_account).where(_account.c.bucket == _BUCKET, _account.c.user_id == _USER).with_for_update(key_share=True)
)

LOCK_DUE_ACCOUNTS = (
    # What a pass writes can be derived again, so its commit need not wait for the disk; said here, in the first
    # statement, for this transaction alone.
    select(_account, literal_column("set_config('synchronous_commit', 'off', true)"))
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
    .where(_chat.c.bucket == _BUCKET, _chat.c.user_id == USERS, _IS_LIVE)
    .order_by(_chat.c.user_id, _chat.c.chat_id)
    .with_for_update(key_share=True)
)

LOCK_LIVE_CHATS_AND_ONE = (
    select(_chat)
    .where(_chat.c.bucket == _BUCKET, _chat.c.user_id == USERS, or_(_IS_LIVE, _chat.c.chat_id == _CHAT))
    .order_by(_chat.c.user_id, _chat.c.chat_id)
    .with_for_update(key_share=True)
)

PAIR = (_allowance.c.user_id, _allowance.c.advisor_id)
_pair = _unnest("pair", "of_", PAIR)
_OF_FIRST = and_(_account.c.bucket == _BUCKET, _account.c.user_id == _USER)

CLOCK_AND_ALLOWANCES = (
    # The clock of where the account is, read once.
    select(
        select(_NOW).select_from(_account).where(_OF_FIRST).scalar_subquery().label("now"),
        _pair.c.user_id,
        _allowance.c.advisor_id,
        _allowance.c.granted_us,
        _allowance.c.used_us,
    )
    .select_from(_pair)
    .outerjoin(
        _allowance,
        and_(
            _allowance.c.bucket == _BUCKET,
            _allowance.c.user_id == _pair.c.user_id,
            _allowance.c.advisor_id == _pair.c.advisor_id,
        ),
    )
)

CHAT_KEY = tuple(_chat.c[name] for name in ("bucket", *_CHAT_KEY))
_wanted = _unnest("wanted", "of_", CHAT_KEY, numbered=True)
_IS_WANTED = and_(*(_chat.c[c.name] == _wanted.c[c.name] for c in CHAT_KEY))

LOCK_BEATING_CHATS = (
    select(_wanted.c.place, _NOW, _chat.c.last_heartbeat_at, _chat.c.lease_us, _chat.c.exhausts_at)
    .select_from(_wanted)
    .join(_chat, _IS_WANTED)
    .where(_IS_RUNNING)
    .order_by(*CHAT_KEY)
    .with_for_update(of=_chat, key_share=True, skip_locked=True)
)

RENEW_LEASES = (
    update(_chat)
    .where(_IS_WANTED)
    .values(last_heartbeat_at=func.greatest(_chat.c.last_heartbeat_at, bindparam("at", type_=tables.Instant)))
)

_IN_BUCKET = _chat.c.bucket == _BUCKET
LOCK_BEATING_CHATS_IN_BUCKET = LOCK_BEATING_CHATS.where(_IN_BUCKET)
RENEW_LEASES_IN_BUCKET = RENEW_LEASES.where(_IN_BUCKET)

UPDATE_ACCOUNTS = _update_of(
    _account, ("user_id",), ("balance", "materialized_through", "next_entry", "due_at", "next_event", "low_at")
)
UPDATE_GROWN_ACCOUNTS = _update_of(_account, ("user_id",), ("balance",), at="materialized_through")
UPDATE_CHATS = _update_of(_chat, _CHAT_KEY, _CHAT_CHANGING)
UPDATE_CHAT_TOTALS = _update_of(_chat, _CHAT_KEY, CHAT_TOTALS)
UPDATE_ALLOWANCES = _update_of(_allowance, ("user_id", "advisor_id"), ("used_us",))


def _reading_of(wanted: Select[Any] | CompoundSelect[Any]) -> Select[Any]:
    """Build the one statement of readings: the clock, the accounts, and the wanted chats with their allowances."""
    chat = wanted.subquery("wanted")
    return (
        select(
            _account.c.user_id.label("of_user"),
            select(_NOW).scalar_subquery().label("now"),
            _account.c.balance,
            _account.c.materialized_through,
            *chat.columns,
            _allowance.c.granted_us,
            _allowance.c.used_us,
        )
        .select_from(_account)
        .outerjoin(chat, and_(chat.c.bucket == _account.c.bucket, chat.c.user_id == _account.c.user_id))
        .outerjoin(
            _allowance,
            and_(
                _allowance.c.bucket == _BUCKET,
                _allowance.c.user_id == chat.c.user_id,
                _allowance.c.advisor_id == chat.c.advisor_id,
            ),
        )
        .where(_account.c.bucket == _BUCKET, _account.c.user_id == USERS)
    )


_THEIR_CHATS = and_(_chat.c.bucket == _BUCKET, _chat.c.user_id == USERS)
_THEIR_RUNNING_CHATS = select(_chat).where(_THEIR_CHATS, _IS_RUNNING)
READ_RUNNING = _reading_of(_THEIR_RUNNING_CHATS)
READ_RUNNING_AND_THESE = _reading_of(
    # Two branches, each with an index of its own; one condition with OR would walk all of a user's past chats.
    union_all(
        _THEIR_RUNNING_CHATS,
        select(_chat).where(_THEIR_CHATS, _chat.c.chat_id == func.any(_array("of_chats", Text())), ~_IS_RUNNING),
    )
)
_MY_CHATS = and_(_chat.c.bucket == _BUCKET, _chat.c.user_id == _USER)


READ_KEY = (*CHAT_KEY, Column("leads", Boolean))
"""Of the chats of a user, one leads: with it come those that run, which are the same for all of them."""
_read = _unnest("wanted", "of_", READ_KEY)


def _chat_of_wanted(*conditions: ColumnElement[bool]) -> Select[Any]:
    of_user = and_(_chat.c.bucket == _read.c.bucket, _chat.c.user_id == _read.c.user_id, *conditions)
    return select(_chat).where(of_user).correlate(_read)


_of_wanted = union_all(
    _chat_of_wanted(_IS_RUNNING, _read.c.leads), _chat_of_wanted(_chat.c.chat_id == _read.c.chat_id, ~_IS_RUNNING)
).lateral("chats")

READ_WANTED = (
    # As `READ_RUNNING_AND_THESE`, over all buckets.
    select(
        _read.c.user_id.label("of_user"),
        select(_NOW).scalar_subquery().label("now"),
        _account.c.balance,
        _account.c.materialized_through,
        *_of_wanted.columns,
        _allowance.c.granted_us,
        _allowance.c.used_us,
    )
    .select_from(_read)
    .join(_account, and_(_account.c.bucket == _read.c.bucket, _account.c.user_id == _read.c.user_id))
    .outerjoin(_of_wanted, true())
    .outerjoin(
        _allowance,
        and_(
            _allowance.c.bucket == _read.c.bucket,
            _allowance.c.user_id == _read.c.user_id,
            _allowance.c.advisor_id == _of_wanted.c.advisor_id,
        ),
    )
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
    .where(_MY_CHATS, text(f"chat.{tables.PAGED_SQL}"), _chat.c.state == func.any(_array("in_states", Text())))
    .order_by(_chat.c.started_at.desc(), _chat.c.chat_id.desc())
    .limit(bindparam("at_most", type_=Integer))
)

_AFTER = bindparam("after_started_at", type_=tables.Instant)
NEXT_CHATS_PAGE = CHATS_PAGE.where(
    # Said once more on its own: an index can begin there, and with the rest only filter.
    _chat.c.started_at <= _AFTER,
    or_(_chat.c.started_at < _AFTER, and_(_chat.c.started_at == _AFTER, _chat.c.chat_id < _CHAT)),
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

_BEFORE = bindparam("before", type_=tables.Instant)
_IS_PENDING = text(tables.PENDING_SQL)
EVENT_KEY = (_event.c.user_id, _event.c.number)

EVENTS_DUE = (
    select(_event.c.bucket, func.count())
    .where(_IS_PENDING, _event.c.next_try_at <= _BEFORE)
    .group_by(_event.c.bucket)
    .order_by(_event.c.bucket)
)

_first = (
    select(*EVENT_KEY, _event.c.next_try_at)
    .where(_event.c.bucket == _BUCKET, _IS_PENDING)
    .order_by(*EVENT_KEY)
    .ext(distinct_on(_event.c.user_id))
    .subquery("first")
)
FIRST_EVENTS = (
    # Of each user the first that was not delivered; where that one has to wait, so have those behind it.
    select(_first.c.user_id, _first.c.number)
    .where(_first.c.next_try_at <= _BEFORE)
    .limit(bindparam("at_most", type_=Integer))
)

_these = _unnest("these", "of_", EVENT_KEY)
_IS_THESE = and_(_event.c.bucket == _BUCKET, *(_event.c[c.name] == _these.c[c.name] for c in EVENT_KEY))
LOCK_EVENTS = (
    select(*EVENT_KEY, _event.c.event_id, _event.c.payload, _event.c.attempts, _NOW)
    .select_from(_event)
    .join(_these, _IS_THESE)
    .where(_IS_PENDING, _event.c.next_try_at <= _BEFORE)
    .with_for_update(of=_event, skip_locked=True)
)
CLAIM_EVENTS = _update_of(_event, ("user_id", "number"), ("attempts",), at="next_try_at")
PUT_OFF_EVENTS = _update_of(_event, ("user_id", "number", "attempts"), ("state", "next_try_at", "last_error"))
DELETE_EVENTS = delete(_event).where(_IS_THESE)
