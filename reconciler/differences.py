"""What an audit finds: where a stored figure is not what the rest says, and since when it may not be.

`Difference.since` is the earliest instant from which the stored figure can be wrong, as far as what is stored bears
witness:

- a line of the ledger: the instant at which it was written (`recorded_at`);
- a segment: its end (`ended_at`), for that is when it was written; the same for a charge that is missing. Of an open
  one: the instant to which it was materialized, or its begin if that is what is wrong;
- a total (of a chat, an allowance): the latest end of a part, in order of time, at which the parts up to there added up
  to the stored total; the instant at which the total began if they never did;
- the balance, `next_entry`: the `recorded_at` of the last line up to which the ledger's running sum is right; where
  there is none, the instant of the account's first line or start;
- a chat's state, and what belongs to it: the instant at which its clock last stopped or began, as stored, or from which
  the state should have been another;
- what is fixed when a chat or a pair of user and advisor begins: that instant;
- `materialized_through`, `due_at`, the bucket, and a balance below zero: the last instant before that is accounted for.

The instant of an account is the earliest one of its differences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

from talktime.store.tables import EPOCH

Shown: TypeAlias = int | str | None

LISTED_MAX = 100
"""So many differences of an account are listed; the others are counted, so that no account is too large."""


def instant(us: int) -> str:
    """Write an instant as RFC 3339 in UTC with microseconds; one that no calendar has, in microseconds."""
    try:
        at = EPOCH + timedelta(microseconds=us)
    except OverflowError:
        return f"{us} us after 1970"
    return f"{at.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


@dataclass(frozen=True, slots=True)
class Difference:
    """A stored figure, and what it is when derived from the rest, or what the rest allows for it, in words.

    Instants are written as RFC 3339, money in credits.
    """

    what: str
    stored: Shown
    derived: Shown
    since: int

    def __str__(self) -> str:
        """One line, without the account's name."""
        stored, derived = ("none" if value is None else value for value in (self.stored, self.derived))
        return f"{self.what} is {stored}, derived {derived}; since {instant(self.since)}"


@dataclass(slots=True)
class Findings:
    """The differences of one account: the first ones, how many there are, and since when."""

    user_id: str
    listed: list[Difference] = field(default_factory=list)
    count: int = 0
    since: int = 0

    def add(self, what: str, stored: Shown, derived: Shown, since: int) -> None:
        """Note a difference."""
        self.since = min(self.since, since) if self.count else since
        self.count += 1
        if len(self.listed) < LISTED_MAX:
            self.listed.append(Difference(what, stored, derived, since))

    @property
    def unlisted(self) -> int:
        """How many differences are counted but not listed."""
        return self.count - len(self.listed)

    def lines(self) -> list[str]:
        """Write a line for each difference, as people read it."""
        user = f"user {self.user_id!r}"
        lines = [f"{user}: {difference}" for difference in self.listed]
        if self.unlisted:
            lines.append(f"{user}: and {self.unlisted} more; the first since {instant(self.since)}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the same as an object for programs."""
        return {
            "user_id": self.user_id,
            "since": instant(self.since),
            "differences": [
                {"what": d.what, "stored": d.stored, "derived": d.derived, "since": instant(d.since)}
                for d in self.listed
            ],
            "unlisted": self.unlisted,
        }


class Total:
    """A stored total while its parts are added up in order of time, beginning with what was taken over, if anything."""

    __slots__ = ("agreed_at", "derived", "stored")

    def __init__(self, stored: int, began_at: int, opening: int = 0) -> None:
        self.stored = stored
        self.derived = opening
        self.agreed_at = began_at

    def add(self, part: int, at: int) -> None:
        """Add a part that was there from the instant `at`."""
        self.derived += part
        if self.derived == self.stored:
            self.agreed_at = at
