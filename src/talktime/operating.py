"""What operators look at: all users at once, the last hour, and the reconciler's passes.

It computes what it shows from what is stored, as every reading does, and only reads; what passes did and audits found
is recorded here too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from talktime.errors import DatabaseUnavailable
from talktime.meter.advance import advance
from talktime.meter.reading import Reading, read_account
from talktime.meter.state import Account, Segment, StopReason
from talktime.meter.units import MINUTE_US
from talktime.store import openings, operators, outbox
from talktime.store.accounts import load_due
from talktime.store.keys import read_clock
from talktime.store.openings import OpeningChat
from talktime.store.operators import LateEvent, RecordedAudit, RecordedPass, Waiting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.store.database import Database

log = logging.getLogger(__name__)

MINUTES = 60
"""How many minutes the last hour has."""

HOUR_KEPT_S = 10
PASSES_KEPT_US = 24 * 60 * MINUTE_US
AUDITS_KEPT_US = 366 * 24 * 60 * MINUTE_US


@dataclass(frozen=True, slots=True)
class RunningNow:
    """The running chats that started last, newest first; how many run in all is known only if it is `complete`.

    `stored` counts those that are stored as running, some of which may have stopped since.
    """

    as_of: int
    readings: tuple[Reading, ...]
    complete: bool
    stored: int


@dataclass(frozen=True, slots=True)
class Minute:
    """The minute before the instant `at`: the chats that ran at `at`, and what the minute cost, in micro-credits."""

    at: int
    live: int
    cost: int


@dataclass(frozen=True, slots=True)
class LastHour:
    """The minutes up to `as_of`, oldest first; and the chats that run then, and what they cost a minute."""

    as_of: int
    minutes: tuple[Minute, ...]
    live: int
    rate: int


@dataclass(frozen=True, slots=True)
class Outside:
    """What is seen of the whole from outside: the work that waits, the last passes and the last audit, if any."""

    waiting: Waiting
    last_pass: RecordedPass | None
    last_success: RecordedPass | None
    last_audit: RecordedAudit | None


@dataclass(slots=True)
class KeptHour:
    """The last hour as it was computed last, shared by all who look: it reads every running chat."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    hour: LastHour | None = None
    until: float = 0.0


async def running_now(database: Database, *, limit: int) -> RunningNow:
    """Return the readings of the running chats that started last, at most `limit` of them.

    Those that are stored as running, but in truth have stopped, are left out.
    """
    running = await database.snapshot(partial(operators.load_newest_running, limit=limit + 1))
    readings = {
        (reading.user_id, reading.chat_id): reading
        for account in running.accounts
        for reading in read_account(account, running.now).running
    }
    shown = [readings[key] for key in running.newest if key in readings]
    return RunningNow(
        as_of=running.now,
        readings=tuple(shown[:limit]),
        complete=running.count <= limit,
        stored=running.count,
    )


def rate_of(readings: Iterable[Reading]) -> int:
    """Return what running chats cost a minute now, in micro-credits: those whose free time is used up."""
    return sum(reading.tariff.rate for reading in readings if reading.free_left_us == 0)


async def find_users(database: Database, prefix: str, *, limit: int) -> tuple[list[str], bool]:
    """Return the user ids that begin with a text, in order, and whether there are more than `limit`."""
    found = await database.read(partial(operators.load_user_ids, prefix=prefix, limit=limit + 1))
    return found[:limit], len(found) > limit


async def lag(database: Database) -> int:
    """Return for how long, in microseconds, the oldest of what a pass has to write has been waiting."""
    _, now, oldest = await database.snapshot(load_due)
    return max(0, now - oldest)


# --- the last hour ----------------------------------------------------------------------------------------------------


async def last_hour(database: Database, kept: KeptHour) -> LastHour:
    """Return the last hour, as it was up to 10 seconds ago."""
    clock = asyncio.get_running_loop().time
    async with kept.lock:
        if kept.hour is None or clock() >= kept.until:
            load = partial(operators.load_running_and_ended, span_us=MINUTES * MINUTE_US)
            running, ended = await database.snapshot(load)
            # In a thread, because there may be thousands of chats, and others wait for this loop.
            kept.hour = await asyncio.to_thread(_hour_of, running.accounts, ended, running.now)
            kept.until = clock() + HOUR_KEPT_S
        return kept.hour


def _hour_of(accounts: Sequence[Account], ended: Sequence[Segment], now: int) -> LastHour:
    views = [advance(account, max(now, account.at)) for account in accounts]
    # What has ended, but no pass has written yet.
    unwritten = [event for view in views for event in view.journal if isinstance(event, Segment)]
    running = list(chain.from_iterable(_open_segments(view) for view in views))
    return LastHour(
        as_of=now,
        minutes=tuple(minutes_of([*ended, *unwritten, *running], now)),
        live=len(running),
        rate=sum(
            segment.tariff.rate
            for view in views
            for segment in _open_segments(view)
            if view.allowances[segment.advisor_id].left_us == 0
        ),
    )


def _open_segments(view: Account) -> Iterable[Segment]:
    """Yield the segments that are open, as if they ended right after the account's instant."""
    for chat in view.chats.values():
        if chat.opened_at is not None:
            paid_us = chat.count_us - chat.opened_count_us
            yield Segment(
                chat_id=chat.chat_id,
                advisor_id=chat.advisor_id,
                started_at=chat.opened_at,
                ended_at=view.at + 1,
                reason=StopReason.ENDED,
                tariff=chat.tariff,
                count_us=chat.opened_count_us,
                free_us=view.at - chat.opened_at - paid_us,
                paid_us=paid_us,
                cost=chat.accrued,
            )


