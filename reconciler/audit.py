"""The audit: derive what is stored of each account again, and name each difference.

What is derived, from what; what is only held to a rule; and what the rest does not tell:

==============  ======================================================================================================
account         `balance`: credits less the cost of all segments, gone through from moment to moment; never below zero
                on the way. `next_entry`: from the ledger. `due_at`: from the chats. `bucket`: from the user id.
                `materialized_through`: by what is materialized to it while a chat runs; else no earlier than all that
                is stored, and between the chats' abandonments.
allowance       `used_us`: the free time of the pair's segments. `granted_us`: the same if the pair has a paid tick, for
                free time is used first; else no less than that. A row for each pair that has a chat.
chat            `elapsed_us`, `free_us`, `cost`: from its segments and the open one. `count_us`: likewise, or begun
                anew. `opened_count_us`: the count goes on, or begins anew with a start at another tariff.
                `stopped_at`, `stop_reason`: the end of its last segment, or of a start that left none, which was a
                sign of life and is in the `revision`. `state`: fits these, lease and abandonment, and what the balance
                can pay. `last_heartbeat_at`, `lease_us`, `abandon_after_us`: fit state and stop. `started_at`: no later
                than its first segment. `revision`: at least what its history takes. `advisor_id`: the segments'.
                `opened_at`, its tariff: no overlap, and by the totals. `exhausts_at`: while it runs, no later than the
                first of the account's clocks can stop for want of credits. Not known: `start_key`, earlier leases.
segment         `free_us`, `paid_us`: the seniors take free ticks first. `cost`: priced again. `count_us`: goes on.
                `started_at`, `ended_at`: the time between is the free and the paid time, none overlap, and the ledger
                knows both. `reason`: `exhausted` only when the balance could not pay; `switched` only when another
                chat began, or may have been started and left no segment; all of them by the revision, the last one by
                the chat. The tariff is taken as it is.
ledger_entry    `number`: without gaps. `amount`, `happened_at` of a charge: its segment's, one for each that cost
                something; `kind`, `amount` and `memo` of a credit: by its `request_hash`. `balance_after`: the running
                sum. `recorded_at`: when it happened for a credit; for a charge not before, and in order with all that
                happened. Not known: `idempotency_key`.
==============  ======================================================================================================

What was taken over from another system (`opening_account`, `opening_allowance`, `opening_chat`) is taken as it is: the
totals begin with it, the ledger's first line says the same, and how a chat stopped before is not known.

Whatever a legal history can leave behind is no difference: clocks that stepped back, settings that changed, refused
starts, starts without a segment.

Each batch of accounts is read in one snapshot, and all figures of an account are as of one instant, so a running
service never causes a false alarm; and since it only reads, it is in nobody's way. All rows are streamed: what is kept
of an account are its clocks that run at one time and a few figures for each advisor.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reconciler.chats import ChatLaws
from reconciler.differences import Findings, instant
from reconciler.ledger import LedgerLaws
from reconciler.replay import Pair, Replay, Stretch, closed, still_open
from talktime.errors import DatabaseUnavailable
from talktime.meter.state import RESUMABLE, Account
from talktime.meter.units import format_credits
from talktime.store.exhaustion import first_exhaustion
from talktime.store.history import AccountRow, Histories, load_accounts, load_buckets, open_histories
from talktime.store.tables import bucket_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.meter.state import Allowance, Chat
    from talktime.store.database import Database
    from talktime.store.ledger import LedgerEntry

log = logging.getLogger("reconciler")

BATCH_ACCOUNTS = 200


@dataclass(slots=True)
class Audit:
    """How many accounts were checked, how many of them differ, in how many figures; and whether those were all."""

    accounts: int = 0
    differing: int = 0
    failed: int = 0
    finished: bool = False

    def __str__(self) -> str:
        """One log line."""
        return f"audit accounts={self.accounts} differing={self.differing} differences={self.failed}"

    def as_json(self) -> dict[str, Any]:
        """Return the same as an object for programs."""
        return {
            "accounts": self.accounts,
            "differing": self.differing,
            "differences": self.failed,
            "finished": self.finished,
        }


class _Stopped(Exception):
    """The audit is to end before its end."""


async def audit(
    database: Database,
    stop: asyncio.Event,
    *,
    report: Callable[[Findings], None],
    progress: Callable[[int, int], None],
    batch_accounts: int = BATCH_ACCOUNTS,
) -> Audit:
    """Check every account until `stop` is set, and call `report` with each that differs.

    `progress` is called with the accounts done and the accounts there are. Once `stop` is set, the batch in hand is
    left as it is.

    Raises:
        DatabaseUnavailable: no answer from the database.
    """

    def go_on() -> None:
        if stop.is_set():
            raise _Stopped

    # No time limit: an account's history may be long, and nobody waits for the answer but the operator.
    buckets = await database.snapshot(load_buckets, patient=True)
    total = sum(buckets.values())
    made = Audit()
    progress(0, total)
    try:
        for bucket in buckets:
            after: str | None = ""
            while after is not None:
                found, after = await _batch(database, bucket, after, batch_accounts, go_on)
                for findings in found:
                    made.accounts += 1
                    made.failed += findings.count
                    if findings.count:
                        made.differing += 1
                        report(findings)
                progress(made.accounts, max(total, made.accounts))
    except _Stopped:
        return made
    made.finished = True
    return made


async def _batch(
    database: Database, bucket: int, after: str, limit: int, go_on: Callable[[], None]
) -> tuple[list[Findings], str | None]:
    """Check the next accounts of a bucket; returns the last user id too, or None if the bucket has no more."""
    held: list[str] = []

    async def work(connection: AsyncConnection) -> list[Findings]:
        go_on()
        accounts = await load_accounts(connection, bucket=bucket, after=after, limit=limit)
        held[:] = [account.user_id for account in accounts]
        async with open_histories(connection, accounts, bucket=bucket, after=after, before_page=go_on) as histories:
            return [await _check(account, histories) for account in accounts]

    try:
        found = await database.snapshot(work, patient=True)
    except (DatabaseUnavailable, _Stopped):
        raise
    except Exception as error:
        # What cannot even be read, one that was tampered with for instance, must not hide what is wrong with others.
        if not held:
            raise
        if len(held) == 1:
            log.exception("account %r cannot be checked", held[0])
            found = [_unreadable(held[0], error)]
        else:
            found = []
            for before in [after, *held[:-1]]:
                found += (await _batch(database, bucket, before, 1, go_on))[0]
    return found, held[-1] if len(held) == limit else None


def _unreadable(user_id: str, error: Exception) -> Findings:
    findings = Findings(user_id)
    findings.add("account", f"not to be read ({type(error).__name__})", "what can be", 0)
    return findings


async def _check(account: AccountRow, histories: Histories) -> Findings:
    findings = Findings(account.user_id)
    opening, imported_at = await histories.openings.next(account.user_id) or (0, 0)
    ledger = LedgerLaws(account, findings, opening)
    chats = await _chats(account, histories, ledger, findings, imported_at)
    allowances = await _allowances(account, histories, chats, findings)
    while (entry := await histories.entries.next(account.user_id)) is not None:
        ledger.entry(entry)
    began_at = _earliest(chats.began_at, ledger.began_at)
    agreed_at = ledger.finish(account.at if began_at is None else began_at)
    replay = Replay(chats.pairs, allowances, findings)
    balance = await _go_through(account, histories, chats, replay)
    if account.balance != balance:
        findings.add("balance", format_credits(account.balance), format_credits(balance), agreed_at)
    switched = replay.switched_by_nobody
    if switched is not None and not chats.unseen:
        name = f"chat {switched.chat_id!r}: segment of {instant(switched.started_at)}: reason"
        findings.add(name, "switched", "another: no other chat was started then", switched.ended_at)
    _account(account, chats, max(chats.latest, ledger.latest), findings)
    _exhaustion(account, chats, allowances, findings)
    return findings


@dataclass(slots=True)
class _Chats:
    """What an account's chats add up to; those that run, with when their credits are said to run out."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    open: list[Stretch] = field(default_factory=list)
    running: list[tuple[Chat, int | None]] = field(default_factory=list)
    abandoned_at: int | None = None
    began_at: int | None = None
    latest: int = 0
    unseen: bool = False

    def add(self, laws: ChatLaws, exhausts_at: int | None) -> None:
        """Add a chat that was checked."""
        chat = laws.chat
        pair = self.pairs.setdefault(chat.advisor_id, Pair(chat.started_at))
        pair.began_at = min(pair.began_at, chat.started_at)
        pair.free_us += laws.free_us
        pair.paid = pair.paid or laws.paid
        if chat.opened_at is not None:
            self.open.append(still_open(chat, chat.opened_at, laws.at))
            self.running.append((chat, exhausts_at))
        if chat.state in RESUMABLE:
            self.abandoned_at = _earliest(self.abandoned_at, chat.abandoned_at)
        self.began_at = _earliest(self.began_at, chat.started_at)
        self.latest = max(self.latest, laws.latest)
        self.unseen = self.unseen or laws.may_have_started_unseen

    @property
    def due_at(self) -> int | None:
        """From when a pass has something to write: always while a clock runs, else at the first abandonment."""
        return min((stretch.started_at for stretch in self.open), default=self.abandoned_at)


