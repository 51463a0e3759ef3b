"""The audit: re-derive what is stored from segments, credits and tariffs, and name each difference.

Each batch of accounts is read in one snapshot, and all figures of an account are as of one instant, so a running
service never causes a false alarm.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from talktime.meter.state import CreditKind
from talktime.meter.units import format_credits
from talktime.store.accounts import due_at
from talktime.store.history import load_buckets, load_histories
from talktime.store.ledger import CHARGE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from talktime.meter.state import Chat, Segment
    from talktime.store.database import Database
    from talktime.store.history import History

BATCH_ACCOUNTS = 200


@dataclass(slots=True)
class Audit:
    """How many accounts were checked, and how many differences were found."""

    accounts: int = 0
    failed: int = 0

    def __str__(self) -> str:
        """One log line."""
        return f"audit accounts={self.accounts} differences={self.failed}"


async def audit(
    database: Database,
    stop: asyncio.Event,
    *,
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
    batch_accounts: int = BATCH_ACCOUNTS,
) -> Audit:
    """Check every account until `stop` is set, and call `report` with a line for each difference.

    Raises:
        DatabaseUnavailable: no answer from the database.
    """
    buckets = await database.snapshot(load_buckets)
    total = sum(buckets.values())
    made = Audit()
    for bucket in buckets:
        after: str | None = ""
        while after is not None and not stop.is_set():
            user_id = after
            histories = await database.snapshot(
                lambda connection: load_histories(connection, bucket, after=user_id, limit=batch_accounts)  # noqa: B023 - awaited at once
            )
            for history in histories:
                for difference in differences(history):
                    report(f"user {history.account.user_id!r}: {difference}")
                    made.failed += 1
            made.accounts += len(histories)
            progress(made.accounts, total)
            after = histories[-1].account.user_id if len(histories) == batch_accounts else None
    return made


def differences(history: History) -> Iterator[str]:
    """Yield what does not add up in an account, in words."""
    account = history.account
    for chat_id, segments in history.segments.items():
        yield from _segment_differences(chat_id, segments)
    free_us: dict[str, int] = defaultdict(int)
    open_cost = 0
    for chat in account.chats.values():
        yield from _chat_differences(chat, history.segments.get(chat.chat_id, []), account.at)
        free_us[chat.advisor_id] += chat.free_us
        if chat.opened_at is not None:
            open_cost += chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.opened_count_us)
    for advisor_id in sorted({*free_us, *account.allowances}):
        allowance = account.allowances.get(advisor_id)
        used_us = allowance.used_us if allowance else 0
        yield from _differs(f"allowance with advisor {advisor_id!r}: used_us", used_us, free_us[advisor_id])
    yield from _ledger_differences(history)
    booked = sum(entry.amount for entry in history.entries)
    yield from _differs("balance", account.balance, booked - open_cost, money=True)
    yield from _differs("next_entry", history.next_entry, len(history.entries) + 1)
    if history.due_at != due_at(account):
        yield "due_at does not follow from the chats' states"


def _differs(what: str, stored: int, derived: int, *, money: bool = False) -> Iterator[str]:
    if stored != derived:
        shown = format_credits if money else str
        yield f"{what} is {shown(stored)}, derived {shown(derived)}"


def _segment_differences(chat_id: str, segments: Sequence[Segment]) -> Iterator[str]:
    for segment in segments:
        name = f"chat {chat_id!r}: segment of {segment.started_at}"
        yield from _differs(
            f"{name}: free and paid time", segment.free_us + segment.paid_us, segment.ended_at - segment.started_at
        )
        price = segment.tariff.cost(segment.count_us + segment.paid_us) - segment.tariff.cost(segment.count_us)
        yield from _differs(f"{name}: cost", segment.cost, price, money=True)
    for earlier, later in pairwise(segments):
        name = f"chat {chat_id!r}: segment of {later.started_at}"
        if later.started_at < earlier.ended_at:
            yield f"{name} overlaps the one before it"
        # A count goes on under the same tariff; a start under another one begins it anew, even if its segment was
        # empty and so was not recorded.
        goes_on = later.tariff == earlier.tariff and later.count_us == earlier.count_us + earlier.paid_us
        if later.count_us != 0 and not goes_on:
            yield f"{name}: count_us is {later.count_us}, which does not go on from the one before it"


def _chat_differences(chat: Chat, segments: Sequence[Segment], at: int) -> Iterator[str]:
    name = f"chat {chat.chat_id!r}"
    elapsed_us = sum(segment.ended_at - segment.started_at for segment in segments)
    free_us = sum(segment.free_us for segment in segments)
    cost = sum(segment.cost for segment in segments)
    if chat.opened_at is not None:
        paid_us = chat.count_us - chat.opened_count_us
        elapsed_us += at - chat.opened_at
        free_us += at - chat.opened_at - paid_us
        cost += chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.opened_count_us)
        if segments and chat.opened_at < segments[-1].ended_at:
            yield f"{name}: the open segment overlaps the one before it"
        if chat.lease_end <= at:
            yield f"{name}: runs, though its lease had ended when it was materialized"
    yield from _differs(f"{name}: elapsed_us", chat.elapsed_us, elapsed_us)
    yield from _differs(f"{name}: free_us", chat.free_us, free_us)
    yield from _differs(f"{name}: cost", chat.cost, cost, money=True)


def _ledger_differences(history: History) -> Iterator[str]:
    uncharged = {
        (chat_id, segment.started_at): segment
        for chat_id, segments in history.segments.items()
        for segment in segments
        if segment.cost != 0
    }
    booked = 0
    for number, entry in enumerate(history.entries, start=1):
        name = f"ledger entry {entry.number}"
        yield from _differs(f"{name}: number", entry.number, number)
        booked += entry.amount
        yield from _differs(f"{name}: balance_after", entry.balance_after, booked, money=True)
        if entry.kind != CHARGE:
            if (entry.amount < 0) != CreditKind(entry.kind).takes:
                yield f"{name}: a {entry.kind} of {format_credits(entry.amount)}"
            continue
        segment = uncharged.pop((entry.chat_id or "", entry.segment_started_at or 0), None)
        if segment is None:
            yield f"{name}: charges a segment that does not exist, or a second time"
        else:
            yield from _differs(f"{name}: amount", entry.amount, -segment.cost, money=True)
    for chat_id, started_at in uncharged:
        yield f"chat {chat_id!r}: segment of {started_at} is not charged in the ledger"