def minutes_of(segments: Iterable[Segment], end: int, *, minutes: int = MINUTES) -> list[Minute]:
    """Return the last `minutes` minutes before the instant `end`, oldest first, from segments of that time.

    A segment is live at the instants of ``[started_at, ended_at)``. Its free ticks come first and its paid ones after
    them, so what it cost in a minute is a difference of two cumulative costs, and all its minutes add up to its cost.
    """
    begin = end - minutes * MINUTE_US
    live, cost = [0] * (minutes + 1), [0] * minutes
    for segment in segments:
        # The marks, counted from the first one at `begin` + 1 minute, at which it is live.
        first = max(0, -(-(segment.started_at - begin) // MINUTE_US) - 1)
        beyond = min(minutes, -(-(segment.ended_at - begin) // MINUTE_US) - 1)
        if first < beyond:
            live[first] += 1
            live[beyond] -= 1
        paid_from = segment.started_at + segment.free_us
        paid_until = paid_from + segment.paid_us
        for minute in range(
            max(0, (paid_from - begin) // MINUTE_US), min(minutes, -(-(paid_until - begin) // MINUTE_US))
        ):
            start = begin + minute * MINUTE_US
            cost[minute] += _cost_until(segment, start + MINUTE_US) - _cost_until(segment, start)
    for mark in range(1, minutes):
        live[mark] += live[mark - 1]
    return [Minute(begin + (minute + 1) * MINUTE_US, live[minute], cost[minute]) for minute in range(minutes)]


def _cost_until(segment: Segment, instant: int) -> int:
    """Return the cumulative cost of a segment's count at an instant."""
    paid_us = min(max(0, instant - segment.started_at - segment.free_us), segment.paid_us)
    return segment.tariff.cost(segment.count_us + paid_us)


# --- passes -----------------------------------------------------------------------------------------------------------


async def last_passes(database: Database, *, limit: int) -> tuple[list[RecordedPass], int]:
    """Return the reconciler's passes, newest first, and the database's instant."""
    return await database.snapshot(partial(operators.load_passes, limit=limit))


async def record_pass(
    database: Database, *, began_at: int, took_us: int, lag_us: int, accounts: int, chats: int, failed: int
) -> None:
    """Record a pass for operators, and forget those of more than a day ago.

    A pass is not less done for not being recorded: what goes wrong here is logged, and that is all.
    """
    made = RecordedPass(
        pass_id=secrets.token_hex(16),
        began_at=began_at,
        took_us=took_us,
        lag_us=lag_us,
        accounts=accounts,
        chats=chats,
        failed=failed,
    )
    await _record(database, "pass", partial(operators.insert_pass, made=made, keep_since=began_at - PASSES_KEPT_US))


async def record_audit(database: Database, *, took_us: int, accounts: int, differing: int, differences: int) -> None:
    """Record an audit that has just ended, and forget those of more than a year ago.

    It may have read a replica, which cannot be written: what goes wrong here is logged, and that is all.
    """

    async def work(connection: AsyncConnection) -> None:
        now = await read_clock(connection)
        made = RecordedAudit(
            audit_id=secrets.token_hex(16),
            ended_at=now,
            took_us=took_us,
            accounts=accounts,
            differing=differing,
            differences=differences,
        )
        await operators.insert_audit(connection, made, keep_since=now - AUDITS_KEPT_US)

    await _record(database, "audit", work)


async def _record(database: Database, what: str, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
    try:
        await database.transaction(work)
    except DatabaseUnavailable as error:
        log.warning("the %s could not be recorded: %s", what, error)
    except Exception:
        log.exception("the %s could not be recorded", what)


# --- from outside -----------------------------------------------------------------------------------------------------


async def from_outside(database: Database) -> Outside:
    """Return what there is to see from outside, without taking a connection from those who are served.

    Raises:
        DatabaseUnavailable: no answer.
    """

    async def work(connection: AsyncConnection) -> Outside:
        return Outside(
            waiting=await operators.load_waiting(connection),
            last_pass=await operators.load_last_pass(connection),
            last_success=await operators.load_last_pass(connection, without_failure=True),
            last_audit=await operators.load_last_audit(connection),
        )

    return await database.aside(work)


async def read_opening(database: Database, user_id: str, chat_id: str) -> OpeningChat | None:
    """Return what a chat brought along from the system that it was taken over from; None if it began here."""
    return await database.read(partial(openings.load_opening_chat, user_id=user_id, chat_id=chat_id))


# --- events -----------------------------------------------------------------------------------------------------------


async def late_events(database: Database, *, dead: bool, limit: int) -> tuple[list[LateEvent], bool]:
    """Return events that were sent and not delivered, or the dead ones among them; and whether there are more."""
    found = await database.read(partial(operators.load_late_events, dead=dead, limit=limit + 1))
    return found[:limit], len(found) > limit


async def retry_events(database: Database, user_id: str, number: int | None) -> int:
    """Have a user's dead events sent again, or one of them; return how many there were."""
    return await database.transaction(partial(outbox.revive_events, user_id=user_id, number=number))
