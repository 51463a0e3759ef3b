"""The outbox: events that are to be told to the host product, written with what they tell.

Who sends one claims it first, for a while, in a transaction whose commit is waited for, and deletes it once it is
delivered. If nothing is heard of it, it is sent again after that while. So each is sent at least once, and nobody is
told of what was taken back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert as insert_or_nothing

from talktime.meter.events import Notice, tell
from talktime.meter.state import Account
from talktime.meter.units import format_credits
from talktime.store import statements as sql
from talktime.store import tables
from talktime.store.tables import bucket_of, datetime_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

_event, _account = tables.event, tables.account


class Outgoing(NamedTuple):
    """An event that was claimed at the instant `claimed_at`, to be sent for the `attempts`-th time."""

    user_id: str
    number: int
    event_id: str
    payload: str
    attempts: int
    claimed_at: int


class Undelivered(NamedTuple):
    """An event that was claimed and not delivered, and why; not to be tried again if `next_try_at` is None."""

    event: Outgoing
    next_try_at: int | None
    reason: str


# --- writing ----------------------------------------------------------------------------------------------------------


class _Stored(Protocol):
    @property
    def account(self) -> Account: ...
    @property
    def next_event(self) -> int | None: ...
    @property
    def low_at(self) -> int | None: ...
    @property
    def exhausts_at(self) -> Mapping[str, int | None]: ...


def events_of(
    bucket: int, stored: _Stored, after: Account, low_us: int | None
) -> tuple[Sequence[Mapping[str, Any]], int | None]:
    """Return the rows of what happened between a stored account and its next state, and since when credits are low.

    Nothing happens where nobody wants to be told (`low_us` is None).
    """
    if low_us is None:
        return (), stored.low_at
    # It is the same in all running chats, or not known.
    known = {stored.exhausts_at[chat.chat_id] for chat in stored.account.chats.values() if chat.opened_at is not None}
    exhausts_at = known.pop() if len(known) == 1 else None
    notices, low_at = tell(stored.account, after, low_at=stored.low_at, low_us=low_us, exhausts_at=exhausts_at)
    rows = [_row(bucket, after, notice, number) for number, notice in enumerate(notices, start=stored.next_event or 1)]
    return rows, low_at


def _row(bucket: int, account: Account, notice: Notice, number: int) -> Mapping[str, Any]:
    return {
        "bucket": bucket,
        "user_id": account.user_id,
        "number": number,
        "event_id": event_id(account.user_id, notice),
        "type": str(notice.told),
        "occurred_at": notice.occurred_at,
        "recorded_at": account.at,
        "payload": _payload(account.user_id, notice, number),
        "state": "pending",
        "attempts": 0,
        "next_try_at": account.at,
        "last_error": None,
    }


def event_id(user_id: str, notice: Notice) -> str:
    """Return the id of an event: made of what it tells alone, so that whatever tells the same has the same."""
    tells = (
        notice.told,
        user_id,
        notice.chat_id,
        notice.advisor_id,
        notice.revision,
        notice.occurred_at,
        notice.credit and notice.credit.key,
    )
    return "evt_" + hashlib.sha256(json.dumps(tells).encode()).hexdigest()[:32]


def _payload(user_id: str, notice: Notice, number: int) -> str:
    credit = notice.credit
    data = {
        "user_id": user_id,
        "chat_id": notice.chat_id,
        "advisor_id": notice.advisor_id,
        "revision": notice.revision,
        "elapsed_us": notice.elapsed_us,
        "free_used_us": notice.free_us,
        "credits_used": _credits_or_none(notice.cost),
        "switched_to": notice.switched_to,
        "kind": credit and str(credit.kind),
        "amount": credit and format_credits(credit.amount),
        "idempotency_key": credit and credit.key,
        "balance": _credits_or_none(notice.balance),
        "exhausts_at": None if notice.exhausts_at is None else _text_of(notice.exhausts_at),
    }
    event = {
        "type": str(notice.told),
        "occurred_at": _text_of(notice.occurred_at),
        "number": number,
        "data": {name: value for name, value in data.items() if value is not None},
    }
    return json.dumps(event, separators=(",", ":"))


def _credits_or_none(amount: int | None) -> str | None:
    return None if amount is None else format_credits(amount)


def _text_of(instant: int) -> str:
    return f"{datetime_of(instant).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


async def insert_events(connection: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write events, in the transaction of what they tell; one that tells what another one of the outbox does, is it."""
    if rows:
        await connection.execute(insert_or_nothing(_event).on_conflict_do_nothing(), rows)


