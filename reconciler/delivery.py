"""Delivery: what is to be told goes to the host product as signed webhooks, at least once, and in order for each user.

An event is claimed before it is sent, and deleted once the answer is a success. Else it is sent again, later each time,
and those of the same user behind it wait. After the last attempt, or if the receiver says that it is gone for good, it
is dead: it is put aside for an operator, and those behind it go on.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import httpx
from standardwebhooks import Webhook

from talktime.errors import DatabaseUnavailable
from talktime.store import outbox
from talktime.store.outbox import Outgoing, Undelivered
from talktime.store.tables import EPOCH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from talktime.store.database import Database
    from talktime.webhooks import WebhookSettings

log = logging.getLogger("reconciler")
# It would tell the address with each request.
logging.getLogger("httpx").setLevel(logging.WARNING)

S = 1_000_000
SEND_SECONDS_MAX = 10
LEASE_US = 60 * S
"""For how long a claim is good: longer than to send takes."""

ATTEMPTS_MAX = 20
FIRST_WAIT_US = 15 * S
WAIT_US_MAX = 3600 * S
"""The waits double from the first to this one: 20 attempts are made in about 13 hours."""

BUCKETS_AT_ONCE = 3
EVENTS_AT_ONCE = 10
FAILURES_MAX = 5
"""After so many in a row the receiver is left alone until the next pass."""
PASS_SECONDS_MAX = 10
"""So long events are claimed in one pass; the next one goes on. Passes must not wait for a slow receiver."""
ANSWER_BYTES_MAX = 65_536


class Problem(NamedTuple):
    """Why an event was not delivered, and whether the receiver is gone for good."""

    reason: str
    is_gone: bool = False


@dataclass(slots=True)
class Delivered:
    """What became of the events of a pass; `in_a_row` are the failures since the last success."""

    delivered: int = 0
    failed: int = 0
    dead: int = 0
    in_a_row: int = 0

    def __str__(self) -> str:
        """One log line."""
        return f"webhooks delivered={self.delivered} failed={self.failed} dead={self.dead}"


async def deliver_or_log(database: Database, webhook: WebhookSettings, stop: asyncio.Event) -> None:
    """Deliver, as `deliver` does. A pass is not less done for it: what goes wrong is logged, and that is all."""
    try:
        made = await deliver(database, webhook, stop)
    except DatabaseUnavailable as error:
        log.warning("events could not be delivered: %s", error)
    except Exception:
        log.exception("events could not be delivered")
    else:
        if made.failed:
            log.warning("%s", made)
        elif made.delivered:
            log.info("%s", made)


async def deliver(database: Database, webhook: WebhookSettings, stop: asyncio.Event) -> Delivered:
    """Send the events that are due, until there are no more, time is up, the receiver fails, or `stop` is set.

    Raises:
        DatabaseUnavailable: no answer from the database. What was sent and could not be noted is sent again.
    """
    made = Delivered()
    buckets, now = await database.transaction(outbox.load_due_events)
    if not buckets:
        return made
    loop = asyncio.get_running_loop()
    until = loop.time() + PASS_SECONDS_MAX
    waiting = iter(buckets)

    def goes_on() -> bool:
        return not stop.is_set() and made.in_a_row < FAILURES_MAX and loop.time() < until

    async def work(client: httpx.AsyncClient) -> None:
        for bucket in waiting:
            claim = partial(outbox.claim_events, bucket=bucket, before=now, limit=EVENTS_AT_ONCE, lease_us=LEASE_US)
            # Of each user one event at a time; so again until there are no more.
            while goes_on() and (events := await database.transaction(claim)):
                problems = await asyncio.gather(*(_send(client, webhook, event) for event in events))
                delivered, undelivered = _counted(events, problems, made)
                await database.transaction(
                    partial(outbox.settle_events, bucket=bucket, delivered=delivered, undelivered=undelivered)
                )

    try:
        async with httpx.AsyncClient(timeout=SEND_SECONDS_MAX) as client, asyncio.TaskGroup() as workers:
            for _ in range(BUCKETS_AT_ONCE):
                workers.create_task(work(client))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return made


def _counted(
    events: list[Outgoing], problems: list[Problem | None], made: Delivered
) -> tuple[list[Outgoing], list[Undelivered]]:
    """Count what became of events that were sent, and tell those that were delivered from the others."""
    delivered: list[Outgoing] = []
    undelivered: list[Undelivered] = []
    for event, problem in zip(events, problems, strict=True):
        if problem is None:
            made.delivered += 1
            made.in_a_row = 0
            delivered.append(event)
            continue
        is_dead = problem.is_gone or event.attempts >= ATTEMPTS_MAX
        made.failed += 1
        made.dead += is_dead
        made.in_a_row += 1
        next_try_at = None if is_dead else event.claimed_at + wait_us(event.attempts)
        undelivered.append(Undelivered(event, next_try_at, problem.reason))
        if is_dead:
            log.error("event %d of user %r is dead: %s", event.number, event.user_id, problem.reason)
    return delivered, undelivered


def wait_us(attempts: int) -> int:
    """Return how long is waited after so many attempts."""
    return min(FIRST_WAIT_US << (attempts - 1), WAIT_US_MAX)


async def _send(client: httpx.AsyncClient, webhook: WebhookSettings, event: Outgoing) -> Problem | None:
    """Send an event; return why it was not delivered, or None if it was."""
    try:
        async with (
            asyncio.timeout(SEND_SECONDS_MAX),
            client.stream(
                "POST", webhook.url, content=event.payload.encode(), headers=dict(_headers(webhook, event))
            ) as answer,
        ):
            size = 0
            async for chunk in answer.aiter_raw():  # to the end, or the connection could not be used again
                size += len(chunk)
                if size > ANSWER_BYTES_MAX:
                    break
    except TimeoutError:
        return Problem(f"no answer within {SEND_SECONDS_MAX} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Problem(f"no answer: {type(error).__name__}")
    if answer.is_success:
        return None
    return Problem(f"answered {answer.status_code}", is_gone=answer.status_code == httpx.codes.GONE)


def _headers(webhook: WebhookSettings, event: Outgoing) -> Iterator[tuple[str, str]]:
    # The database's instant of this attempt.
    at = EPOCH + timedelta(microseconds=event.claimed_at)
    signatures = (Webhook(secret).sign(event.event_id, at, event.payload) for secret in webhook.secrets)
    yield "content-type", "application/json"
    yield "user-agent", "talktime"
    yield "webhook-id", event.event_id
    yield "webhook-timestamp", str(event.claimed_at // S)
    yield "webhook-signature", " ".join(signatures)
