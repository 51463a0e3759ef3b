"""Batches that fail: sessions that end at the worst moment, rows that cannot be read, and the connection they share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import URL

from talktime import beats, operations
from talktime.errors import DatabaseUnavailable, TalktimeError
from talktime.store import batches, database
from talktime.store.sending import text_of
from talktime.store.statements import LOCK_ACCOUNT
from tests.database import Clock, connect
from tests.driver import Parameters, watched
from tests.store.many_chats import (
    HANGS_AFTER_SECONDS,
    TINY,
    beat_at,
    beat_in_a_request,
    beat_ten,
    beats_at,
    chat_rows,
    chats_shut,
    commits_held,
    end_sessions,
    everything,
    start,
    state_of,
    ten_answers,
    ten_running,
    undecodable,
)
from tests.support import FREE_OF_CHARGE, open_service, until_blocked


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody lose patience with a lock while the test that holds it looks around."""
    monkeypatch.setattr(database, "_SESSION", database._SESSION.replace("'2s'", "'60s'"))
    monkeypatch.setattr(database, "TRANSACTION_SECONDS_MAX", HANGS_AFTER_SECONDS)
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)


# --- the commit -------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_is_answered_only_after_its_commit(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with commits_held(database_url):
                tasks = beat_ten(service, keys)
                await until_blocked(database_url, 2)
                assert not any(task.done() for task in tasks)
                assert {clock.now - 50} == beats_at(database_url, keys)
            answers = ten_answers(await asyncio.gather(*tasks))
        assert ["running"] * 10 == answers
        assert {clock.now} == beats_at(database_url, keys)