def _earliest(*instants: int | None) -> int | None:
    return min((at for at in instants if at is not None), default=None)


async def _chats(
    account: AccountRow, histories: Histories, ledger: LedgerLaws, findings: Findings, imported_at: int
) -> _Chats:
    """Check the chats with their segments, and side by side with these, in the same order, the charges for them."""
    chats = _Chats()
    charge = await histories.charges.next(account.user_id)
    while (row := await histories.chats.next(account.user_id)) is not None:
        chat, exhausts_at = row
        opening = await histories.opening_chats.next((account.user_id, chat.chat_id))
        laws = ChatLaws(chat, account.at, findings, opening=opening, imported_at=imported_at)
        while (segment := await histories.segments.next((account.user_id, chat.chat_id))) is not None:
            place = segment.chat_id, segment.started_at
            while charge is not None and _place_of(charge) < place:
                ledger.charge(charge, None)
                charge = await histories.charges.next(account.user_id)
            if charge is not None and _place_of(charge) == place:
                ledger.charge(charge, segment)
                charge = await histories.charges.next(account.user_id)
            else:
                ledger.charge(None, segment)
            laws.segment(segment)
        laws.finish()
        chats.add(laws, exhausts_at)
    while charge is not None:
        ledger.charge(charge, None)
        charge = await histories.charges.next(account.user_id)
    chats.open.sort(key=lambda stretch: (stretch.started_at, stretch.chat_id))
    return chats


