"""The laws of one chat: what its record says follows from its segments, or is at least possible with them.

A clock that was started and stopped at one instant left no segment, and a refused start left none either: both are
called unseen here. A chat's `revision` counts every command, so it bounds how much can have gone unseen.
"""

from __future__ import annotations

from collections.abc import Mapping

from reconciler.differences import Findings, Total, instant
from talktime.meter.state import RESUMABLE, Chat, ChatState, Segment, StopReason, Tariff
from talktime.meter.units import format_credits
from talktime.store.openings import OpeningChat

REASONS: Mapping[ChatState, tuple[StopReason, ...]] = {
    ChatState.LAPSED: (StopReason.LAPSED,),
    ChatState.PAUSED: (StopReason.LAPSED, StopReason.PAUSED, StopReason.SWITCHED),
    ChatState.EXHAUSTED: (StopReason.EXHAUSTED,),
    ChatState.ABANDONED: (StopReason.EXHAUSTED, StopReason.LAPSED, StopReason.PAUSED, StopReason.SWITCHED),
    ChatState.ENDED: tuple(sorted(StopReason)),
}
"""Why the clock of a chat in this state can have stopped last. A lapsed chat may be paused, by a switch too."""

COMMANDED = frozenset({StopReason.PAUSED, StopReason.SWITCHED, StopReason.ENDED})
"""The reasons that a command gave, which the revision counts."""


