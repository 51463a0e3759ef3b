"""The books: what is stored, read in one snapshot, and held against what was sent and what was acknowledged.

The sums are made here once more, without the product's code and without the audit's.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from psycopg import IsolationLevel
from psycopg.rows import dict_row

from tests.database import connect
from tests.faults.chats import Json
from tests.faults.load import Load

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

Row = dict[str, Any]


@dataclass(frozen=True)
class Books:
    """All rows of the users' tables, as of one snapshot."""

    accounts: Sequence[Row]
    chats: Sequence[Row]
    segments: Sequence[Row]
    entries: Sequence[Row]


@dataclass(frozen=True)
class Claims:
    """What had been acknowledged when the snapshot was taken, or earlier: all of it must be in the books."""

    entries: dict[tuple[str, str], Json]
    revisions: dict[tuple[str, str], int]
    opened: set[tuple[str, str, str]]
    closed: set[tuple[str, str, str, str]]


def claims_of(load: Load) -> Claims:
    """Return what has been acknowledged so far."""
    chats = load.chats.items()
    return Claims(
        {place: credit.entry for place, credit in load.credits.items() if credit.entry is not None},
        {place: chat.revision_min for place, chat in chats},
        {(*place, instant) for place, chat in chats for instant in chat.opened},
        {(*place, instant, reason) for place, chat in chats for instant, reason in chat.closed},
    )


def read_books(url: URL) -> Books:
    """Read all of it in one snapshot."""
    with connect(url) as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
            tables = [
                cursor.execute(f"SELECT * FROM {table} ORDER BY user_id, {order}").fetchall()
                for table, order in (
                    ("account", "1"),
                    ("chat", "chat_id"),
                    ("segment", "chat_id, started_at"),
                    ("ledger_entry", "number"),
                )
            ]
    return Books(*tables)


async def check_books(load: Load, url: URL) -> Books:
    """Hold the books against a load, which may go on meanwhile."""
    claims = claims_of(load)
    books = await asyncio.to_thread(read_books, url)
    _check_credits(load, claims, books)
    _check_chats(claims, books)
    _check_sums(books)
    return books


def check_closed_books(load: Load, books: Books) -> None:
    """Hold the books against a load that has ended and whose credits have all been answered."""
    stored = Counter((entry["user_id"], entry["memo"]) for entry in books.entries if entry["kind"] != "charge")
    assert {place: 1 for place, credit in load.credits.items() if credit.entry is not None} == dict(stored)
    for chat in books.chats:
        known = load.chats[chat["user_id"], chat["chat_id"]]
        assert known.revision_min <= chat["revision"] <= known.revision_max, (chat, known)


def shown(instant: datetime) -> str:
    """Write an instant as the API does."""
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def us_between(earlier: datetime, later: datetime) -> int:
    """Return microseconds."""
    span = later - earlier
    return (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds


def _check_credits(load: Load, claims: Claims, books: Books) -> None:
    found = {}
    for entry in books.entries:
        if entry["kind"] == "charge":
            continue
        place = entry["user_id"], entry["memo"]
        assert place not in found, f"twice: {entry}"
        assert place in load.credits, f"nobody sent this: {entry}"
        assert (load.credits[place].amount, load.credits[place].kind) == (entry["amount"], entry["kind"])
        found[place] = entry
    for place, answered in claims.entries.items():
        assert place in found, f"acknowledged and lost: {answered}"
        entry = found[place]
        assert (answered["number"], answered["happened_at"]) == (entry["number"], shown(entry["happened_at"]))
        assert answered["balance_after"] == f"{entry['balance_after'] // 10**6}.{entry['balance_after'] % 10**6:06}"


def _check_chats(claims: Claims, books: Books) -> None:
    revisions = {(chat["user_id"], chat["chat_id"]): chat["revision"] for chat in books.chats}
    for place, acknowledged in claims.revisions.items():
        assert revisions.get(place, 0) >= acknowledged, f"{place} fell back below an acknowledged revision"
    begun = Counter((s["user_id"], s["chat_id"], shown(s["started_at"])) for s in books.segments)
    begun.update(
        (chat["user_id"], chat["chat_id"], shown(chat["opened_at"])) for chat in books.chats if chat["opened_at"]
    )
    for start in claims.opened:
        assert begun[start] == 1, f"{begun[start]} segments of the acknowledged start {start}"
    over = Counter((s["user_id"], s["chat_id"], shown(s["ended_at"]), s["reason"]) for s in books.segments)
    for stop in claims.closed:
        assert over[stop] == 1, f"{over[stop]} segments end as was acknowledged in {stop}"


def _cost(tariff: Row, count_us: int) -> int:
    blocks_us = count_us
    if 0 < count_us <= tariff["first_us"]:
        blocks_us = tariff["first_us"]
    elif count_us and tariff["increment_us"]:
        whole = -(-(count_us - tariff["first_us"]) // tariff["increment_us"])
        blocks_us = tariff["first_us"] + whole * tariff["increment_us"]
    return int(-(-tariff["rate"] * blocks_us // 60_000_000))


def _check_sums(books: Books) -> None:
    entries: dict[str, list[Row]] = defaultdict(list)
    for entry in books.entries:
        entries[entry["user_id"]].append(entry)
    segments: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for segment in books.segments:
        segments[segment["user_id"], segment["chat_id"]].append(segment)
    accrued: Counter[str] = Counter()
    for chat in books.chats:
        mine = segments[chat["user_id"], chat["chat_id"]]
        cost = _cost(chat, chat["count_us"]) - _cost(chat, chat["opened_count_us"]) if chat["opened_at"] else 0
        accrued[chat["user_id"]] += cost
        assert sum(s["cost"] for s in mine) + cost == chat["cost"], chat
        ran_us = sum(us_between(s["started_at"], s["ended_at"]) for s in mine)
        account = next(a for a in books.accounts if a["user_id"] == chat["user_id"])
        if chat["opened_at"]:
            ran_us += us_between(chat["opened_at"], account["materialized_through"])
        assert ran_us == chat["elapsed_us"], chat
    charged = Counter(
        {
            (e["user_id"], e["chat_id"], e["segment_started_at"]): -e["amount"]
            for e in books.entries
            if e["kind"] == "charge"
        }
    )
    costs = {(s["user_id"], s["chat_id"], s["started_at"]): s["cost"] for s in books.segments if s["cost"]}
    assert costs == dict(charged)
    assert len(costs) == sum(entry["kind"] == "charge" for entry in books.entries)
    for segment in books.segments:
        expected = _cost(segment, segment["count_us"] + segment["paid_us"]) - _cost(segment, segment["count_us"])
        assert expected == segment["cost"], segment
    for account in books.accounts:
        lines = entries[account["user_id"]]
        assert list(range(1, len(lines) + 1)) == [line["number"] for line in lines]
        booked = 0
        for line in lines:
            booked += line["amount"]
            assert booked == line["balance_after"], line
        assert booked - accrued[account["user_id"]] == account["balance"] >= 0, account
