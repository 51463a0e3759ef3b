"""Batches among locks: what they lock themselves, and that one who waits for a lock keeps nobody waiting with him."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import beats, operations
from talktime.errors import ChatNotActive, DatabaseUnavailable, LockTimeout
from talktime.meter import commands
from talktime.meter.reading import Reading
from talktime.meter.state import ChatState
from talktime.store import accounts, batches, database
from tests.database import Clock, connect
from tests.store.many_chats import (
    HANGS_AFTER_SECONDS,
    LEASE,
    TINY,
    beat_at,
    beat_in_a_request,
    beats_at,
    chat_locked,
    chats_shut,
    copy_user,
    start,
    state_of,
    ten_running,
)
from tests.support import FREE_OF_CHARGE, audit_lines, open_service, until_blocked


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody lose patience with a lock while the test that holds it looks around."""
    monkeypatch.setattr(database, "_SESSION", database._SESSION.replace("'2s'", "'60s'"))
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)


async def test_between_lock_and_commit_a_beating_chat_is_locked_and_its_account_is_not(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        for user_id in ("u", "v"):
            await start(service, user_id)
        await operations.pause(service, "v", "c")

        async def beat(connection: psycopg.AsyncConnection[Any]) -> None:
            locked = await batches.lock_beating(connection, [("v", "c"), ("u", "c")])
            assert ([("u", "c")], [], clock.now) == locked[:3]
            with connect(database_url) as other:
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    other.execute("SELECT FROM chat WHERE user_id = 'u' FOR NO KEY UPDATE NOWAIT")
                # Not the account, not what stands still, and not against those who only refer to the chat.
                other.execute("SELECT FROM account FOR UPDATE NOWAIT")
                other.execute("SELECT FROM chat WHERE user_id = 'v' FOR UPDATE NOWAIT")
                other.execute("SELECT FROM chat WHERE user_id = 'u' FOR KEY SHARE NOWAIT")
            clock.tick(30)
            assert [("u", "c")] == list(await batches.renew(connection, locked, reading=locked.alive))
            with connect(database_url) as other:
                other.execute("SELECT FROM chat FOR UPDATE NOWAIT")

        await service.database.line().run(beat)
        # The instant is the one under the lock, not that of the writing.
        assert clock.now - 30 == beat_at(database_url, "u")


@pytest.mark.usefixtures("_patient")
async def test_of_a_hundred_only_the_one_whose_chat_is_locked_waits(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await start(service, "u0")
        users = [f"u{n}" for n in range(100)]
        copy_user(database_url, "u0", users[1:])
        clock.tick(50)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with chat_locked(database_url, "u42"):
                tasks = {user: asyncio.create_task(operations.heartbeat(service, user, "c")) for user in users}
                held = tasks.pop("u42")
                readings = await asyncio.gather(*tasks.values())
                await until_blocked(database_url)
                assert not held.done()
                assert {clock.now} == beats_at(
                    database_url, [(user_id, "c") for user_id in ("u0", "u41", "u43", "u99")]
                )
                assert clock.now - 50 == beat_at(database_url, "u42")
                clock.tick(7)
            late = await held
        assert {clock.now - 7 + LEASE} == {reading.accrues_until for reading in readings}
        assert (clock.now, clock.now + LEASE, 57) == (late.as_of, late.accrues_until, late.elapsed_us)
        assert clock.now == beat_at(database_url, "u42")


@pytest.mark.usefixtures("_patient")
async def test_in_a_request_the_one_whose_chat_is_locked_goes_the_full_way_when_the_others_are_done(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with chat_locked(database_url, "u4"):
                request = asyncio.create_task(beats.heartbeats(service, keys))
                await until_blocked(database_url)
                assert {clock.now} == beats_at(database_url, [*keys[:4], *keys[5:]])
                clock.tick(7)
            answers = await request
        assert ["running"] * 10 == answers
        assert [clock.now - 7] * 4 + [clock.now] + [clock.now - 7] * 5 == [beat_at(database_url, *key) for key in keys]


async def test_a_lock_that_does_not_go_fails_only_the_beat_that_waits_for_it(
    database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        with chat_locked(database_url, "u4"):
            many, *singly = await asyncio.gather(
                beats.heartbeats(service, keys),
                *(operations.heartbeat(service, *key) for key in keys),
                return_exceptions=True,
            )
        assert isinstance(many, list)
        for found in (many, singly):
            assert LockTimeout is type(found.pop(4))
            assert ["running"] * 9 == [*map(state_of, found)]
        assert clock.now - 50 == beat_at(database_url, "u4")
        assert {clock.now} == beats_at(database_url, [*keys[:4], *keys[5:]])
        assert clock.now + LEASE == (await operations.heartbeat(service, "u4", "c")).accrues_until


@pytest.mark.usefixtures("_patient")
async def test_a_heartbeat_that_a_stop_came_before_does_not_set_the_clock_going_again(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        for user_id in ("u", "v"):
            await start(service, user_id)
        clock.tick(50)
        async with service.database.engine.connect() as stopping:
            locked = await accounts.lock(stopping, "u", chat_id="c")
            assert locked is not None
            stored, now = locked
            single = asyncio.create_task(operations.heartbeat(service, "u", "c"))
            request = asyncio.create_task(beats.heartbeats(service, [("u", "c"), ("v", "c")]))
            await until_blocked(database_url, 2)
            clock.tick(10)
            await accounts.save(stopping, [(stored, commands.stop(stored.account, now, chat_id="c"))])
            await stopping.commit()
        refusal, beaten = await request
        assert (ChatNotActive, "running") == (type(refusal), beaten)
        with pytest.raises(ChatNotActive):
            await single
        reading = await operations.read_chat(service, "u", "c")
        assert (ChatState.ENDED, 50) == (reading.state, reading.elapsed_us)
        assert not await audit_lines(service.database)


async def test_readings_wait_for_no_row(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        with connect(database_url) as holder, holder.transaction():
            for table in ("account", "chat", "allowance"):
                holder.execute(sql.SQL("SELECT FROM {} FOR UPDATE").format(sql.Identifier(table)))
            readings = await asyncio.gather(*(operations.read_chat(service, *key) for key in keys))
        assert [50] * 10 == [reading.elapsed_us for reading in readings]


async def test_batches_that_meet_each_others_locks_lose_no_beat(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)
    # On the machine's own clock: each beat has an instant after all starts.
    async with open_service(database_url, card=FREE_OF_CHARGE) as service:
        started_at = (await start(service, "u0")).as_of
        keys = [(f"u{n}", "c") for n in range(40)]
        copy_user(database_url, "u0", [user_id for user_id, _ in keys[1:]])
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            forwards, backwards, passed, singly = await asyncio.gather(
                beats.heartbeats(service, keys),
                beats.heartbeats(service, keys[::-1]),
                sweep(service.database, asyncio.Event()),
                asyncio.gather(*(operations.heartbeat(service, *key) for key in keys[::3])),
            )
        assert 0 == passed.failed
        assert ["running"] * 94 == [*forwards, *backwards, *map(state_of, singly)]
        assert started_at < min(beats_at(database_url, keys))
        assert not await audit_lines(service.database)


# --- how long a request waits -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_patient")
async def test_what_takes_too_long_does_not_keep_the_others_of_a_request_from_their_answers(
    database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        others = [*keys[:4], *keys[5:]]
        await beats.heartbeats(service, keys)  # opens the connections
        clock.tick(10)
        monkeypatch.setattr(beats, "SECONDS_MAX", 3)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with chat_locked(database_url, "u4"):
                answers = await beats.heartbeats(service, keys)
        assert DatabaseUnavailable is type(answers.pop(4))
        assert ["running"] * 9 == answers
        # What was given up is not done behind the client's back.
        now = clock.now
        clock.tick(10)
        with connect(database_url) as other:
            other.execute("SELECT FROM account, chat FOR UPDATE")
        assert now - 10 == beat_at(database_url, "u4")
        assert {now} == beats_at(database_url, others)


async def test_a_request_that_finds_all_connections_busy_for_too_long_is_told_so_and_is_not_done_later(
    database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Done when the client has long been told that it was not, it would set clocks going again whose pages are gone.
    monkeypatch.setattr(beats, "SECONDS_MAX", 1)
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        free = asyncio.Event()

        async def dawdle(_: object) -> None:
            await free.wait()

        busy = [asyncio.create_task(line.run(dawdle)) for line in service.lines]
        request = asyncio.create_task(beat_in_a_request(service, keys))
        # Of the time that a line may be busy, most.
        await asyncio.wait([request], timeout=database.TRANSACTION_SECONDS_MAX * 0.8)
        in_time = request.done()
        free.set()
        await asyncio.gather(*busy, request)
        assert in_time
        assert [DatabaseUnavailable] * 10 == [type(answer) for answer in request.result()]
        assert {clock.now - 50} == beats_at(database_url, keys)


@pytest.mark.usefixtures("_patient")
async def test_a_service_that_is_closed_answers_those_who_wait_first(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with chats_shut(database_url):
                tasks = [
                    asyncio.create_task(ask(service, *key))
                    for ask in (operations.heartbeat, operations.read_chat)
                    for key in keys
                ]
                await until_blocked(database_url, 2)
                closing = asyncio.create_task(service.close())
                await asyncio.wait([closing], timeout=0.2)
                assert not closing.done()
            assert ["running"] * 20 == [reading.state for reading in await asyncio.gather(*tasks)]
            await closing


@pytest.mark.usefixtures("_patient")
async def test_one_who_gives_up_leaves_his_neighbours_their_answers(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with chats_shut(database_url):
                tasks = [asyncio.create_task(operations.heartbeat(service, *key)) for key in keys]
                await until_blocked(database_url)
                tasks[3].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found.pop(3), asyncio.CancelledError)
        assert ["running"] * 9 == [answer.state for answer in found if isinstance(answer, Reading)]