def _place_of(charge: LedgerEntry) -> tuple[str, int]:
    return charge.chat_id or "", charge.segment_started_at or 0


async def _allowances(
    account: AccountRow, histories: Histories, chats: _Chats, findings: Findings
) -> dict[str, Allowance]:
    while (of_pair := await histories.opening_pairs.next(account.user_id)) is not None:
        advisor_id, used_us = of_pair
        if advisor_id in chats.pairs:
            chats.pairs[advisor_id].opening_us = used_us
            chats.pairs[advisor_id].free_us += used_us
    allowances: dict[str, Allowance] = {}
    while (row := await histories.allowances.next(account.user_id)) is not None:
        advisor_id, allowance = row
        allowances[advisor_id] = allowance
        name, pair = f"allowance with advisor {advisor_id!r}", chats.pairs.get(advisor_id)
        if pair is None:
            findings.add(name, "there", "none: no chat is with this advisor", account.at)
        elif pair.paid and allowance.granted_us != pair.free_us:
            findings.add(f"{name}: granted_us", allowance.granted_us, pair.free_us, pair.began_at)
    for advisor_id in sorted(chats.pairs.keys() - allowances.keys()):
        pair = chats.pairs[advisor_id]
        derived = pair.free_us if pair.paid else f"at least {pair.free_us}"
        findings.add(f"allowance with advisor {advisor_id!r}: granted_us", None, derived, pair.began_at)
    return allowances


async def _go_through(account: AccountRow, histories: Histories, chats: _Chats, replay: Replay) -> int:
    """Give the replay each instant at which a clock began or credits moved, in order; returns the balance."""
    user_id, still_to_open = account.user_id, deque(chats.open)
    segment = await histories.timeline.next(user_id)
    credit = await histories.credits.next(user_id)
    while heads := [
        *([segment.started_at] if segment else ()),
        *([credit[0]] if credit else ()),
        *([still_to_open[0].started_at] if still_to_open else ()),
    ]:
        at = min(heads)
        begun, amounts = [], []
        while segment is not None and segment.started_at <= at:
            begun.append(closed(segment))
            segment = await histories.timeline.next(user_id)
        while still_to_open and still_to_open[0].started_at <= at:
            begun.append(still_to_open.popleft())
        while credit is not None and credit[0] <= at:
            amounts.append(credit[1])
            credit = await histories.credits.next(user_id)
        replay.moment(at, sorted(begun, key=lambda stretch: stretch.chat_id), amounts)
    return replay.finish(account.at)


def _account(account: AccountRow, chats: _Chats, latest: int, findings: Findings) -> None:
    if account.bucket != bucket_of(account.user_id):
        findings.add("bucket", account.bucket, bucket_of(account.user_id), account.at)
    if account.at < latest:
        findings.add("materialized_through", instant(account.at), f"at least {instant(latest)}", account.at)
    if account.due_at != chats.due_at:
        stored, derived = (None if at is None else instant(at) for at in (account.due_at, chats.due_at))
        findings.add("due_at", stored, derived, account.at)


def _exhaustion(account: AccountRow, chats: _Chats, allowances: dict[str, Allowance], findings: Findings) -> None:
    """Check that no running chat is said to have credits for longer than it certainly has; sooner does no harm."""
    if any(chat.advisor_id not in allowances for chat, _ in chats.running):
        return
    running = {chat.chat_id: chat for chat, _ in chats.running}
    derived = first_exhaustion(Account(account.user_id, account.at, account.balance, allowances, running))
    for chat, stored in chats.running:
        if stored is not None and stored > derived:
            findings.add(
                f"chat {chat.chat_id!r}: exhausts_at",
                instant(stored),
                f"at most {instant(derived)}",
                chat.opened_at or 0,
            )
