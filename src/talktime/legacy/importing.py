"""The import: every old user is decided upon and written, in batches inside buckets, each batch one transaction.

A user who was imported stays as he is, so an import that was ended, however, goes on where it was; and a second one
changes nothing. What was written is read again in the same transaction and compared with what was there before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from talktime.errors import DatabaseUnavailable
from talktime.legacy.rows import Figures, Listed, listed_without_user
from talktime.legacy.source import OldRows, Source, open_source
from talktime.legacy.taking_over import Decided, Rules, decide
from talktime.store import openings
from talktime.store.statements import CLOCK
from talktime.store.tables import bucket_of

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.legacy.tables import Mapped
    from talktime.meter.state import Policy, RateCard
    from talktime.store.database import Database
    from talktime.store.openings import Opening

log = logging.getLogger(__name__)

BATCH_USERS = 200
HELD_USERS = 30_000
"""So many users are in memory: they come in the order of their ids, and are written by bucket."""
BATCHES_AT_ONCE = 3


class Outcome(StrEnum):
    """What became of a user."""

    IMPORTED = "imported"
    ALREADY = "imported before"
    EXISTS = "has an account already"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class UserReport:
    """A user's figures before (in the old tables), left out (as listed), and after (as they were read again here)."""

    user_id: str
    outcome: Outcome
    records: int
    chats: int
    before: Figures
    left_out: Figures
    after: Figures

    @property
    def is_equal(self) -> bool:
        """Whether nothing was lost: before is after and what was listed."""
        return self.before == self.after.plus(self.left_out)


class Reporter(Protocol):
    """Who is told what happens: each user once, each thing that is listed once, and the progress in rows."""

    def user(self, report: UserReport) -> None:
        """Take what became of a user."""

    def listed(self, listed: Listed) -> None:
        """Take what was not taken over as it was."""

    def progress(self, done: int, total: int) -> None:
        """Take how many rows of how many are done."""


@dataclass(slots=True)
class Import:
    """What an import did, in users; `listed` in rows. It is `finished` if it was not stopped before."""

    imported: int = 0
    already: int = 0
    refused: int = 0
    failed: int = 0
    unequal: int = 0
    listed: int = 0
    finished: bool = False

    def __str__(self) -> str:
        """One log line."""
        return (
            f"import imported={self.imported} already={self.already} refused={self.refused} failed={self.failed}"
            f" unequal={self.unequal} listed={self.listed}"
        )

    def count(self, report: UserReport) -> None:
        """Count a user."""
        self.imported += report.outcome is Outcome.IMPORTED
        self.already += report.outcome is Outcome.ALREADY
        self.refused += report.outcome in (Outcome.REFUSED, Outcome.EXISTS)
        self.failed += report.outcome is Outcome.FAILED
        self.unequal += not report.is_equal


class _Undone(Exception):
    """A dry run takes back what it wrote."""

    def __init__(self, told: list[tuple[UserReport, list[Listed]]]) -> None:
        self.told = told


@dataclass(slots=True)
class _Importer:
    database: Database
    rules: Rules
    read_at: int
    reporter: Reporter
    dry_run: bool
    total: int
    made: Import
    done: int = 0

    async def batch(self, bucket: int, users: Sequence[OldRows]) -> None:
        """Import users of a bucket; what fails together is tried one by one."""
        try:
            told = await self._write(bucket, users)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            if len(users) > 1:
                for user in users:
                    await self.batch(bucket, [user])
                return
            log.exception("user %r cannot be imported", users[0].user_id)
            told = [self._failed(users[0], error)]
        for (report, listed), user in zip(told, users, strict=True):
            self.made.count(report)
            self.reporter.user(report)
            for one in listed:
                self.made.listed += 1
                self.reporter.listed(one)
            self.done += len(user.records) + len(user.chats) + len(user.users)
        self.reporter.progress(self.done, self.total)

    async def _write(self, bucket: int, users: Sequence[OldRows]) -> list[tuple[UserReport, list[Listed]]]:
        async def work(connection: AsyncConnection) -> list[tuple[UserReport, list[Listed]]]:
            # None of these accounts is there yet, so there is no row of theirs to lock before the clock is read.
            now: int = (await connection.execute(CLOCK)).scalar_one()
            user_ids = [user.user_id for user in users]
            before = await openings.load_openings(connection, bucket, user_ids)
            decided = [self._decide(user, now) for user in users]
            taken = [one.taken for one in decided if one.taken is not None and one.user_id not in before]
            if taken:
                await openings.insert_accounts(connection, bucket, taken)
            after = await openings.load_openings(connection, bucket, user_ids)
            told = [_told(one, before.get(one.user_id), after.get(one.user_id)) for one in decided]
            if self.dry_run:
                raise _Undone(told)
            return told

        try:
            return await self.database.transaction(work)
        except _Undone as undone:
            return undone.told

    def _decide(self, user: OldRows, now: int) -> Decided:
        return decide(
            user.user_id, user.users, user.records, user.chats, rules=self.rules, read_at=self.read_at, now=now
        )

    def _failed(self, user: OldRows, error: Exception) -> tuple[UserReport, list[Listed]]:
        decided = self._decide(user, now=0)
        report, listed = _left_out(decided, Outcome.FAILED, f"it cannot be written ({type(error).__name__})")
        return report, listed


