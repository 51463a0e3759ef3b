"""The audit: re-derive what is stored from segments, credits and tariffs, and name each difference.

Each batch of accounts is read in one snapshot, and all figures of an account are as of one instant, so a running
service never causes a false alarm.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from talktime.meter.state import ChatState, CreditKind, StopReason
from talktime.meter.units import format_credits
from talktime.store.accounts import due_at
from talktime.store.history import load_buckets, load_histories
from talktime.store.ledger import CHARGE, request_hash

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from talktime.meter.state import Chat, Segment, Tariff
    from talktime.store.database import Database
    from talktime.store.history import History
    from talktime.store.ledger import LedgerEntry

BATCH_ACCOUNTS = 50


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
) -> Audit:
    """Check every account until `stop` is set, and call `report` with a line for each difference.

    Raises:
        DatabaseUnavailable: no answer from the database.
    """
    # No time limit: an account's history may be long, and nobody waits for the answer but the operator.
    buckets = await database.snapshot(load_buckets, patient=True)
    total = sum(buckets.values())
    made = Audit()
    for bucket in buckets:
        after: str | None = ""
        while after is not None and not stop.is_set():
            histories = await database.snapshot(
                partial(load_histories, bucket=bucket, after=after, limit=BATCH_ACCOUNTS),
                patient=True,
            )
            for history in histories:
                for difference in differences(history):
                    report(f"user {history.account.user_id!r}: {difference}")
                    made.failed += 1
            made.accounts += len(histories)
            progress(made.accounts, total)
            after = histories[-1].account.user_id if len(histories) == BATCH_ACCOUNTS else None
    return made


def differences(history: History) -> Iterator[str]:
    """Yield what does not add up in an account, in words."""
    account = history.account
    free_us: dict[str, int] = defaultdict(int)
    for chat in account.chats.values():
        segments = history.segments.get(chat.chat_id, [])
        yield from _segment_differences(chat, segments)
        yield from _chat_differences(chat, segments, account.at)
        free_us[chat.advisor_id] += chat.free_us
    for advisor_id in sorted({*free_us, *account.allowances}):
        allowance = account.allowances.get(advisor_id)
        used_us = allowance.used_us if allowance else 0
        yield from _differs(f"allowance with advisor {advisor_id!r}: used_us", used_us, free_us[advisor_id])
    yield from _ledger_differences(history)
    yield from _late_instants(history)
    booked = sum(entry.amount for entry in history.entries)
    accrued = sum(chat.accrued for chat in account.chats.values())
    yield from _differs("balance", account.balance, booked - accrued, money=True)
    yield from _differs("next_entry", history.next_entry, len(history.entries) + 1)
    if history.due_at != due_at(account):
        yield "due_at does not follow from the chats' states"
    yield from _overdrafts(history)


def _differs(what: str, stored: object, derived: object, *, money: bool = False) -> Iterator[str]:
    if stored != derived:
        if money and isinstance(stored, int) and isinstance(derived, int):
            stored, derived = format_credits(stored), format_credits(derived)
        yield f"{what} is {stored}, derived {derived}"


def _segment_differences(chat: Chat, segments: Sequence[Segment]) -> Iterator[str]:
    for segment in segments:
        name = _name(segment)
        length_us = segment.ended_at - segment.started_at
        yield from _differs(f"{name}: free and paid time", segment.free_us + segment.paid_us, length_us)
        price = segment.tariff.cost(segment.count_us + segment.paid_us) - segment.tariff.cost(segment.count_us)
        yield from _differs(f"{name}: cost", segment.cost, price, money=True)
        yield from _differs(f"{name}: advisor", segment.advisor_id, chat.advisor_id)
    if segments and segments[0].count_us != 0:
        yield f"{_name(segments[0])}: count_us is {segments[0].count_us}, though it is the first"
    for earlier, later in pairwise(segments):
        if later.started_at < earlier.ended_at:
            yield f"{_name(later)} overlaps the one before it"
        if not _goes_on(earlier, later.tariff, later.count_us):
            yield f"{_name(later)}: count_us is {later.count_us}, which does not go on from the one before it"


def _goes_on(last: Segment, tariff: Tariff, count_us: int) -> bool:
    """Whether a count follows from the segment before.

    It goes on under the same tariff. A start under another one begins it anew, even if that start's segment was empty
    and so was not recorded.
    """
    return count_us == 0 or (tariff == last.tariff and count_us == last.count_us + last.paid_us)


def _chat_differences(chat: Chat, segments: Sequence[Segment], at: int) -> Iterator[str]:
    name = f"chat {chat.chat_id!r}"
    elapsed_us = sum(segment.ended_at - segment.started_at for segment in segments)
    free_us = sum(segment.free_us for segment in segments)
    cost = sum(segment.cost for segment in segments) + chat.accrued
    last = segments[-1] if segments else None
    count_us = chat.count_us if chat.opened_at is None else chat.opened_count_us
    if count_us != 0 and (last is None or not _goes_on(last, chat.tariff, count_us)):
        yield f"{name}: its count of {count_us} does not go on from its last segment"
    if segments and chat.started_at > segments[0].started_at:
        yield f"{name}: started_at is {chat.started_at}, after its first segment's"
    if chat.opened_at is not None:
        elapsed_us += at - chat.opened_at
        free_us += at - chat.opened_at - (chat.count_us - chat.opened_count_us)
        if last is not None and chat.opened_at < last.ended_at:
            yield f"{name}: the open segment overlaps the one before it"
        if chat.lease_end <= at:
            yield f"{name}: runs, though its lease had ended when it was materialized"
    elif last is not None and chat.stopped_at is not None:
        if chat.stopped_at < last.ended_at:
            yield f"{name}: stopped_at is {chat.stopped_at}, before its last segment's end"
        if chat.stopped_at == last.ended_at and chat.stop_reason not in (last.reason, StopReason.EXHAUSTED):
            yield f"{name}: stop_reason is {chat.stop_reason}, its last segment's {last.reason}"
    if chat.state is ChatState.EXHAUSTED and chat.stop_reason is not StopReason.EXHAUSTED:
        yield f"{name}: is exhausted, though its stop_reason is {chat.stop_reason}"
    yield from _differs(f"{name}: elapsed_us", chat.elapsed_us, elapsed_us)
    yield from _differs(f"{name}: free_us", chat.free_us, free_us)
    yield from _differs(f"{name}: cost", chat.cost, cost, money=True)


def _ledger_differences(history: History) -> Iterator[str]:
    uncharged = {
        (segment.chat_id, segment.started_at): segment
        for segment in chain.from_iterable(history.segments.values())
        if segment.cost != 0
    }
    booked = 0
    for number, entry in enumerate(history.entries, start=1):
        name = f"ledger entry {entry.number}"
        yield from _differs(f"{name}: number", entry.number, number)
        booked += entry.amount
        yield from _differs(f"{name}: balance_after", entry.balance_after, booked, money=True)
        if entry.kind != CHARGE:
            yield from _credit_differences(name, entry)
            continue
        segment = uncharged.pop((entry.chat_id or "", entry.segment_started_at or 0), None)
        if segment is None:
            yield f"{name}: charges a segment that does not exist, or a second time"
        else:
            yield from _differs(f"{name}: amount", entry.amount, -segment.cost, money=True)
            yield from _differs(f"{name}: happened_at", entry.happened_at, segment.ended_at)
    for segment in uncharged.values():
        yield f"{_name(segment)} is not charged in the ledger"


def _late_instants(history: History) -> Iterator[str]:
    """Nothing is stored of an account that lies after the instant up to which it was materialized."""
    chats = history.account.chats.values()
    instants = chain(
        (segment.ended_at for segment in chain.from_iterable(history.segments.values())),
        (entry.recorded_at for entry in history.entries),
        (chat.started_at for chat in chats),
        (chat.stopped_at for chat in chats if chat.stopped_at is not None),
        (chat.opened_at for chat in chats if chat.opened_at is not None),
    )
    latest = max(instants, default=history.account.at)
    if latest > history.account.at:
        yield f"materialized_through is {history.account.at}, before {latest}, which is stored"


def _credit_differences(name: str, entry: LedgerEntry) -> Iterator[str]:
    kind = CreditKind(entry.kind)
    if (entry.amount < 0) != kind.takes:
        yield f"{name}: a {kind} of {format_credits(entry.amount)}"
    yield from _differs(f"{name}: happened_at", entry.happened_at, entry.recorded_at)
    if entry.request_hash != request_hash(kind, abs(entry.amount), entry.memo):
        yield f"{name}: is not what was requested: its hash is of another kind, amount or memo"


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A segment, closed or open, for a look at any instant in it: its free ticks come first."""

    chat_id: str
    started_at: int
    ended_at: int
    tariff: Tariff
    count_us: int
    free_us: int

    def cost_at(self, instant: int) -> int:
        """Micro-credits that it has cost at an instant."""
        paid_us = max(0, min(instant, self.ended_at) - self.started_at - self.free_us)
        return self.tariff.cost(self.count_us + paid_us) - self.tariff.cost(self.count_us)

    def next_tick_at(self, instant: int) -> int:
        """Micro-credits for the tick that begins at an instant."""
        paid_us = instant - self.started_at - self.free_us
        if paid_us < 0:
            return 0
        return self.tariff.cost(self.count_us + paid_us + 1) - self.tariff.cost(self.count_us + paid_us)


