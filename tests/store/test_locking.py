"""The locking order, with real concurrency: each test fails if a step of it is left out or comes too early."""

from __future__ import annotations

import asyncio
import random

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import operations
from talktime.errors import LockTimeout
from talktime.meter import commands
from talktime.meter.advance import advance
from talktime.meter.reading import Reading
from talktime.meter.state import ChatState, CreditKind, Policy, Scope
from talktime.operations import Service
from talktime.store import accounts
from talktime.store.batches import lock_beating, renew
from talktime.store.tables import bucket_of
from tests.database import Clock, connect
from tests.support import CREDIT, FREE_OF_CHARGE, ONE_A_SECOND, POLICY, audit_lines, open_service, until_blocked

# Microseconds, on a clock that only the tests move.
TINY = Policy(Scope.ADVISOR, lease_us=100, abandon_after_us=10_000)


async def _start(service: Service, chat_id: str, user_id: str = "u") -> Reading:
    return await operations.start(service, user_id, chat_id, advisor_id="a", key=None)


async def _pass(service: Service) -> int:
    return (await sweep(service.database, asyncio.Event())).accounts


async def test_the_instant_is_read_after_the_lock_was_had(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await _start(service, "c")
        async with service.database.engine.connect() as holder:
            await accounts.lock(holder, "u")
            waiting = asyncio.create_task(operations.pause(service, "u", "c"))
            await until_blocked(database_url)
            clock.tick(50)
            await holder.rollback()
        assert clock.now == (await waiting).stopped_at


async def test_a_start_that_waited_for_another_start_switches_its_chat(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await _start(service, "c1")
        async with service.database.engine.connect() as first:
            locked = await accounts.lock(first, "u", chat_id="c2", advisor_id="a")
            assert locked is not None
            stored, now = locked
            after = commands.start(stored.account, now, chat_id="c2", advisor_id="a", card=FREE_OF_CHARGE, policy=TINY)
            await accounts.save(first, [(stored, after)])
            second = asyncio.create_task(_start(service, "c3"))
            await until_blocked(database_url)
            clock.tick(7)
            await first.commit()
        started = await second
        switched = await operations.read_chat(service, "u", "c2")
        assert (ChatState.PAUSED, "switched") == (switched.state, switched.stop_reason)
        assert clock.now == started.started_at == switched.stopped_at
        assert not await audit_lines(service.database)


async def test_a_beat_in_flight_is_not_lost_to_a_pass_that_would_close_the_segment(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        began = (await _start(service, "c")).started_at
        clock.set(began + 90)

        async def beat(connection: psycopg.AsyncConnection) -> asyncio.Task[int]:
            locked = await lock_beating(connection, [("u", "c")])
            clock.set(began + 150)  # past the lease of 100, unless the beat counts
            passing = asyncio.create_task(_pass(service))
            await until_blocked(database_url)
            await renew(connection, locked, reading=locked.alive)
            return passing

        passing = await service.database.line().run(beat)
        assert await passing == 1
        reading = await operations.read_chat(service, "u", "c")
        assert (ChatState.RUNNING, 150, began + 190, began + 150) == (
            reading.state,
            reading.elapsed_us,
            reading.accrues_until,
            reading.materialized_through,
        )


async def test_a_beat_that_comes_while_a_pass_holds_the_chat_goes_the_full_way(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        began = (await _start(service, "c")).started_at
        clock.set(began + 90)
        async with service.database.engine.connect() as passing:
            rows = await accounts.lock_due(passing, bucket_of("u"), after="", before=began + 90, limit=10)
            due, now = await accounts.lock_chats(passing, bucket_of("u"), rows)
            beating = asyncio.create_task(operations.heartbeat(service, "u", "c"))
            await until_blocked(database_url)
            clock.set(began + 120)
            await accounts.save(passing, [(stored, advance(stored.account, now)) for stored in due])
            await passing.commit()
        reading = await beating
        # The lease ended at 100; the beat came into force at 120 and opened a new segment there.
        assert (ChatState.RUNNING, 100, began + 120) == (reading.state, reading.elapsed_us, reading.as_of)
        assert not await audit_lines(service.database)


@pytest.mark.parametrize(("gap_us", "segments"), [(99, 1), (100, 2), (101, 2)])
async def test_a_beat_at_the_end_of_the_lease_comes_too_late_to_keep_the_segment(
    database_url: URL, clock: Clock, gap_us: int, segments: int
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        began = (await _start(service, "c")).started_at
        clock.set(began + gap_us)
        reading = await operations.heartbeat(service, "u", "c")
        receipt, _ = await operations.read_segments(service, "u", "c", after=None, limit=10)
        assert (ChatState.RUNNING, min(gap_us, 100), segments) == (reading.state, reading.elapsed_us, len(receipt))
        assert began + gap_us + 100 == reading.accrues_until


async def test_a_start_at_the_very_instant_of_the_last_one_is_counted(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        for revision in (1, 2):
            assert (clock.now, revision) == ((await _start(service, "c")).as_of, revision)
            assert revision == (await operations.read_chat(service, "u", "c")).revision


async def test_a_beat_after_the_clock_stepped_back_does_not_shorten_the_lease(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        began = (await _start(service, "c")).started_at
        for at in (began + 50, began + 20):
            clock.set(at)
            assert began + 150 == (await operations.heartbeat(service, "u", "c")).accrues_until


async def test_a_stop_that_waits_for_a_pass_ends_the_chat_at_its_own_instant(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY) as service:
        await operations.credit(service, "u", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
        began = (await _start(service, "c")).started_at
        clock.set(began + 50)
        async with service.database.engine.connect() as passing:
            rows = await accounts.lock_due(passing, bucket_of("u"), after="", before=began + 50, limit=10)
            due, now = await accounts.lock_chats(passing, bucket_of("u"), rows)
            stopping = asyncio.create_task(operations.stop(service, "u", "c"))
            await until_blocked(database_url)
            clock.set(began + 80)
            await accounts.save(passing, [(stored, advance(stored.account, now)) for stored in due])
            await passing.commit()
        reading = await stopping
        assert (80, 80, began + 80) == (reading.elapsed_us, reading.credits_used, reading.stopped_at)
        entries, _ = await operations.read_ledger(service, "u", before=None, limit=10)
        assert [-80, CREDIT] == [entry.amount for entry in entries]


async def test_a_pass_leaves_alone_what_a_stop_holds(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await _start(service, "c")
        await _start(service, "c", user_id="v")
        clock.tick(10)
        async with service.database.engine.connect() as stopping:
            await accounts.lock(stopping, "u", chat_id="c")
            assert await _pass(service) == 1
            await stopping.rollback()
        clock.tick(1)
        assert await _pass(service) == 1 + 1


async def test_those_who_wait_for_one_account_do_not_keep_others_from_theirs(database_url: URL) -> None:
    async with open_service(database_url, card=FREE_OF_CHARGE) as service:
        for user_id in "uv":
            await _start(service, "c", user_id)
        async with service.database.engine.connect() as holder:
            await accounts.lock(holder, "u")
            waiting = [asyncio.create_task(operations.pause(service, "u", "c")) for _ in range(25)]
            await until_blocked(database_url, 19)  # the whole pool, but for the holder
            assert (await operations.read_chat(service, "v", "c")).accruing
            refused = await asyncio.gather(*waiting, return_exceptions=True)
            await holder.rollback()
        assert {LockTimeout} == {type(refusal) for refusal in refused}


async def test_transactions_are_read_committed_whatever_the_servers_default_is(database_url: URL) -> None:
    with connect(database_url) as connection:
        connection.execute(
            f"ALTER DATABASE \"{database_url.database}\" SET default_transaction_isolation = 'serializable'"
        )
    async with open_service(database_url) as service:
        shown = await service.database.transaction(
            lambda connection: connection.scalar(text("SHOW transaction_isolation"))
        )
    assert "read committed" == shown


@pytest.mark.parametrize("scope", list(Scope))
async def test_starts_at_once_leave_one_clock_in_the_scope(database_url: URL, scope: Scope) -> None:
    async with open_service(database_url, policy=POLICY._replace(scope=scope), card=FREE_OF_CHARGE) as service:
        for round_ in range(5):
            chats = [f"{round_}-{n}" for n in range(8)]
            await asyncio.gather(*(_start(service, chat_id) for chat_id in chats))
            running, _ = await operations.read_chats(service, "u", state=ChatState.RUNNING, after=None, limit=100)
            assert len(running) == (8 * (round_ + 1) if scope is Scope.NONE else 1)
        if scope is not Scope.NONE:
            everything, _ = await operations.read_chats(service, "u", state=None, after=None, limit=100)
            # Each clock stopped at the very instant at which the next one started.
            later = everything[:-1]
            assert [r.stopped_at for r in everything[1:]] == [r.started_at for r in later]
        assert not await audit_lines(service.database)


async def test_two_starts_of_one_chat_make_one_record_and_one_segment(database_url: URL) -> None:
    async with open_service(database_url, card=FREE_OF_CHARGE) as service:
        readings = await asyncio.gather(*(_start(service, "c") for _ in range(8)))
        assert {1, 2, 3, 4, 5, 6, 7, 8} == {reading.revision for reading in readings}
        assert 1 == len({reading.started_at for reading in readings})
        segments, _ = await operations.read_segments(service, "u", "c", after=None, limit=10)
        assert [None] == [segment.ended_at for segment in segments]


async def test_first_credits_at_once_make_one_account_and_add_up(database_url: URL) -> None:
    async with open_service(database_url) as service:
        await asyncio.gather(
            *(
                operations.credit(service, "u", kind=CreditKind.PURCHASE, amount=n + 1, memo="", key=f"k{n}")
                for n in range(10)
                for _ in range(3)
            )
        )
        entries, _ = await operations.read_ledger(service, "u", before=None, limit=100)
        assert 10 == len(entries)
        assert 55 == entries[0].balance_after == (await operations.read_account(service, "u")).balance


async def test_streams_in_opposite_orders_neither_deadlock_nor_lose_anything(  # noqa: C901 - streams, told in a row
    database_url: URL,
) -> None:
    """Beats over many chats forwards and backwards, commands and two reconcilers, all at once; then exact totals."""
    users, chats = [f"u{n}" for n in range(6)], [f"c{n}" for n in range(4)]
    policy = POLICY._replace(scope=Scope.NONE)
    async with open_service(database_url, policy=policy, card=ONE_A_SECOND) as service:
        for user_id in users:
            await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=90 * CREDIT, memo="", key="k")
            for chat_id in chats:
                await _start(service, chat_id, user_id)
        everything = [(user_id, chat_id) for user_id in users for chat_id in chats]

        async def beat(order: list[tuple[str, str]]) -> None:
            for user_id, chat_id in order * 3:
                await operations.heartbeat(service, user_id, chat_id)

        async def sweep_often() -> None:
            for _ in range(15):
                await _pass(service)

        async def command(order: list[tuple[str, str]]) -> None:
            for user_id, chat_id in order:
                await operations.pause(service, user_id, chat_id)
                await _start(service, chat_id, user_id)
                await operations.credit(
                    service, user_id, kind=CreditKind.GRANT, amount=1, memo="", key=f"{chat_id}-{order is everything}"
                )

        async with asyncio.timeout(60):
            await asyncio.gather(
                beat(everything),
                beat(everything[::-1]),
                command(everything),
                command(everything[::-1]),
                sweep_often(),
                sweep_often(),
            )
        for user_id, chat_id in random.Random(7).sample(everything, len(everything)):
            await operations.stop(service, user_id, chat_id)
        for user_id in users:
            account = await operations.read_account(service, user_id)
            entries, _ = await operations.read_ledger(service, user_id, before=None, limit=200)
            readings, _ = await operations.read_chats(service, user_id, state=None, after=None, limit=10)
            credited = 90 * CREDIT + 2 * len(chats)
            assert credited == account.balance + sum(reading.credits_used for reading in readings)
            assert account.balance == entries[0].balance_after
        assert not await audit_lines(service.database)