def _told(decided: Decided, before: Opening | None, after: Opening | None) -> tuple[UserReport, list[Listed]]:
    if decided.taken is None:
        return _report(decided, Outcome.REFUSED, None), decided.listed
    if after is None:
        return _left_out(decided, Outcome.EXISTS, "there is an account already that was not imported")
    return _report(decided, Outcome.IMPORTED if before is None else Outcome.ALREADY, after), decided.listed


def _left_out(decided: Decided, outcome: Outcome, reason: str) -> tuple[UserReport, list[Listed]]:
    """List all that is not listed yet."""
    rest = Figures(*(b - out for b, out in zip(decided.before, decided.left_out, strict=True)))
    decided.listed.append(Listed(decided.user_id, "user", reason, rest))
    return _report(decided, outcome, None), decided.listed


def _report(decided: Decided, outcome: Outcome, after: Opening | None) -> UserReport:
    return UserReport(
        user_id=decided.user_id,
        outcome=outcome,
        records=decided.records,
        chats=decided.chats,
        before=decided.before,
        left_out=decided.left_out,
        after=Figures() if after is None else Figures(after.elapsed_us, after.free_us, after.cost, after.booked),
    )


async def import_all(
    database: Database,
    source_url: URL,
    mapped: Mapped,
    *,
    policy: Policy,
    default_card: RateCard,
    reporter: Reporter,
    stop: asyncio.Event,
    dry_run: bool = False,
) -> Import:
    """Import all users of an old database, or until `stop` is set; on a `dry_run`, take all of it back at once.

    Raises:
        DatabaseUnavailable: one of the two databases does not answer.
        OldTablesError: the old tables are not there.
    """
    cards = await database.read(openings.load_cards)
    rules = Rules(policy, cards, default_card, mapped.second_us)
    made = Import()
    async with open_source(source_url, mapped) as source:
        importer = _Importer(database, rules, source.read_at, reporter, dry_run, sum(source.counts.values()), made)
        reporter.progress(0, importer.total)
        batches: asyncio.Queue[tuple[int, list[OldRows]] | None] = asyncio.Queue(maxsize=BATCHES_AT_ONCE)

        async def write() -> None:
            while (batch := await batches.get()) is not None:
                await importer.batch(*batch)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(BATCHES_AT_ONCE):
                    tasks.create_task(write())
                made.finished = await _gather(source, batches.put, stop)
                for _ in range(BATCHES_AT_ONCE):
                    await batches.put(None)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        if made.finished:
            for row in source.nameless:
                made.listed += 1
                reporter.listed(listed_without_user(row, second_us=rules.second_us))
    return made


async def _gather(
    source: Source, put: Callable[[tuple[int, list[OldRows]]], Awaitable[None]], stop: asyncio.Event
) -> bool:
    """Hand over all users by bucket, the fullest bucket whenever too many are held; return whether these were all."""
    held: dict[int, list[OldRows]] = defaultdict(list)
    count = 0
    async for user in source.users():
        if stop.is_set():
            return False
        bucket = bucket_of(user.user_id)
        held[bucket].append(user)
        count += 1
        if len(held[bucket]) == BATCH_USERS or count == HELD_USERS:
            fullest = max(held, key=lambda one: len(held[one]))
            count -= len(held[fullest])
            await put((fullest, held.pop(fullest)))
    for batch in held.items():
        if stop.is_set():
            return False
        await put(batch)
    return True