async def test_sessions_that_are_ended_between_the_renewal_and_its_commit_renewed_nothing_and_it_is_done_again(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with commits_held(database_url) as holder:
                tasks = beat_ten(service, keys)
                await until_blocked(database_url, 2)
                assert [True, True] == end_sessions(holder, "wait_event = 'advisory'")
                assert {clock.now - 50} == beats_at(database_url, keys)
                clock.tick(10)
                await until_blocked(database_url, 2)
                assert not any(task.done() for task in tasks)
            answers = ten_answers(await asyncio.gather(*tasks))
        assert ["running"] * 10 == answers
        assert {clock.now} == beats_at(database_url, keys)
        rows = chat_rows(database_url, [user_id for user_id, _ in keys])
        assert [1] * 10 == [row["revision"] for [row] in rows.values()]


async def test_when_every_try_is_ended_before_its_commit_nobody_is_told_of_success_and_nothing_is_written(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        before = everything(database_url)
        with connect(database_url) as connection:
            connection.execute(
                "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
                " PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
            )
            connection.execute(
                "CREATE CONSTRAINT TRIGGER die AFTER UPDATE ON chat DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION die()"
            )
            renewals: list[str] = []
            with watched(lambda _, statement, __: renewals.append(statement) if "UPDATE chat" in statement else None):
                found = await asyncio.gather(*beat_ten(service, keys), return_exceptions=True)
            assert [DatabaseUnavailable] * 10 == [type(answer) for answer in ten_answers(found)]
            assert before == everything(database_url)
            # Two batches, and neither is gone through one by one: that would help nobody.
            assert 2 * database.ATTEMPTS == len(renewals)
            connection.execute("DROP FUNCTION die CASCADE")
        again = ten_answers(await asyncio.gather(*beat_ten(service, keys)))
        assert ["running"] * 10 == again
        assert {clock.now} == beats_at(database_url, keys)


async def test_a_commit_that_takes_too_long_is_not_told_of_as_a_success(
    database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        await beats.heartbeats(service, keys)  # opens the connections
        clock.tick(10)
        monkeypatch.setattr(beats, "SECONDS_MAX", 3)
        with commits_held(database_url):
            request = asyncio.create_task(beat_in_a_request(service, keys))
            await until_blocked(database_url)
            await asyncio.wait([request], timeout=HANGS_AFTER_SECONDS / 2)
            in_time = request.done()
        answers = await request
        assert in_time
        assert [DatabaseUnavailable] * 10 == [type(answer) for answer in answers]
        monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)
        again = await beats.heartbeats(service, keys)
        assert ["running"] * 10 == again
        assert {clock.now} == beats_at(database_url, keys)


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_sessions_that_were_ended_between_two_batches_are_not_noticed(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        for _ in range(2):
            await asyncio.gather(*beat_ten(service, keys), operations.read_chat(service, "u0", "c"))
            with connect(database_url) as other:
                ended = end_sessions(other)
            assert 3 <= len(ended)  # of readings, of heartbeats, and of those in a request
            assert all(ended)
            clock.tick(50)
        answers = ten_answers(await asyncio.gather(*beat_ten(service, keys)))
        assert ["running"] * 10 == answers
        assert {clock.now} == beats_at(database_url, keys)
        assert 150 == (await operations.read_chat(service, "u0", "c")).elapsed_us


async def test_readings_whose_session_is_ended_meanwhile_are_read_again(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            with chats_shut(database_url) as holder:
                tasks = [asyncio.create_task(operations.read_chat(service, *key)) for key in keys]
                await until_blocked(database_url)
                assert [True] == end_sessions(holder, "wait_event_type = 'Lock'")
                await until_blocked(database_url)
            assert [50] * 10 == [reading.elapsed_us for reading in await asyncio.gather(*tasks)]


# --- rows -------------------------------------------------------------------------------------------------------------


async def test_a_row_that_cannot_be_decoded_fails_its_own_user_and_nobody_else(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        others = [*keys[:4], *keys[5:]]
        with undecodable(database_url, "u4"):
            for ask in (operations.read_chat, operations.heartbeat):
                _check_the_fifth_alone_fails(
                    await asyncio.gather(*(ask(service, *key) for key in keys), return_exceptions=True)
                )
            assert {clock.now} == beats_at(database_url, others)
            clock.tick(5)
            _check_the_fifth_alone_fails(await beats.heartbeats(service, keys))
            assert {clock.now} == beats_at(database_url, others)
        answers = ten_answers(await asyncio.gather(*beat_ten(service, keys)))
        assert ["running"] * 10 == answers
        assert {clock.now} == beats_at(database_url, keys)


async def test_of_a_request_in_which_one_fails_that_one_alone_goes_the_full_way(
    database_url: URL, clock: Clock
) -> None:
    under_lock: list[str] = []

    def on_statement(_connection: object, statement: str, parameters: Parameters) -> None:
        if statement == text_of(LOCK_ACCOUNT):
            assert isinstance(parameters, dict)
            under_lock.append(parameters["of_user"])

    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        keys = await ten_running(service, clock, database_url)
        with undecodable(database_url, "u4"), watched(on_statement):
            _check_the_fifth_alone_fails(await beats.heartbeats(service, keys))
    assert ["u4"] == under_lock


def _check_the_fifth_alone_fails(answers: Sequence[Any]) -> None:
    states = [*map(state_of, answers)]
    failed = states.pop(4)
    assert isinstance(failed, Exception)
    assert not isinstance(failed, TalktimeError)
    assert ["running"] * 9 == states


# --- a line -----------------------------------------------------------------------------------------------------------


async def test_a_line_is_used_by_one_at_a_time(database_url: URL) -> None:
    async with open_service(database_url) as service:
        line = service.database.line()
        told: list[str] = []
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def first(_: object) -> None:
            begun.set()
            await go_on.wait()
            told.append("first")

        async def second(connection: psycopg.AsyncConnection[Any]) -> None:
            await connection.execute("SELECT 1")
            told.append("second")

        one = asyncio.create_task(line.run(first))
        await begun.wait()
        other = asyncio.create_task(line.run(second))
        await asyncio.wait([other], timeout=0.2)
        assert [] == told
        go_on.set()
        await asyncio.gather(one, other)
        assert ["first", "second"] == told


@pytest.mark.parametrize("how", ["it fails", "it is given up"])
async def test_what_breaks_off_in_a_lines_transaction_is_rolled_back_and_the_line_goes_on(
    database_url: URL, clock: Clock, how: str
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await start(service, "u")
        clock.tick(50)
        line = service.database.line()
        halfway = asyncio.Event()

        async def break_off(connection: psycopg.AsyncConnection[Any]) -> None:
            await batches.lock_beating(connection, [("u", "c")])
            # In small letters it is the test's own, and not held against the rules for the product's.
            await connection.execute("update chat set last_heartbeat_at = '2030-01-01'")
            halfway.set()
            if how == "it fails":
                raise ValueError(how)
            await asyncio.Event().wait()

        task = asyncio.create_task(line.run(break_off))
        await halfway.wait()
        if how == "it is given up":
            task.cancel()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, ValueError | asyncio.CancelledError)
        with connect(database_url) as other:
            # The session has ended, or is about to; a server that found it idle would end it after 20 s.
            other.execute("SET lock_timeout = '10s'")
            other.execute("SELECT FROM chat FOR UPDATE")
        found = await line.run(lambda connection: batches.beat_many(connection, [("u", "c")]))
        assert [("u", "c")] == list(found)
        assert clock.now == beat_at(database_url, "u")
