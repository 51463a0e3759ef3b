"""What must be true of one chat, given what was sent and what was answered.

A chat has one client that sends its commands one after the other; others only read. So between two answers the chat's
revision may only have grown by what was sent in between, and a command without an answer counts once at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

Json: TypeAlias = Any

ACTIVE = ("running", "lapsed", "paused", "exhausted")
# Reasons for which a command stops a clock: what such an answer says of a segment's end stands for ever. (That a chat
# had lapsed when it was read may yet be corrected by a heartbeat that was about to be committed.)
COMMANDED = ("paused", "ended", "switched")


def micro(amount: str) -> int:
    """Return micro-credits."""
    return int(Decimal(amount) * 1_000_000)


@dataclass(frozen=True)
class Floor:
    """What had been answered when a request was sent: no later answer may lie below."""

    place: tuple[int, str] = (0, "")
    elapsed_us: int = 0
    credits_used: int = 0
    committed_us: int = 0
    committed_credits: int = 0


@dataclass
class Chat:
    """A chat as its clients know it. `wrong` collects what cannot be."""

    user_id: str
    chat_id: str
    advisor_id: str
    wrong: list[str]
    exists: bool = False
    """For sure; a start without an answer may have made it."""
    revision_min: int = 0
    revision_max: int = 0
    ended: bool | None = False
    """None: there was no answer to the command that would tell."""
    idle: bool | None = True
    """Its clock certainly stands, whatever time passes."""
    key: str | None = None
    """The Idempotency-Key of the latest start, if that was answered."""
    floor: Floor = Floor()
    opened: set[str] = field(default_factory=set)
    """Instants at which a segment began, as answered."""
    closed: set[tuple[str, str]] = field(default_factory=set)
    """Instants at which a segment ended, as answered, and why."""
    leases: list[tuple[str, str]] = field(default_factory=list)
    """Instants at which a start or a heartbeat found the clock running, and until when it was then to run."""

    @property
    def path(self) -> str:
        return f"/v1/users/{self.user_id}/chats/{self.chat_id}"

    def object_to(self, what: str, reading: Json) -> None:
        self.wrong.append(f"{self.user_id}/{self.chat_id}: {what}: {reading}; known: {self}"[:2_000])

    # --- readings, in the order in which they were answered ---

    def read(self, reading: Json, floor: Floor, *, committed: bool) -> None:
        """Take a reading that was asked for when `floor` was known; a command's is `committed`."""
        place = reading["revision"], reading["as_of"]
        elapsed_us, used = reading["elapsed_us"], micro(reading["credits_used"])
        if micro(reading["balance"]) < 0:
            self.object_to("the balance is below zero", reading)
        if place < floor.place:
            self.object_to(f"it lies before {floor.place}, which had been answered", reading)
        # Who reads while a command is about to be committed sees the clock run on; the command's instant was earlier.
        # So across a command, and where others took the balance, only what was committed is a floor.
        corrected = place[0] != floor.place[0] or reading["stop_reason"] == "exhausted"
        least_us = floor.committed_us if corrected else floor.elapsed_us
        least = floor.committed_credits if corrected else floor.credits_used
        if elapsed_us < least_us or used < least:
            self.object_to(f"time or credits went back, below {least_us} us or {least}", reading)
        if reading["stop_reason"] in COMMANDED and elapsed_us:
            self.closed.add((reading["stopped_at"], reading["stop_reason"]))
        known = self.floor
        newer = place >= known.place
        self.floor = Floor(
            max(place, known.place),
            elapsed_us if newer else known.elapsed_us,
            used if newer else known.credits_used,
            max(known.committed_us, elapsed_us if committed else 0),
            max(known.committed_credits, used if committed else 0),
        )

    # --- commands, one after the other ---

    def is_repeated(self, what: str, key: str | None) -> bool:
        """Tell whether this is the chat's latest start once more, which changes nothing."""
        return what == "start" and key is not None and key == self.key

    def unanswered(self, what: str, siblings: list[Chat], *, key: str | None, again: bool) -> None:
        """Take it that a command may or may not have happened; sent `again` with its key, it can happen only once."""
        if again or self.is_repeated(what, key):
            return
        self.revision_max += 1
        if what == "start":
            self.key = None
            self.ended = None if self.ended else self.ended
            self._may_switch(siblings)
        if what == "stop" and self.ended is False:
            self.ended = None
        if what in ("start", "heartbeat"):
            self.idle = None

    def answered(
        self,
        what: str,
        reading: Json,
        floor: Floor,
        siblings: list[Chat],
        *,
        key: str | None = None,
        again: bool = False,
    ) -> None:
        """Take it that a command has happened, exactly once, also if it was sent `again` with its key."""
        # A heartbeat's reading is a look beside the lock, which others may yet correct.
        self.read(reading, floor, committed=what != "heartbeat")
        state, revision = reading["state"], reading["revision"]
        repeated = self.is_repeated(what, key)
        unchanged = repeated or (what == "pause" and state in ("ended", "abandoned")) or (what == "stop" and self.ended)
        least = self.revision_min + (0 if unchanged or what == "heartbeat" else 1)
        if what == "stop" and self.ended is None:
            least = self.revision_min
        most = self.revision_max + (0 if unchanged or again else 1)
        if not least <= revision <= most:
            self.object_to(f"after this {what} its revision must be {least} to {most}", reading)
        if (what == "stop" and state != "ended") or (what == "pause" and reading["accruing"]):
            self.object_to(f"this is not what a {what} leads to", reading)
        if what == "start" and not repeated:
            self._started(reading, siblings, again=again)
        if what in ("start", "heartbeat") and reading["accruing"]:
            self.leases.append((reading["as_of"], reading["accrues_until"]))
        if (state == "ended") != (what == "stop") and not (state == "ended" and self.ended is not False):
            self.object_to(f"a {what} has led to it", reading)
        self.exists = True
        self.revision_min = self.revision_max = revision
        self.ended = state == "ended"
        self.idle = state in ("paused", "ended", "exhausted", "abandoned")
        if what == "start":
            self.key = key

    def _started(self, reading: Json, siblings: list[Chat], *, again: bool) -> None:
        # Where the first one had happened, its clock may have stopped since.
        if reading["state"] not in ("running", "exhausted") and not again:
            self.object_to("this is not what a start leads to", reading)
        if reading["state"] != "running":
            return
        if self.idle:
            self.opened.add(reading["as_of"])
        if not again:  # else it was counted when it had no answer
            self._may_switch(siblings)
        for sibling in siblings:
            sibling.idle = True

    def _may_switch(self, siblings: list[Chat]) -> None:
        for sibling in siblings:
            if not sibling.idle:
                sibling.revision_max += 1

    def refused(self, what: str, status: int, problem: Json, floor: Floor) -> None:
        """Take a refusal, which has changed nothing."""
        code = problem["code"]
        if (status, code) == (404, "chat-not-found") and what != "start" and not self.exists:
            return
        if (status, code) == (404, "user-not-found") and not self.exists:
            return
        if (status, code) == (409, "chat-not-active") and what == "heartbeat":
            self.read(problem["reading"], floor, committed=True)
            state = problem["reading"]["state"]
            if state in ACTIVE or (state == "ended" and self.ended is False):
                self.object_to("a heartbeat was refused", problem)
            return
        self.object_to(f"a {what} was refused with {status}", problem)

    def looked_at(self, reading: Json, floor: Floor) -> None:
        """Take a reading by the client that sends the commands: nothing else was under way."""
        self.read(reading, floor, committed=False)
        if not self.revision_min <= reading["revision"] <= self.revision_max:
            self.object_to(f"its revision must be {self.revision_min} to {self.revision_max}", reading)
        if self.ended is not None and self.ended != (reading["state"] == "ended"):
            self.object_to(f"ended must be {self.ended}", reading)
