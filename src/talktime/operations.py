"""The use cases, one function each: lock, decide, write, in one transaction; or read, in one snapshot.

The deciding is the meter's and the SQL is the store's; here they meet. Ids and amounts are valid when they get here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import text

from talktime.batching import Batcher
from talktime.errors import ChatNotActive, ChatNotFound, DatabaseUnavailable, IdempotencyKeyReused, UserNotFound
from talktime.logs import log_start
from talktime.meter import commands
from talktime.meter.advance import advance
from talktime.meter.reading import AccountReading, Reading, read, read_many
from talktime.meter.reading import read_account as reading_of_account
from talktime.meter.state import (
    TRANSITIONS,
    Account,
    ChatState,
    CreditKind,
    Event,
    Policy,
    RateCard,
    Segment,
    StopReason,
    Tariff,
)
from talktime.store import accounts, batches, ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import AsyncConnection as Driver
    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.store.batches import BatchWork, ChatKey, Loaded
    from talktime.store.database import Database, Line
    from talktime.store.ledger import LedgerEntry

T = TypeVar("T")

LINES = 2
"""While one batch of a request waits for the database, the other is read."""


@dataclass(frozen=True)
class Service:
    """What the use cases need: a database, and the settings that commands take with them.

    How long low credits last, `low_us`, is None where nobody is to be told what happens.

    Readings and heartbeats are most of what is asked for: those that come at the same time share their statements.
    """

    database: Database
    policy: Policy
    default_card: RateCard
    low_us: int | None = None

    @cached_property
    def readings(self) -> Batcher[ChatKey, Loaded]:
        """Loads what the readings of chats need."""
        return Batcher(partial(self.batch, self.database.line(), batches.load_many))

    @cached_property
    def beats(self) -> Batcher[ChatKey, Loaded]:
        """Renews the leases of chats whose clocks run, and loads what their readings need."""
        return Batcher(partial(self.batch, self.database.line(), batches.beat_many))

    @property
    def batchers(self) -> Mapping[str, Batcher[ChatKey, Loaded]]:
        """The batches by name, for those who measure them."""
        return {"readings": self.readings, "heartbeats": self.beats}

    async def batch(self, line: Line, work: BatchWork[T], keys: Sequence[ChatKey]) -> dict[ChatKey, T]:
        """Do the work of a batch on a line."""

        async def run(driver: Driver[Any]) -> dict[ChatKey, T]:
            if self.database.on_citus:
                return await batches.by_bucket(work, driver, keys)
            return await work(driver, keys)

        return await line.run(run)

    @cached_property
    def lines(self) -> Sequence[Line]:
        """Connections for those who send many heartbeats in one request: beside the ones for those who send one."""
        return [self.database.line() for _ in range(LINES)]

    async def close(self) -> None:
        """Answer those who still wait, then close all connections."""
        await self.readings.drain()
        await self.beats.drain()
        await self.database.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView:
    """A line of a chat's receipt; `ended_at` and `stop_reason` are None for the segment that is still open."""

    started_at: int
    ended_at: int | None
    stop_reason: StopReason | None
    elapsed_us: int
    free_us: int
    paid_us: int
    cost: int
    tariff: Tariff


def _candidates() -> Mapping[ChatState, frozenset[ChatState]]:
    """For each state, the stored states that the passing of time alone can have turned into it."""
    found: dict[ChatState, set[ChatState]] = {state: {state} for state in ChatState}
    for event in (Event.LAPSE, Event.EXHAUST, Event.ABANDON):
        for before, after in TRANSITIONS[event].items():
            found[after] |= found[before]
    return {state: frozenset(states) for state, states in found.items()}


CANDIDATES = _candidates()


# --- advisors ---------------------------------------------------------------------------------------------------------


async def put_advisor(service: Service, advisor_id: str, card: RateCard) -> None:
    """Set an advisor's rate card: the tariff of segments opened from now on, and the free time of new pairs."""
    await service.database.transaction(lambda connection: ledger.save_card(connection, advisor_id, card))


async def get_advisor(service: Service, advisor_id: str) -> tuple[RateCard, bool]:
    """Return the card in force for an advisor, and whether it is the default one."""
    card = await service.database.read(lambda connection: ledger.load_card(connection, advisor_id))
    return (service.default_card, True) if card is None else (card, False)


# --- commands ---------------------------------------------------------------------------------------------------------


