"""What operators look at: statements over all users and so over all buckets, which only read; and the passes made.

`OVER_ALL_BUCKETS` lists those statements. No other may leave out the bucket, and tests hold the list to that.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    Integer,
    Interval,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
    tuple_,
    type_coerce,
)

from talktime.meter.state import Account, Allowance, Chat, ChatState, Segment
from talktime.store import tables
from talktime.store.accounts import chat_from
from talktime.store.ledger import segment_from
from talktime.store.statements import CLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

_account, _allowance, _chat, _segment = tables.account, tables.allowance, tables.chat, tables.segment
_event, _pass, _audit = tables.event, tables.reconciler_pass, tables.reconciler_audit

# A literal, not a parameter: only so does the planner see that the index of live chats has them all.
_IS_RUNNING = _chat.c.state == literal_column(f"'{ChatState.RUNNING}'")
_LIMIT = bindparam("at_most", type_=Integer)
_SINCE = bindparam("since", type_=tables.Instant)

MICROSECOND = timedelta(microseconds=1)

# Ids are ASCII and sorted by code point: no id that begins with a prefix comes after the prefix and this.
_AFTER_ALL_IDS = "\x7f"

COUNT_RUNNING = select(func.count()).select_from(_chat).where(_IS_RUNNING)
"""How many chats are stored as running; some of them may have stopped since they were written."""

_NEWEST = (
    select(_chat.c.bucket, _chat.c.user_id, _chat.c.chat_id)
    .where(_IS_RUNNING)
    .order_by(_chat.c.opened_at.desc(), _chat.c.user_id, _chat.c.chat_id)
    .limit(_LIMIT)
)

NEWEST_RUNNING = _NEWEST
"""The keys of the chats that are stored as running, the segment opened last first."""


def _accounts_that(*conditions: Any) -> Select[Any]:  # noqa: ANN401 - SQLAlchemy's conditions have many types
    """Build the statement that reads accounts with all their running chats and the allowances of these."""
    return (
        select(
            _account.c.balance,
            _account.c.materialized_through,
            *_chat.columns,
            _allowance.c.granted_us,
            _allowance.c.used_us,
        )
        .select_from(_chat)
        .join(_account, and_(_account.c.bucket == _chat.c.bucket, _account.c.user_id == _chat.c.user_id))
        .join(
            _allowance,
            and_(
                _allowance.c.bucket == _chat.c.bucket,
                _allowance.c.user_id == _chat.c.user_id,
                _allowance.c.advisor_id == _chat.c.advisor_id,
            ),
        )
        .where(_IS_RUNNING, *conditions)
    )


_newest = _NEWEST.subquery("newest")

ALL_RUNNING = _accounts_that()
"""Every account that has a running chat."""

THOSE_OF_NEWEST = _accounts_that(
    tuple_(_chat.c.bucket, _chat.c.user_id).in_(select(_newest.c.bucket, _newest.c.user_id))
)
"""The accounts of the running chats that `NEWEST_RUNNING` finds."""

SEGMENTS_ENDED = select(_segment).where(_segment.c.ended_at > _SINCE)
"""The closed segments that ended after an instant."""

USERS_FROM = (
    select(_account.c.user_id)
    .where(
        _account.c.user_id >= bindparam("first_id", type_=Text), _account.c.user_id < bindparam("end_id", type_=Text)
    )
    .order_by(_account.c.user_id)
    .limit(_LIMIT)
)
"""The first user ids of a range."""

_now = bindparam("now", type_=tables.Instant)
_due_since = func.greatest(_account.c.materialized_through, _account.c.due_at, type_=tables.Instant)
_is_due = _account.c.due_at <= _now

WORK_WAITING = select(
    func.min(_due_since).filter(_is_due),
    type_coerce(func.sum(_now - _due_since).filter(_is_due), Interval),
    func.max(_account.c.materialized_through),
).where(_account.c.due_at.is_not(None))
"""Since when the oldest of what a pass has to write waits, and for how long all of it together; a row.

