"""The books: what is stored, read in one snapshot, and held against what was sent and what was acknowledged.

The sums are made here once more, without the product's code and without the audit's.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from psycopg import IsolationLevel
from psycopg.rows import dict_row

from tests.database import connect
from tests.faults.chats import Json
from tests.faults.load import Load
from tests.faults.processes import Cluster, passes_after, until

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

Row = dict[str, Any]


@dataclass(frozen=True)
class Books:
    """All rows of the users' tables, as of one snapshot."""

    accounts: Sequence[Row]
    chats: Sequence[Row]
    allowances: Sequence[Row]
    segments: Sequence[Row]
    entries: Sequence[Row]


@dataclass(frozen=True)
class Claims:
    """What had been acknowledged when the snapshot was taken, or earlier: all of it must be in the books."""

    entries: dict[tuple[str, str], Json]
    revisions: dict[tuple[str, str], int]
    opened: set[tuple[str, str, str]]
    closed: set[tuple[str, str, str, str]]
    leases: Mapping[tuple[str, str], Sequence[tuple[str, str]]]


def claims_of(load: Load) -> Claims:
    """Return what has been acknowledged so far."""
    chats = load.chats.items()
    return Claims(
        {place: credit.entry for place, credit in load.credits.items() if credit.entry is not None},
        {place: chat.revision_min for place, chat in chats},
        {(*place, instant) for place, chat in chats for instant in chat.opened},
        {(*place, instant, reason) for place, chat in chats for instant, reason in chat.closed},
        {place: tuple(chat.leases) for place, chat in chats},
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
                    ("allowance", "advisor_id"),
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
    _check_leases(claims, books)
    stretches = _stretches(books)
    _check_stretches(books, stretches)
    _check_ledger(books, stretches)
    return books


def check_closed_books(load: Load, books: Books) -> None:
    """Hold the books against a load that has ended and whose credits have all been answered."""
    stored = Counter((entry["user_id"], entry["memo"]) for entry in books.entries if entry["kind"] != "charge")
    assert {place: 1 for place, credit in load.credits.items() if credit.entry is not None} == dict(stored)
    for chat in books.chats:
        known = load.chats[chat["user_id"], chat["chat_id"]]
        assert known.revision_min <= chat["revision"] <= known.revision_max, (chat, known)


async def close_books(load: Load, running: Cluster, url: URL) -> Books:
    """Have reconcilers pass and a load end, and check that nothing is lost, doubled or amiss: all went on by itself."""
    passes = [partial(passes_after, reconciler, len(reconciler.output)) for reconciler in running.reconcilers]
    await asyncio.gather(*(until(passed, "a pass") for passed in passes))
    await load.finish()
    await load.settle()
    await load.ask_all()
    code, out, err = await running.run("reconcile")
    assert (0, "") == (code, out), err
    await load.ask_all()
    books = await check_books(load, url)
    check_closed_books(load, books)
    await running.audit()
    for program in running.programs:
        # What was up ended only when it was killed, whatever happened to the others.
        assert [-signal.SIGKILL] * program.kills == program.ends, (program.name, program.output[-2_000:])
        assert not program.traces, (program.name, program.traces[:3])
    return books


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


def _check_leases(claims: Claims, books: Books) -> None:
    """A heartbeat may leave nothing but a later end of its lease: no clock stopped, or is to stop, before that."""
    for chat in books.chats:
        ends = shown(chat["last_heartbeat_at"] + timedelta(microseconds=chat["lease_us"]))
        for lease in claims.leases[chat["user_id"], chat["chat_id"]]:
            assert lease[1] <= ends, f"the acknowledged lease {lease} is not in {chat}"
    for segment in books.segments:
        if segment["reason"] == "lapsed":
            began, ended = shown(segment["started_at"]), shown(segment["ended_at"])
            for as_of, until_when in claims.leases[segment["user_id"], segment["chat_id"]]:
                early = began <= as_of < ended < until_when
                assert not early, f"it had been acknowledged at {as_of} to run until {until_when}: {segment}"


def _cost(tariff: Row, count_us: int) -> int:
    blocks_us = count_us
    if 0 < count_us <= tariff["first_us"]:
        blocks_us = tariff["first_us"]
    elif count_us and tariff["increment_us"]:
        whole = -(-(count_us - tariff["first_us"]) // tariff["increment_us"])
        blocks_us = tariff["first_us"] + whole * tariff["increment_us"]
    return int(-(-tariff["rate"] * blocks_us // 60_000_000))


def _stretches(books: Books) -> list[Row]:
    """Return all segments, the open ones too: as they stood when their accounts were materialized."""
    through = {account["user_id"]: account["materialized_through"] for account in books.accounts}
    stretches = list(books.segments)
    for chat in books.chats:
        if chat["opened_at"]:
            ended_at = through[chat["user_id"]]
            paid_us = chat["count_us"] - chat["opened_count_us"]
            figures = {
                "started_at": chat["opened_at"],
                "ended_at": ended_at,
                "count_us": chat["opened_count_us"],
                "free_us": us_between(chat["opened_at"], ended_at) - paid_us,
                "paid_us": paid_us,
                "cost": _cost(chat, chat["count_us"]) - _cost(chat, chat["opened_count_us"]),
            }
            stretches.append({**chat, **figures})
    return stretches


def _check_stretches(books: Books, stretches: Sequence[Row]) -> None:
    """Check each one's figures, the totals of each chat, and what a user's chats with one advisor share."""
    of_chat: dict[tuple[str, str], list[Row]] = defaultdict(list)
    of_pair: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for s in sorted(stretches, key=lambda s: s["started_at"]):
        of_chat[s["user_id"], s["chat_id"]].append(s)
        of_pair[s["user_id"], s["advisor_id"]].append(s)
        assert s["free_us"] + s["paid_us"] == us_between(s["started_at"], s["ended_at"]), s
        assert s["free_us"] >= 0 <= s["paid_us"], s
        assert _cost(s, s["count_us"] + s["paid_us"]) - _cost(s, s["count_us"]) == s["cost"], s
    for chat in books.chats:
        mine = of_chat[chat["user_id"], chat["chat_id"]]
        assert sum(s["cost"] for s in mine) == chat["cost"], chat
        assert sum(s["free_us"] for s in mine) == chat["free_us"], chat
        assert sum(us_between(s["started_at"], s["ended_at"]) for s in mine) == chat["elapsed_us"], chat
    granted = {(a["user_id"], a["advisor_id"]): a for a in books.allowances}
    assert set(of_pair) <= set(granted)
    for pair, allowance in granted.items():
        assert sum(s["free_us"] for s in of_pair[pair]) == allowance["used_us"] <= allowance["granted_us"], allowance
    for shared in of_pair.values():
        for earlier, later in pairwise(shared):
            assert earlier["ended_at"] <= later["started_at"], f"two clocks at once: {earlier} and {later}"


def _check_ledger(books: Books, stretches: Sequence[Row]) -> None:
    """Check that each closed segment is charged once, and that the running sums lead to the balances."""
    charges = [entry for entry in books.entries if entry["kind"] == "charge"]
    charged = {(e["user_id"], e["chat_id"], e["segment_started_at"]): -e["amount"] for e in charges}
    costs = {(s["user_id"], s["chat_id"], s["started_at"]): s["cost"] for s in books.segments if s["cost"]}
    assert costs == charged
    assert len(costs) == len(charges)
    numbers: Counter[str] = Counter()
    booked: Counter[str] = Counter()
    balances: Counter[str] = Counter()
    for entry in books.entries:
        user_id = entry["user_id"]
        numbers[user_id] += 1
        booked[user_id] += entry["amount"]
        assert (numbers[user_id], booked[user_id]) == (entry["number"], entry["balance_after"]), entry
        balances[user_id] += entry["amount"] if entry["kind"] != "charge" else 0
    for stretch in stretches:
        balances[stretch["user_id"]] -= stretch["cost"]
    for account in books.accounts:
        assert balances[account["user_id"]] == account["balance"] >= 0, account
