"""The laws of an account's ledger: each line follows from a credit or a segment, and all of them add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reconciler.differences import Findings, Shown, instant
from talktime.meter.state import CreditKind, Segment
from talktime.meter.units import format_credits
from talktime.store.ledger import CHARGE, OPENING, LedgerEntry, request_hash

if TYPE_CHECKING:
    from talktime.store.history import AccountRow


class LedgerLaws:
    """Checks a ledger while its lines are given in the order of their numbers."""

    def __init__(self, account: AccountRow, findings: Findings, opening: int = 0) -> None:
        self.latest = 0
        self.began_at: int | None = None
        self._agreed_at: int | None = None
        self._account = account
        self._findings = findings
        self._opening = max(opening, 0)  # what is to be booked of it; below zero nothing is
        self._booked = 0
        self._agrees = True
        self._last: LedgerEntry | None = None

    def entry(self, entry: LedgerEntry) -> None:
        """Check a line, but not against the segment that it charges."""
        if entry.kind == OPENING:
            self._begin(entry)
        elif entry.kind != CHARGE:
            self._credit(entry)
        elif entry.memo:
            self._note(entry, "memo", entry.memo, "")
        balance_after = entry.amount + (0 if self._last is None else self._last.balance_after)
        if entry.balance_after != balance_after:
            self._note(entry, "balance_after", format_credits(entry.balance_after), format_credits(balance_after))
        self._order(entry)
        self._booked += entry.amount
        self._agrees = self._agrees and entry.balance_after == self._booked
        if self._agrees:
            self._agreed_at = entry.recorded_at
        self.latest = max(self.latest, entry.recorded_at, entry.happened_at)
        self.began_at = entry.happened_at if self.began_at is None else self.began_at
        self._last = entry

    def finish(self, began_at: int) -> int:
        """Check what the account says of its ledger; `began_at` is the account's first instant.

        Returns when the last line was written up to which the running sum is right, or `began_at`.
        """
        if self._opening:
            self._findings.add("opening in the ledger", None, format_credits(self._opening), began_at)
        agreed_at = began_at if self._agreed_at is None else self._agreed_at
        next_entry = 1 if self._last is None else self._last.number + 1
        if self._account.next_entry != next_entry:
            self._findings.add("next_entry", self._account.next_entry, next_entry, agreed_at)
        return agreed_at

    def charge(self, entry: LedgerEntry | None, segment: Segment | None) -> None:
        """Check a charge against its segment; None stands for the one that is missing."""
        if entry is None:
            if segment is not None and segment.cost != 0:
                name = f"chat {segment.chat_id!r}: segment of {instant(segment.started_at)}: charge in the ledger"
                self._findings.add(name, None, format_credits(-segment.cost), segment.ended_at)
            return
        if segment is None:
            self._note(entry, "amount", format_credits(entry.amount), "none: there is no such segment")
            return
        if entry.amount != -segment.cost:
            self._note(entry, "amount", format_credits(entry.amount), format_credits(-segment.cost))
        if entry.happened_at != segment.ended_at:
            self._note(entry, "happened_at", instant(entry.happened_at), instant(segment.ended_at))

    def _begin(self, entry: LedgerEntry) -> None:
        if entry.amount != self._opening:
            self._note(entry, "amount", format_credits(entry.amount), format_credits(self._opening))
        self._opening = 0
        if entry.number != 1:
            self._note(entry, "number", entry.number, 1)

    def _credit(self, entry: LedgerEntry) -> None:
        kind = CreditKind(entry.kind)
        if entry.request_hash != request_hash(kind, abs(entry.amount), entry.memo):
            self._note(entry, "request_hash", "another request's", "that of this kind, amount and memo")
        if entry.happened_at != entry.recorded_at:
            self._note(entry, "happened_at", instant(entry.happened_at), instant(entry.recorded_at))
        # The schema demands both of a charge; nothing there forbids one of them for a credit.
        if entry.chat_id is not None:
            self._note(entry, "chat_id", entry.chat_id, None)
        if entry.segment_started_at is not None:
            self._note(entry, "segment_started_at", instant(entry.segment_started_at), None)

    def _order(self, entry: LedgerEntry) -> None:
        """Check number and instants: lines stand in the order in which things happened, and so were written."""
        last = self._last
        number = 1 if last is None else last.number + 1
        if entry.number != number:
            self._note(entry, "number", entry.number, number)
        if entry.recorded_at < entry.happened_at:
            self._note(entry, "recorded_at", instant(entry.recorded_at), f"at least {instant(entry.happened_at)}")
        if last is None:
            return
        if entry.happened_at < last.happened_at:
            self._note(entry, "happened_at", instant(entry.happened_at), f"at least {instant(last.happened_at)}")
        if entry.recorded_at < last.recorded_at:
            self._note(entry, "recorded_at", instant(entry.recorded_at), f"at least {instant(last.recorded_at)}")
        elif entry.happened_at < last.recorded_at < entry.recorded_at:
            # It had happened when the last line was written, so it was written with it.
            self._note(entry, "recorded_at", instant(entry.recorded_at), instant(last.recorded_at))

    def _note(self, entry: LedgerEntry, what: str, stored: Shown, derived: Shown) -> None:
        self._findings.add(f"ledger entry {entry.number}: {what}", stored, derived, entry.recorded_at)
