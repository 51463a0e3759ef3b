"""Passes: write every due account as it stands now, in batches inside buckets, each batch one transaction.

Any number of reconcilers may run at once: an account that another one holds is skipped, and so is one that was
materialized since the pass began. A pass that is killed loses the batch in hand, which the next one derives again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pendulum

from talktime import operating, passes
from talktime.errors import DatabaseUnavailable
from talktime.passes import BatchFailed

if TYPE_CHECKING:
    from talktime.store.database import Database
    from talktime.webhooks import WebhookSettings

log = logging.getLogger("reconciler")

BATCH_ACCOUNTS = 500
BATCHES_AT_ONCE = 3
"""While one batch waits for the database, the next is computed; each holds a connection."""


@dataclass(slots=True)
class Pass:
    """What a pass did: accounts and chats written, accounts that could not be, and its lag when it began.

    `began_at` is the database's instant at which it looked up its work.
    """

    accounts: int = 0
    chats: int = 0
    failed: int = 0
    lag_us: int = 0
    seconds: float = 0.0
    began_at: int = 0

    def __str__(self) -> str:
        """One log line."""
        lag = pendulum.duration(microseconds=self.lag_us).in_words()
        return (
            f"pass accounts={self.accounts} chats={self.chats} failed={self.failed}"
            f' seconds={self.seconds:.3f} lag_us={self.lag_us} lag="{lag}"'
        )


def _no_progress(done: int, total: int) -> None:
    """Show nothing."""


async def sweep(
    database: Database,
    stop: asyncio.Event,
    *,
    progress: Callable[[int, int], None] = _no_progress,
    batch_accounts: int = BATCH_ACCOUNTS,
    low_us: int | None = None,
) -> Pass:
    """Make one pass, or, once `stop` is set, as much of it as the batch in hand.

    `progress` is called with the accounts done and the accounts due. An account that cannot be written is logged and
    counted; its neighbours are not held up. What happened is to be told unless `low_us`, how long low credits last, is
    None.

    Raises:
        DatabaseUnavailable: no answer from the database.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    buckets, now, oldest = await passes.due(database)
    made = Pass(lag_us=max(0, now - oldest), began_at=now)
    total = sum(buckets.values())
    progress(0, total)
    order = list(buckets)
    # Reconcilers that start at the same moment begin at different places.
    turn = random.randrange(len(order)) if order else 0  # noqa: S311 - spreads work, guards nothing
    waiting = iter(order[turn:] + order[:turn])

    async def work() -> None:
        for bucket in waiting:
            await _sweep_bucket(
                database,
                bucket,
                now,
                made,
                stop,
                progress=lambda done: progress(done, total),
                limit=batch_accounts,
                low_us=low_us,
            )
            if stop.is_set():
                break

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(BATCHES_AT_ONCE):
                workers.create_task(work())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    made.seconds = loop.time() - began
    return made


async def sweep_and_record(
    database: Database,
    stop: asyncio.Event,
    *,
    progress: Callable[[int, int], None] = _no_progress,
    webhook: WebhookSettings | None = None,
) -> Pass:
    """Make one pass, as `sweep` does, record it for operators to see, and send what is to be told to the `webhook`.

    Raises:
        DatabaseUnavailable: no answer from the database during the pass. The record may be lacking without a word here.
    """
    made = await sweep(database, stop, progress=progress, low_us=None if webhook is None else webhook.low_us)
    await operating.record_pass(
        database,
        began_at=made.began_at,
        took_us=round(made.seconds * 1_000_000),
        lag_us=made.lag_us,
        accounts=made.accounts,
        chats=made.chats,
        failed=made.failed,
    )
    if webhook is not None:
        from reconciler.delivery import deliver_or_log  # noqa: PLC0415 - what it needs is slow to import

        await deliver_or_log(database, webhook, stop)
    return made


async def _sweep_bucket(
    database: Database,
    bucket: int,
    before: int,
    made: Pass,
    stop: asyncio.Event,
    *,
    progress: Callable[[int], None],
    limit: int,
    low_us: int | None,
) -> None:
    after: str | None = ""
    singly_through = ""
    while after is not None and not stop.is_set():
        singly = after < singly_through
        try:
            accounts, chats, after = await passes.materialize(
                database, bucket, after=after, before=before, limit=1 if singly else limit, low_us=low_us
            )
        except BatchFailed as failure:
            if len(failure.user_ids) > 1:
                singly_through = failure.user_ids[-1]
                continue
            made.failed += 1
            after = failure.user_ids[0]
            log.exception("account %r of bucket %d cannot be materialized", after, bucket)
        else:
            made.accounts += accounts
            made.chats += chats
            progress(made.accounts)


async def repeat(
    database: Database,
    stop: asyncio.Event,
    *,
    every_s: float,
    for_s: float | None = None,
    webhook: WebhookSettings | None = None,
) -> Pass:
    """Make a pass every `every_s` seconds until `stop` is set, or until `for_s` seconds are over.

    A pass that takes longer than its period is followed by the next at once. While the database is away, passes fail
    and are logged, and go on when it is back. Returns the sum of all passes.

    Raises:
        DatabaseUnavailable: the last pass before the end found no database.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    due_s = 0.0  # since it began, so that whole seconds add up exactly
    sum_of = Pass()
    unavailable: DatabaseUnavailable | None = None
    while not stop.is_set() and (for_s is None or due_s < for_s):
        try:
            made = await sweep_and_record(database, stop, webhook=webhook)
        except DatabaseUnavailable as error:
            unavailable = error
            log.error("pass failed: %s", error)  # noqa: TRY400 - the traceback says no more
        except Exception:
            # The next pass derives everything again; whatever this was must not end the passes for good.
            unavailable = None
            log.exception("pass failed")
            sum_of.failed += 1
        else:
            unavailable = None
            log.info("%s", made, extra={"fields": asdict(made)})
            if made.seconds > every_s:
                log.warning("the pass took longer than its period of %g s; the next one starts at once", every_s)
            sum_of.accounts += made.accounts
            sum_of.chats += made.chats
            sum_of.failed += made.failed
        due_s = max(due_s + every_s, loop.time() - began)
        if for_s is not None and due_s >= for_s:
            break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(began + due_s):
                await stop.wait()
    if unavailable is not None:
        raise unavailable
    return sum_of