async def start(
    service: Service, user_id: str, chat_id: str, *, advisor_id: str, key: str | None, create: bool = True
) -> Reading:
    """Start a chat's clock; see `talktime.meter.commands.start`.

    Unless it may `create`, a chat that does not exist is not found, and nothing is written.
    """

    async def work(connection: AsyncConnection) -> tuple[Reading, int | None]:
        if create:
            stored, now = await accounts.lock_or_create(connection, user_id, chat_id=chat_id, advisor_id=advisor_id)
        else:
            locked = await accounts.lock(connection, user_id, chat_id=chat_id, advisor_id=advisor_id)
            if locked is None or chat_id not in locked[0].account.chats:
                raise ChatNotFound(user_id, chat_id)
            stored, now = locked
        card = await ledger.load_card(connection, advisor_id) or service.default_card
        after = commands.start(
            stored.account,
            now,
            chat_id=chat_id,
            advisor_id=advisor_id,
            card=card,
            policy=service.policy,
            key=key,
        )
        await accounts.save(connection, [(stored, after)], service.low_us)
        return read(after, chat_id, now), after.chats[chat_id].opened_at

    reading, running_since = await service.database.transaction(work)
    log_start(reading.state, running_since)
    return reading


async def heartbeat(service: Service, user_id: str, chat_id: str) -> Reading:
    """Renew a chat's lease; see `talktime.meter.commands.heartbeat`.

    A running chat whose row is free takes the fast path, without the account's lock: it may only move
    `last_heartbeat_at`, which commutes with whatever pass or command is under way.
    """
    beaten = await service.beats.ask((user_id, chat_id))
    if beaten is not None:
        return read(beaten.account, chat_id, beaten.now)
    return await heartbeat_at_length(service, user_id, chat_id)


async def heartbeat_at_length(service: Service, user_id: str, chat_id: str) -> Reading:
    """Renew a chat's lease under the account's lock, whatever its state."""
    return await _command(
        service,
        user_id,
        chat_id,
        lambda account, now: commands.heartbeat(account, now, chat_id=chat_id, policy=service.policy),
    )


async def pause(service: Service, user_id: str, chat_id: str) -> Reading:
    """Pause a chat; see `talktime.meter.commands.pause`."""
    return await _command(
        service,
        user_id,
        chat_id,
        lambda account, now: commands.pause(account, now, chat_id=chat_id, policy=service.policy),
    )


async def stop(service: Service, user_id: str, chat_id: str) -> Reading:
    """End a chat; see `talktime.meter.commands.stop`."""
    return await _command(service, user_id, chat_id, lambda account, now: commands.stop(account, now, chat_id=chat_id))


async def credit(service: Service, user_id: str, *, kind: CreditKind, amount: int, memo: str, key: str) -> LedgerEntry:
    """Add or take credits once per user and key; a repeated request returns the entry that the first one made."""

    async def work(connection: AsyncConnection) -> LedgerEntry:
        stored, now = await accounts.lock_or_create(connection, user_id)
        earlier = await ledger.find_entry(connection, user_id, key)
        if earlier is not None:
            if earlier.request_hash != ledger.request_hash(kind, amount, memo):
                raise IdempotencyKeyReused
            return earlier
        after = commands.credit(stored.account, now, kind=kind, amount=amount, memo=memo, key=key)
        entries = await accounts.save(connection, [(stored, after)], service.low_us)
        return next(entry for entry in entries if entry.idempotency_key == key)

    return await service.database.transaction(work)


async def _command(service: Service, user_id: str, chat_id: str, command: Callable[[Account, int], Account]) -> Reading:
    async def work(connection: AsyncConnection) -> Reading:
        locked = await accounts.lock(connection, user_id, chat_id=chat_id)
        if locked is None:
            raise ChatNotFound(user_id, chat_id)
        stored, now = locked
        try:
            after = command(stored.account, now)
        except ChatNotActive as refusal:
            refusal.reading = read(stored.account, chat_id, now)
            raise
        await accounts.save(connection, [(stored, after)], service.low_us)
        return read(after, chat_id, now)

    return await service.database.transaction(work)


# --- reads ------------------------------------------------------------------------------------------------------------


async def read_chat(service: Service, user_id: str, chat_id: str) -> Reading:
    """Return a chat's reading now."""
    loaded = await service.readings.ask((user_id, chat_id))
    if loaded is None:
        raise ChatNotFound(user_id, chat_id)
    return read(loaded.account, chat_id, loaded.now)


async def advisor_of(service: Service, user_id: str, chat_id: str) -> str | None:
    """Return the advisor that a chat belongs to; None if there is no such chat."""
    return await service.database.read(lambda connection: accounts.load_advisor(connection, user_id, chat_id))


async def read_account(service: Service, user_id: str) -> AccountReading:
    """Return an account's balance now, what its open segments accrued, and its running chats."""
    account, now = await service.database.read(lambda connection: _load_account(connection, user_id))
    return reading_of_account(account, now)


