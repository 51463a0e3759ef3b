"""What batches of readings and heartbeats send to the database, and what they write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy.engine import URL

from talktime import beats, operations
from talktime.batching import ITEMS_MAX
from talktime.errors import ChatNotFound
from talktime.meter.reading import Reading
from talktime.store.sending import text_of
from talktime.store.statements import READ_WANTED
from talktime.store.tables import datetime_of
from tests.database import Clock, connect
from tests.driver import Parameters, watched
from tests.store.many_chats import TINY, beats_at, copy_user, everything, start
from tests.support import FREE_OF_CHARGE, open_service


@contextmanager
def sent() -> Iterator[tuple[list[str], list[object]]]:
    """Yield the statements on chats that are sent in the block, and a connection for each transaction that ends."""
    statements: list[str] = []
    ends: list[object] = []

    def on_statement(_connection: object, statement: str, _parameters: object) -> None:
        if " chat" in statement:
            statements.append(statement)

    with watched(on_statement, ends.append):
        yield statements, ends


@pytest.mark.parametrize("count", [1, 200, ITEMS_MAX + 1])
async def test_so_many_readings_at_once_are_a_statement_for_each_batch_and_no_transaction(
    database_url: URL, count: int
) -> None:
    async with open_service(database_url, card=FREE_OF_CHARGE) as service:
        await start(service, "u0")
        copy_user(database_url, "u0", [f"u{n}" for n in range(1, 20)])
        await operations.read_chat(service, "u0", "c")  # opens the connection
        with sent() as (statements, ends):
            answers = await asyncio.gather(
                *(operations.read_chat(service, f"u{n}", "c") for n in range(count)), return_exceptions=True
            )
        assert -(-count // ITEMS_MAX) == len(statements)
        assert not ends
        there = min(count, 20)
        assert [f"u{n}" for n in range(there)] == [a.user_id for a in answers if isinstance(a, Reading)]
        assert [ChatNotFound] * (count - there) == [type(answer) for answer in answers[there:]]


@pytest.mark.parametrize("count", [1, 200])
async def test_so_many_heartbeats_at_once_are_three_statements_and_a_commit(
    database_url: URL, clock: Clock, count: int
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await start(service, "u0")
        keys = [(f"u{n}", "c") for n in range(count)]
        copy_user(database_url, "u0", [user_id for user_id, _ in keys[1:]])
        await operations.heartbeat(service, "u0", "c")  # opens the connection
        clock.tick(10)
        with sent() as (statements, ends):
            await asyncio.gather(*(operations.heartbeat(service, *key) for key in keys))
        assert [3, 1] == [len(statements), len(ends)]
        assert {clock.now} == beats_at(database_url, keys[::50])


async def test_a_request_of_many_heartbeats_is_a_few_batches(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await start(service, "u0")
        keys = [(f"u{n}", "c") for n in range(1_200)]
        copy_user(database_url, "u0", [user_id for user_id, _ in keys[1:]])
        await beats.heartbeats(service, keys)  # opens the connections
        clock.tick(10)
        with sent() as (statements, ends):
            answers = await beats.heartbeats(service, keys[::-1])
        # Their rows say that they have credits, and nothing else is looked at.
        assert [6, 3] == [len(statements), len(ends)]
        assert ["running"] * 1_200 == answers
        with connect(database_url) as connection:
            query = "SELECT count(*) FROM chat WHERE last_heartbeat_at = %s"
            assert (1_200,) == connection.execute(query, [datetime_of(clock.now)]).fetchone()


async def test_in_a_request_only_those_accounts_are_read_whose_credits_may_have_run_out(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await start(service, "u0")
        keys = [(f"u{n}", "c") for n in range(20)]
        copy_user(database_url, "u0", [user_id for user_id, _ in keys[1:]])
        await beats.heartbeats(service, keys)  # opens a connection
        clock.tick(10)
        with connect(database_url) as connection:
            connection.execute("UPDATE chat SET exhausts_at = NULL WHERE user_id = 'u3'")
            for user_id, exhausts_at in (("u5", clock.now - 1), ("u7", clock.now), ("u9", clock.now + 1)):
                change = "UPDATE chat SET exhausts_at = %s WHERE user_id = %s"
                connection.execute(change, [datetime_of(exhausts_at), user_id])
        with sent() as (statements, ends), reading_of_users() as read:
            assert ["running"] * 20 == await beats.heartbeats(service, keys)
        assert [3, 1] == [len(statements), len(ends)]
        assert ['"u3"', '"u5"', '"u7"'] == sorted(read)
        assert {clock.now} == beats_at(database_url, keys)


@contextmanager
def reading_of_users() -> Iterator[list[str]]:
    """Yield the users whose accounts are read by the batch in the block, as they are written in the statement."""
    users: list[str] = []

    def on_statement(_connection: object, statement: str, parameters: Parameters) -> None:
        if statement == text_of(READ_WANTED):
            assert isinstance(parameters, dict)
            users.extend(parameters["of_user_id"].strip("{}").split(","))

    with watched(on_statement):
        yield users


async def test_a_heartbeat_of_a_running_chat_changes_nothing_but_when_it_was(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE._replace(free_us=1_000)) as service:
        for user_id in ("u", "v"):
            await start(service, user_id)
        before = everything(database_url)
        clock.tick(50)
        await operations.heartbeat(service, "u", "c")
        await beats.heartbeats(service, [("v", "c")])
        after = everything(database_url)
        assert {clock.now} == beats_at(database_url, [("u", "c"), ("v", "c")])
        for row in (*before["chat"], *after["chat"]):
            del row["last_heartbeat_at"]
        assert before == after