And the latest instant up to which one of the accounts was materialized that have something to write now or later.
"""

_EVENTS = (
    select(
        _event.c.user_id,
        _event.c.number,
        _event.c.type,
        _event.c.occurred_at,
        _event.c.attempts,
        _event.c.next_try_at,
        _event.c.last_error,
    )
    .order_by(_event.c.user_id, _event.c.number)
    .limit(_LIMIT)
)

LATE_EVENTS = _EVENTS.where(_event.c.attempts > literal_column("0"))
"""The events that were sent and not delivered, the dead ones too."""

DEAD_EVENTS = _EVENTS.where(_event.c.state == literal_column("'dead'"))
"""The events that are not sent any more."""

EVENTS_WAITING = select(
    func.count().filter(_event.c.state == literal_column("'pending'")),
    func.min(_event.c.recorded_at).filter(_event.c.state == literal_column("'pending'")),
    func.count().filter(_event.c.state == literal_column("'dead'")),
).select_from(_event)
"""How many events are to be sent, since when the oldest of them is, and how many are dead; a row."""

OVER_ALL_BUCKETS = (
    *(COUNT_RUNNING, NEWEST_RUNNING, ALL_RUNNING, THOSE_OF_NEWEST, SEGMENTS_ENDED, USERS_FROM),
    *(WORK_WAITING, EVENTS_WAITING, LATE_EVENTS, DEAD_EVENTS),
)


class LateEvent(NamedTuple):
    """An event that was sent `attempts` times and not delivered; dead, and not sent again, without a `next_try_at`."""

    user_id: str
    number: int
    type: str
    occurred_at: int
    attempts: int
    next_try_at: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """A pass of a reconciler: when it looked up its work, and what it did. Instants and durations in microseconds."""

    pass_id: str
    began_at: int
    took_us: int
    lag_us: int
    accounts: int
    chats: int
    failed: int


@dataclass(frozen=True, slots=True)
class RecordedAudit:
    """An audit that got to its end: when that was, how long it took, and what it found."""

    audit_id: str
    ended_at: int
    took_us: int
    accounts: int
    differing: int
    differences: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a pass or a delivery, as of the instant `now`.

    `lag_us` is for how long the oldest of it has been waiting, and `unmaterialized_us` the sum over all accounts.
    `ahead_us` is how far the latest instant that something was written for lies beyond `now`: 0 unless the clock
    stepped back. `events` are to be sent, the oldest for `events_us`; `dead_events` are not sent any more.
    """

    now: int
    lag_us: int
    unmaterialized_us: int
    ahead_us: int
    events: int
    events_us: int
    dead_events: int


@dataclass(frozen=True, slots=True)
class Running:
    """The accounts with chats that are stored as running, as of one snapshot and the instant `now`.

    `newest` are the keys (user, chat) of the newest running chats in order, `count` is how many there are in all.
    """

    now: int
    accounts: list[Account]
    newest: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0


async def load_newest_running(connection: AsyncConnection, limit: int) -> Running:
    """Read the accounts of the newest running chats; for one snapshot."""
    at_most = {"at_most": limit}
    # The clock is the last to be read of a snapshot, so nothing in it is later.
    keys = (await connection.execute(NEWEST_RUNNING, at_most)).all()
    count: int = (await connection.execute(COUNT_RUNNING)).scalar_one()
    rows = (await connection.execute(THOSE_OF_NEWEST, at_most)).all()
    now: int = (await connection.execute(CLOCK)).scalar_one()
    return Running(now, _accounts_from(rows), [(row.user_id, row.chat_id) for row in keys], count)


async def load_running_and_ended(connection: AsyncConnection, span_us: int) -> tuple[Running, list[Segment]]:
    """Read all accounts with running chats, and the segments that ended in the last `span_us`; for one snapshot."""
    rows = (await connection.execute(ALL_RUNNING)).all()
    now: int = (await connection.execute(CLOCK)).scalar_one()
    ended = (await connection.execute(SEGMENTS_ENDED, {"since": now - span_us})).all()
    return Running(now, _accounts_from(rows)), [segment_from(row) for row in ended]