# --- sending ----------------------------------------------------------------------------------------------------------


async def load_due_events(connection: AsyncConnection) -> tuple[list[int], int]:
    """Look up the buckets with events that may be sent, and the instant."""
    now: int = (await connection.execute(sql.CLOCK)).scalar_one()
    rows = await connection.execute(sql.EVENTS_DUE, {"before": now})
    return [bucket for bucket, _ in rows.all()], now


async def claim_events(
    connection: AsyncConnection, bucket: int, *, before: int, limit: int, lease_us: int
) -> list[Outgoing]:
    """Claim the next events of a bucket that may be sent since `before`: of each user, none but the first.

    Until the claim ends, `lease_us` from now, nobody else sends them. Those that somebody else claims just now are
    skipped.
    """
    place = {"in_bucket": bucket, "before": before}
    first = (await connection.execute(sql.FIRST_EVENTS, {**place, "at_most": limit})).all()
    if not first:
        return []
    locked = await connection.execute(sql.LOCK_EVENTS, {**place, **sql.arrays("of_", sql.EVENT_KEY, first)})
    claimed = [
        Outgoing(user_id, number, event_id, payload, attempts + 1, now)
        for user_id, number, event_id, payload, attempts, now in locked.all()
    ]
    if claimed:
        rows = [(event.user_id, event.number, event.attempts) for event in claimed]
        until = max(event.claimed_at for event in claimed) + lease_us
        new = sql.arrays("new_", sql.CLAIM_EVENTS.columns, rows)
        await connection.execute(sql.CLAIM_EVENTS.statement, {"in_bucket": bucket, **new, "at": until})
    return claimed


async def settle_events(
    connection: AsyncConnection, bucket: int, delivered: Sequence[Outgoing], undelivered: Sequence[Undelivered]
) -> None:
    """Write what became of claimed events. One that was claimed again meanwhile is that one's to put off."""
    if delivered:
        keys = sql.arrays("of_", sql.EVENT_KEY, [(event.user_id, event.number) for event in delivered])
        await connection.execute(sql.DELETE_EVENTS, {"in_bucket": bucket, **keys})
    if undelivered:
        rows = [
            (e.user_id, e.number, e.attempts, "dead" if next_try_at is None else "pending", next_try_at, reason)
            for e, next_try_at, reason in undelivered
        ]
        new = sql.arrays("new_", sql.PUT_OFF_EVENTS.columns, rows)
        await connection.execute(sql.PUT_OFF_EVENTS.statement, {"in_bucket": bucket, **new})


# --- for operators ----------------------------------------------------------------------------------------------------


async def revive_events(connection: AsyncConnection, user_id: str, number: int | None) -> int:
    """Have a user's dead events tried again from now on, all of them or one; return how many there were."""
    dead = [_event.c.bucket == bucket_of(user_id), _event.c.user_id == user_id, _event.c.state == "dead"]
    if number is not None:
        dead.append(_event.c.number == number)
    clock = select(func.clock_timestamp(type_=tables.Instant)).select_from(_account)
    at_account = (_account.c.bucket == bucket_of(user_id), _account.c.user_id == user_id)
    now = (await connection.execute(clock.where(*at_account))).scalar_one_or_none()
    if now is None:
        return 0
    again = update(_event).where(*dead).values(state="pending", attempts=0, next_try_at=now)
    return (await connection.execute(again)).rowcount