class ChatLaws:
    """Checks a chat while its segments are given, oldest first."""

    def __init__(
        self, chat: Chat, at: int, findings: Findings, *, opening: OpeningChat | None = None, imported_at: int = 0
    ) -> None:
        self.chat = chat
        self.at = at
        self.name = f"chat {chat.chat_id!r}"
        self.last: Segment | None = None
        self.latest = chat.started_at  # the latest instant that is stored of the chat, signs of life aside
        self.paid = False
        self.commands = 0
        self.unseen = 0
        self._findings = findings
        self._opening = opening
        self._imported_at = imported_at
        before = opening or OpeningChat(None, 0, 0, 0)
        self._elapsed_us = Total(chat.elapsed_us, chat.started_at, before.elapsed_us)
        self._free_us = Total(chat.free_us, chat.started_at, before.chat_free_us)
        self._cost = Total(chat.cost, chat.started_at, before.cost)

    @property
    def free_us(self) -> int:
        """The free time that its segments took."""
        return self._free_us.derived - (self._opening.chat_free_us if self._opening else 0)

    @property
    def may_have_started_unseen(self) -> bool:
        """Whether it was started without a segment to show for it, or its revision leaves room for that."""
        return self.unseen > 0 or self.chat.revision > self.commands

    def segment(self, segment: Segment) -> None:
        """Check a closed segment."""
        name = f"{self.name}: segment of {instant(segment.started_at)}"
        since, note = segment.ended_at, self._findings.add
        length_us = segment.ended_at - segment.started_at
        price = _price(segment.tariff, segment.count_us, segment.paid_us)
        if segment.free_us + segment.paid_us != length_us:
            note(f"{name}: free and paid time", segment.free_us + segment.paid_us, length_us, since)
        if segment.cost != price:
            note(f"{name}: cost", format_credits(segment.cost), format_credits(price), since)
        if segment.advisor_id != self.chat.advisor_id:
            note(f"{name}: advisor", segment.advisor_id, self.chat.advisor_id, since)
        self._begins(name, segment.started_at, segment.tariff, segment.count_us, since)
        self.commands += segment.reason in COMMANDED
        self._add(since, length_us, segment.free_us, segment.paid_us, segment.cost)
        self.last = segment

    def finish(self) -> None:
        """Check the chat's own record, all its segments having been given."""
        chat = self.chat
        self._state()
        if chat.opened_at is not None:
            self._runs(chat.opened_at)
        elif chat.stopped_at is not None and chat.stop_reason is not None:
            self._stands_still(chat.stopped_at, chat.stop_reason)
        if chat.revision < self.commands + self.unseen:
            self._add_note("revision", chat.revision, f"at least {self.commands + self.unseen}", chat.started_at)
        for name, total in (("elapsed_us", self._elapsed_us), ("free_us", self._free_us)):
            if total.stored != total.derived:
                self._add_note(name, total.stored, total.derived, total.agreed_at)
        if self._cost.stored != self._cost.derived:
            stored, derived = format_credits(self._cost.stored), format_credits(self._cost.derived)
            self._add_note("cost", stored, derived, self._cost.agreed_at)

    def _add_note(self, what: str, stored: int | str | None, derived: int | str | None, since: int) -> None:
        self._findings.add(f"{self.name}: {what}", stored, derived, since)

    def _add(self, at: int, length_us: int, free_us: int, paid_us: int, cost: int) -> None:
        self._elapsed_us.add(length_us, at)
        self._free_us.add(free_us, at)
        self._cost.add(cost, at)
        self.paid = self.paid or paid_us > 0
        self.latest = max(self.latest, at)

    def _begins(self, name: str, started_at: int, tariff: Tariff, count_us: int, since: int) -> None:
        """Check that a segment, closed or open, begins where the one before it allows."""
        note = self._findings.add
        self.commands += 1  # a start, or the heartbeat that took it up again
        if self.last is None:
            if started_at < self.chat.started_at:
                self._add_note("started_at", instant(self.chat.started_at), f"at most {instant(started_at)}", since)
            # What was taken over was first started where it came from.
            self.unseen += started_at > self.chat.started_at and self._opening is None
            if count_us != 0:
                note(f"{name}: count_us", count_us, 0, since)
            return
        if started_at < self.last.ended_at:
            note(f"{name}: begin", instant(started_at), f"at least {instant(self.last.ended_at)}", since)
        if not self._goes_on(tariff, count_us):
            note(f"{name}: count_us", count_us, self._count_after(tariff), since)
        # A count that begins anew under the same tariff: in between, another tariff was in force for a start.
        self.unseen += count_us == 0 and self._count_after(tariff) != 0

    def _count_after(self, tariff: Tariff) -> int:
        """Return the count with which a segment at this tariff goes on: under another one it begins anew."""
        last = self.last
        return last.count_us + last.paid_us if last is not None and last.tariff == tariff else 0

    def _goes_on(self, tariff: Tariff, count_us: int) -> bool:
        return count_us in (0, self._count_after(tariff))

    def _state(self) -> None:
        chat = self.chat
        since = chat.stopped_at if chat.opened_at is None else chat.opened_at
        since = chat.started_at if since is None else since
        if chat.stop_reason is not None and chat.stop_reason not in REASONS[chat.state]:
            allowed = f"{' or '.join(REASONS[chat.state])}, as it is {chat.state}"
            self._add_note("stop_reason", chat.stop_reason, allowed, since)
        if chat.state is ChatState.RUNNING and chat.lease_end <= self.at:
            self._add_note("state", chat.state, "lapsed, as its lease had ended", chat.lease_end)
        if chat.state in RESUMABLE and chat.abandoned_at <= self.at:
            self._add_note("state", chat.state, "abandoned", chat.abandoned_at)
        if chat.state is ChatState.ABANDONED and chat.abandoned_at > self.at:
            self._add_note("state", chat.state, f"not before {instant(chat.abandoned_at)}", since)

    def _runs(self, opened_at: int) -> None:
        chat, paid_us = self.chat, self.chat.count_us - self.chat.opened_count_us
        self._begins(f"{self.name}: open segment", opened_at, chat.tariff, chat.opened_count_us, opened_at)
        self._add(self.at, self.at - opened_at, self.at - opened_at - paid_us, paid_us, chat.accrued)
        self.latest = max(self.latest, opened_at)
        self._alive_at(opened_at)

    def _stands_still(self, stopped_at: int, reason: StopReason) -> None:
        chat, last = self.chat, self.last
        self.latest = max(self.latest, stopped_at)
        if chat.opened_count_us != 0:
            self._add_note("opened_count_us", chat.opened_count_us, 0, stopped_at)
        if last is not None and (stopped_at, reason) == (last.ended_at, last.reason):
            self._alive_at(last.started_at)
            unseen = False
        elif last is None and self._opening is not None and stopped_at <= self._imported_at:
            return  # it stopped in the system that it was taken over from, by what rules nobody knows
        else:
            unseen = True
            self._stopped_unseen(stopped_at, reason)
        if not self._goes_on(chat.tariff, chat.count_us):
            self._add_note(
                "count_us",
                chat.count_us,
                self._count_after(chat.tariff),
                chat.started_at if last is None else last.ended_at,
            )
        if last is not None and (chat.tariff, chat.count_us) != (last.tariff, last.count_us + last.paid_us):
            unseen = True  # a start at another tariff
        if unseen:
            self.unseen += 1
            self.commands += reason in COMMANDED
        self._signs_of_life(stopped_at, reason)

    def _stopped_unseen(self, stopped_at: int, reason: StopReason) -> None:
        """Check a stop that is not the end of the last segment: such a start was a sign of life at that instant."""
        last, alive = self.last, self.chat.last_heartbeat_at >= stopped_at
        if last is None:
            # The first start was another one.
            self.unseen += stopped_at > self.chat.started_at and self._opening is None
            if stopped_at < self.chat.started_at:
                self._add_note(
                    "stopped_at", instant(stopped_at), f"at least {instant(self.chat.started_at)}", stopped_at
                )
            if not alive:
                self._add_note(
                    "stopped_at",
                    instant(stopped_at),
                    f"at most {instant(self.chat.last_heartbeat_at)}",
                    self.chat.started_at,
                )
            if reason is StopReason.LAPSED:
                self._add_note("stop_reason", reason, "another: no segment lapsed", stopped_at)
        elif stopped_at < last.ended_at or reason is StopReason.LAPSED or not alive:
            if stopped_at != last.ended_at:
                self._add_note("stopped_at", instant(stopped_at), instant(last.ended_at), last.ended_at)
            if reason is not last.reason:
                self._add_note("stop_reason", reason, last.reason, last.ended_at)

    def _signs_of_life(self, stopped_at: int, reason: StopReason) -> None:
        """Check the last sign of life against the way in which the clock stopped."""
        chat = self.chat
        heard_since = chat.last_heartbeat_at >= stopped_at
        if chat.state is ChatState.ENDED and reason is not StopReason.ENDED:
            self.commands += 1  # the stop of a chat that stood still
        if reason is StopReason.LAPSED:
            self.commands += heard_since  # a pause, a switch, or a heartbeat while another chat was running
            if chat.state is ChatState.PAUSED:
                self._alive_at(stopped_at)
            elif not heard_since and chat.lease_end != stopped_at:
                expected = instant(stopped_at - chat.lease_us)
                self._add_note("last_heartbeat_at", instant(chat.last_heartbeat_at), expected, stopped_at)
        elif reason in (StopReason.PAUSED, StopReason.SWITCHED):
            self._alive_at(stopped_at)
        elif chat.lease_end <= stopped_at:
            expected = f"after {instant(stopped_at - chat.lease_us)}"
            self._add_note("last_heartbeat_at", instant(chat.last_heartbeat_at), expected, stopped_at)

    def _alive_at(self, at: int) -> None:
        """Check a sign of life: starting or resuming is one, and so is a pause or being switched away from."""
        if self.chat.last_heartbeat_at < at:
            self._add_note("last_heartbeat_at", instant(self.chat.last_heartbeat_at), f"at least {instant(at)}", at)


def _price(tariff: Tariff, count_us: int, paid_us: int) -> int:
    return tariff.cost(count_us + paid_us) - tariff.cost(count_us)