async def read_ledger(
    service: Service, user_id: str, *, before: int | None, limit: int
) -> tuple[list[LedgerEntry], int | None]:
    """Return a page of the ledger, newest first, and where the next one begins. It lists what has been booked."""

    async def work(connection: AsyncConnection) -> list[LedgerEntry]:
        await _load_account(connection, user_id)
        return await ledger.load_entries(connection, user_id, before=before, limit=limit + 1)

    entries = await service.database.snapshot(work)
    return entries[:limit], entries[limit - 1].number if len(entries) > limit else None


async def read_chats(
    service: Service, user_id: str, *, state: ChatState | None, after: tuple[int, str] | None, limit: int
) -> tuple[list[Reading], tuple[int, str] | None]:
    """Return a page of readings, the chat started last first, and where the next page begins.

    `state` selects by the state as it is now, whether or not it has been materialized.
    """
    stored_states = frozenset(ChatState) if state is None else CANDIDATES[state]

    async def work(connection: AsyncConnection) -> list[Reading]:
        account, now = await _load_account(connection, user_id)
        found: list[Reading] = []
        place = after
        while len(found) <= limit:
            page = await accounts.load_chats(connection, user_id, states=stored_states, after=place, limit=limit + 1)
            whole = account._replace(
                chats={**account.chats, **{chat.chat_id: chat for chat, _ in page}},
                allowances={**account.allowances, **{chat.advisor_id: allowance for chat, allowance in page}},
            )
            readings = read_many(whole, [chat.chat_id for chat, _ in page], now)
            found += [reading for reading in readings if state is None or reading.state is state]
            if len(page) <= limit:
                break
            place = page[-1][0].started_at, page[-1][0].chat_id
        return found

    found = await service.database.snapshot(work)
    last = found[limit - 1] if len(found) > limit else None
    return found[:limit], None if last is None else (last.started_at, last.chat_id)


async def read_segments(
    service: Service, user_id: str, chat_id: str, *, after: int | None, limit: int
) -> tuple[list[SegmentView], int | None]:
    """Return a page of a chat's receipt, oldest first, and where the next page begins.

    It shows the segments as they stand now, those included that no pass has written yet, and the open one.
    """

    async def work(connection: AsyncConnection) -> list[SegmentView]:
        account, now = await _load_account(connection, user_id, chat_id)
        if chat_id not in account.chats:
            raise ChatNotFound(user_id, chat_id)
        stored = await ledger.load_segments(connection, user_id, chat_id, after=after, limit=limit + 1)
        view = advance(account, max(now, account.at))
        closed = [event for event in view.journal if isinstance(event, Segment) and event.chat_id == chat_id]
        views = [_view_of(segment) for segment in (*stored, *closed)] + _open_view(view, chat_id)
        return [v for v in views if after is None or v.started_at > after]

    views = await service.database.snapshot(work)
    return views[:limit], views[limit - 1].started_at if len(views) > limit else None


async def ready(service: Service) -> None:
    """Check that requests can be served.

    Raises:
        DatabaseUnavailable: the database does not answer, lacks its tables, or does not let this login write to them.
    """
    may_write = await service.database.read(
        lambda connection: connection.scalar(text("SELECT has_table_privilege(to_regclass('account'), 'INSERT')"))
    )
    if not may_write:
        message = "the database has no talktime tables that this login may write to: run `talktime migrate`"
        raise DatabaseUnavailable(message)


async def _load_account(connection: AsyncConnection, user_id: str, chat_id: str | None = None) -> tuple[Account, int]:
    loaded = await accounts.load(connection, user_id, chat_id)
    if loaded is None:
        raise UserNotFound(user_id)
    return loaded


def _view_of(segment: Segment) -> SegmentView:
    return SegmentView(
        started_at=segment.started_at,
        ended_at=segment.ended_at,
        stop_reason=segment.reason,
        elapsed_us=segment.ended_at - segment.started_at,
        free_us=segment.free_us,
        paid_us=segment.paid_us,
        cost=segment.cost,
        tariff=segment.tariff,
    )


def _open_view(view: Account, chat_id: str) -> list[SegmentView]:
    chat = view.chats[chat_id]
    if chat.opened_at is None:
        return []
    elapsed_us = view.at - chat.opened_at
    paid_us = chat.count_us - chat.opened_count_us
    return [
        SegmentView(
            started_at=chat.opened_at,
            ended_at=None,
            stop_reason=None,
            elapsed_us=elapsed_us,
            free_us=elapsed_us - paid_us,
            paid_us=paid_us,
            cost=chat.accrued,
            tariff=chat.tariff,
        )
    ]
