"""What is kept for ever: ledger entries and closed segments, both append-only; and the advisors' rate cards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert

from talktime.meter.state import Account, Credit, CreditKind, RateCard, Segment, StopReason, Tariff
from talktime.store import tables
from talktime.store.tables import bucket_of

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

_entry, _segment, _advisor = tables.ledger_entry, tables.segment, tables.advisor

CHARGE = "charge"
OPENING = "opening"
"""What an account had in the system that it was taken over from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One line of an account's ledger: what came in (positive) or was taken, in micro-credits.

    `kind` is a `CreditKind`, "opening", or "charge", which names the segment it pays for. `balance_after` is the
    running sum of the lines. It happened at `happened_at`, and was written as of `recorded_at`.
    """

    user_id: str
    number: int
    kind: str
    amount: int
    balance_after: int
    happened_at: int
    recorded_at: int
    memo: str
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    chat_id: str | None = None
    segment_started_at: int | None = None


def request_hash(kind: CreditKind, amount: int, memo: str) -> bytes:
    """Fingerprint of a credit request, to tell a repeated request from another one under the same key."""
    return hashlib.sha256(f"{kind}\n{amount}\n{memo}".encode()).digest()


def entries_of(account: Account, next_number: int, booked: int) -> list[LedgerEntry]:
    """Number the account's journal into ledger entries; `booked` is the running sum before them.

    A segment that cost nothing takes nothing, and has no line.
    """
    entries = []
    for event in account.journal:
        if isinstance(event, Segment):
            if event.cost == 0:
                continue
            booked -= event.cost
            entry = LedgerEntry(
                user_id=account.user_id,
                number=next_number,
                kind=CHARGE,
                amount=-event.cost,
                balance_after=booked,
                happened_at=event.ended_at,
                recorded_at=account.at,
                memo="",
                chat_id=event.chat_id,
                segment_started_at=event.started_at,
            )
        else:
            booked += event.amount
            entry = LedgerEntry(
                user_id=account.user_id,
                number=next_number,
                kind=str(event.kind),
                amount=event.amount,
                balance_after=booked,
                happened_at=event.credited_at,
                recorded_at=account.at,
                memo=event.memo,
                idempotency_key=event.key,
                request_hash=_hash_of(event),
            )
        entries.append(entry)
        next_number += 1
    return entries


def _hash_of(credit: Credit) -> bytes:
    return request_hash(credit.kind, abs(credit.amount), credit.memo)


async def insert_history(
    connection: AsyncConnection, bucket: int, accounts: Iterable[Account], entries: Sequence[LedgerEntry]
) -> None:
    """Append the closed segments of the accounts' journals, and the entries numbered from them."""
    segments = [
        _segment_row(bucket, account.user_id, event)
        for account in accounts
        for event in account.journal
        if isinstance(event, Segment)
    ]
    if segments:
        await connection.execute(insert(_segment), segments)
    if entries:
        names = [c.name for c in _entry.columns if c.name != "bucket"]
        rows = [{"bucket": bucket, **{name: getattr(entry, name) for name in names}} for entry in entries]
        await connection.execute(insert(_entry), rows)


async def find_entry(connection: AsyncConnection, user_id: str, key: str) -> LedgerEntry | None:
    """Return the entry that a credit of this Idempotency-Key made, if there is one."""
    row = (
        await connection.execute(
            select(_entry).where(
                _entry.c.bucket == bucket_of(user_id), _entry.c.user_id == user_id, _entry.c.idempotency_key == key
            )
        )
    ).one_or_none()
    return None if row is None else entry_from(row)


async def load_entries(
    connection: AsyncConnection, user_id: str, *, before: int | None, limit: int
) -> list[LedgerEntry]:
    """Read a page of an account's ledger, newest first, from below the number `before`."""
    query = (
        select(_entry)
        .where(_entry.c.bucket == bucket_of(user_id), _entry.c.user_id == user_id)
        .order_by(_entry.c.number.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(_entry.c.number < before)
    return [entry_from(row) for row in (await connection.execute(query)).all()]


async def load_segments(
    connection: AsyncConnection, user_id: str, chat_id: str, *, after: int | None, limit: int
) -> list[Segment]:
    """Read a page of a chat's closed segments, oldest first, of those that started after the instant `after`."""
    query = (
        select(_segment)
        .where(_segment.c.bucket == bucket_of(user_id), _segment.c.user_id == user_id, _segment.c.chat_id == chat_id)
        .order_by(_segment.c.started_at)
        .limit(limit)
    )
    if after is not None:
        query = query.where(_segment.c.started_at > bindparam("after", after, tables.Instant))
    return [segment_from(row) for row in (await connection.execute(query)).all()]


async def save_card(connection: AsyncConnection, advisor_id: str, card: RateCard) -> None:
    """Write an advisor's rate card, in a transaction of its own."""
    values = {
        "rate": card.tariff.rate,
        "first_us": card.tariff.first_us,
        "increment_us": card.tariff.increment_us,
        "free_us": card.free_us,
    }
    await connection.execute(
        upsert(_advisor)
        .values(advisor_id=advisor_id, **values)
        .on_conflict_do_update(index_elements=["advisor_id"], set_=values)
    )


async def load_card(connection: AsyncConnection, advisor_id: str) -> RateCard | None:
    """Return an advisor's own rate card, or None."""
    row = (await connection.execute(select(_advisor).where(_advisor.c.advisor_id == advisor_id))).one_or_none()
    return None if row is None else RateCard(Tariff(row.rate, row.first_us, row.increment_us), row.free_us)


def entry_from(row: Row[Any]) -> LedgerEntry:
    """Return the value of a row of `ledger_entry`."""
    return LedgerEntry(
        user_id=row.user_id,
        number=row.number,
        kind=row.kind,
        amount=row.amount,
        balance_after=row.balance_after,
        happened_at=row.happened_at,
        recorded_at=row.recorded_at,
        memo=row.memo,
        idempotency_key=row.idempotency_key,
        request_hash=row.request_hash,
        chat_id=row.chat_id,
        segment_started_at=row.segment_started_at,
    )


def _segment_row(bucket: int, user_id: str, segment: Segment) -> dict[str, Any]:
    return {
        "bucket": bucket,
        "user_id": user_id,
        "chat_id": segment.chat_id,
        "started_at": segment.started_at,
        "ended_at": segment.ended_at,
        "advisor_id": segment.advisor_id,
        "reason": str(segment.reason),
        "rate": segment.tariff.rate,
        "first_us": segment.tariff.first_us,
        "increment_us": segment.tariff.increment_us,
        "count_us": segment.count_us,
        "free_us": segment.free_us,
        "paid_us": segment.paid_us,
        "cost": segment.cost,
    }


def segment_from(row: Row[Any]) -> Segment:
    """Return the value of a row of `segment`."""
    return Segment(
        chat_id=row.chat_id,
        advisor_id=row.advisor_id,
        started_at=row.started_at,
        ended_at=row.ended_at,
        reason=StopReason(row.reason),
        tariff=Tariff(row.rate, row.first_us, row.increment_us),
        count_us=row.count_us,
        free_us=row.free_us,
        paid_us=row.paid_us,
        cost=row.cost,
    )