def _overdrafts(history: History) -> Iterator[str]:
    """Rebuild the balance at each instant at which something ended: never below zero, and exhausted only if it was."""
    stretches = [
        _Stretch(s.chat_id, s.started_at, s.ended_at, s.tariff, s.count_us, s.free_us)
        for s in chain.from_iterable(history.segments.values())
    ]
    for chat in history.account.chats.values():
        if chat.opened_at is not None:
            at = history.account.at
            free_us = at - chat.opened_at - (chat.count_us - chat.opened_count_us)
            stretches.append(_Stretch(chat.chat_id, chat.opened_at, at, chat.tariff, chat.opened_count_us, free_us))
    stretches.sort(key=lambda stretch: stretch.started_at, reverse=True)
    credits_ = [entry for entry in reversed(history.entries) if entry.kind != CHARGE]
    credited = closed = bought_now = previous = 0
    running: list[_Stretch] = []
    for segment in sorted(chain.from_iterable(history.segments.values()), key=lambda s: s.ended_at):
        end = segment.ended_at
        if end != previous:
            bought_now, previous = 0, end  # a purchase at the very instant of an exhaustion came after it
        while credits_ and credits_[-1].happened_at <= end:
            entry = credits_.pop()
            credited += entry.amount
            bought_now += max(0, entry.amount) if entry.happened_at == end else 0
        while stretches and stretches[-1].started_at < end:
            running.append(stretches.pop())
        closed += sum(stretch.cost_at(end) for stretch in running if stretch.ended_at <= end)
        running = [stretch for stretch in running if stretch.ended_at > end]
        balance = credited - closed - sum(stretch.cost_at(end) for stretch in running)
        if balance < 0:
            yield f"{_name(segment)}: the balance was below zero at its end"
        if segment.reason is StopReason.EXHAUSTED:
            rank = segment.started_at, segment.chat_id
            seniors = (stretch for stretch in running if (stretch.started_at, stretch.chat_id) < rank)
            needed = sum(stretch.next_tick_at(end) for stretch in seniors)
            needed += segment.tariff.cost(segment.count_us + segment.paid_us + 1)
            needed -= segment.tariff.cost(segment.count_us + segment.paid_us)
            if needed <= balance - bought_now:
                yield f"{_name(segment)}: was stopped as exhausted, though the balance could pay"


def _name(segment: Segment) -> str:
    return f"chat {segment.chat_id!r}: segment of {segment.started_at}"