async def load_user_ids(connection: AsyncConnection, prefix: str, limit: int) -> list[str]:
    """Read the first user ids that begin with a text, in order."""
    place = {"first_id": prefix, "end_id": prefix + _AFTER_ALL_IDS, "at_most": limit}
    return list((await connection.execute(USERS_FROM, place)).scalars())


def _accounts_from(rows: Sequence[Row[Any]]) -> list[Account]:
    chats: dict[str, dict[str, Chat]] = defaultdict(dict)
    allowances: dict[str, dict[str, Allowance]] = defaultdict(dict)
    facts = {}
    for row in rows:
        chats[row.user_id][row.chat_id] = chat_from(row[2:-2])
        allowances[row.user_id][row.advisor_id] = Allowance(row.granted_us, row.used_us)
        facts[row.user_id] = row.materialized_through, row.balance
    return [
        Account(user_id=user_id, at=at, balance=balance, allowances=allowances[user_id], chats=chats[user_id])
        for user_id, (at, balance) in facts.items()
    ]


# --- passes -----------------------------------------------------------------------------------------------------------


async def insert_pass(connection: AsyncConnection, made: RecordedPass, *, keep_since: int) -> None:
    """Write a pass, and forget those that began before an instant; a transaction of its own."""
    await connection.execute(insert(_pass).values(asdict(made)))
    await connection.execute(delete(_pass).where(_pass.c.began_at < bindparam("since", keep_since, tables.Instant)))


async def load_passes(connection: AsyncConnection, limit: int) -> tuple[list[RecordedPass], int]:
    """Read the passes that began last, newest first, and the clock; for one snapshot."""
    rows = await connection.execute(select(_pass).order_by(_pass.c.began_at.desc(), _pass.c.pass_id).limit(limit))
    passes = [RecordedPass(**row) for row in rows.mappings()]
    now: int = (await connection.execute(CLOCK)).scalar_one()
    return passes, now


# --- from outside -----------------------------------------------------------------------------------------------------


async def load_waiting(connection: AsyncConnection) -> Waiting:
    """Read what waits; for one snapshot."""
    now: int = (await connection.execute(CLOCK)).scalar_one()
    oldest, waited, latest = (await connection.execute(WORK_WAITING, {"now": now})).one()
    events, events_since, dead_events = (await connection.execute(EVENTS_WAITING)).one()
    return Waiting(
        now=now,
        lag_us=0 if oldest is None else max(0, now - oldest),
        unmaterialized_us=0 if waited is None else max(0, waited // MICROSECOND),
        ahead_us=0 if latest is None else max(0, latest - now),
        events=events,
        events_us=0 if events_since is None else max(0, now - events_since),
        dead_events=dead_events,
    )


async def load_last_pass(connection: AsyncConnection, *, without_failure: bool = False) -> RecordedPass | None:
    """Read the pass that began last, of all or of those that could write every account; None if there is none."""
    query = select(_pass).order_by(_pass.c.began_at.desc(), _pass.c.pass_id).limit(1)
    row = (await connection.execute(query.where(_pass.c.failed == 0) if without_failure else query)).mappings().first()
    return None if row is None else RecordedPass(**row)


async def load_last_audit(connection: AsyncConnection) -> RecordedAudit | None:
    """Read the audit that ended last; None if there is none."""
    query = select(_audit).order_by(_audit.c.ended_at.desc(), _audit.c.audit_id).limit(1)
    row = (await connection.execute(query)).mappings().first()
    return None if row is None else RecordedAudit(**row)


async def insert_audit(connection: AsyncConnection, made: RecordedAudit, *, keep_since: int) -> None:
    """Write what an audit found, and forget those that ended before an instant; a transaction of its own."""
    await connection.execute(insert(_audit).values(asdict(made)))
    await connection.execute(delete(_audit).where(_audit.c.ended_at < bindparam("since", keep_since, tables.Instant)))


async def load_late_events(connection: AsyncConnection, *, dead: bool, limit: int) -> list[LateEvent]:
    """Return events that were sent and not delivered, of all users, or the dead ones among them."""
    rows = await connection.execute(DEAD_EVENTS if dead else LATE_EVENTS, {"at_most": limit})
    return [LateEvent(*row) for row in rows.all()]
