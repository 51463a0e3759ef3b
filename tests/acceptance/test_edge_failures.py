"""Writes that fail between reading and deducting: all of it is rolled back, and the next try charges once.

The database is made to fail by triggers, constraints, locks and ended sessions of the tests' own. `told` ends each test
with a clean audit and a pass that changes nothing that is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
from httpx import Response
from psycopg import sql
from sqlalchemy.engine import URL

from talktime.store.tables import bucket_of
from tests.acceptance.edges import Story, told
from tests.api.server import json_of
from tests.database import Clock, connect
from tests.support import S, until_blocked

FIGURES = ("state", "elapsed_us", "credits_used", "balance")
DEFERRED = "CONSTRAINT TRIGGER failing AFTER INSERT OR UPDATE ON {} DEFERRABLE INITIALLY DEFERRED"
AT_ONCE = "TRIGGER failing BEFORE INSERT OR UPDATE ON {}"


@contextmanager
def failing(
    clock: Clock, table: str, *, user_id: str = "u1", code: str = "P0001", times: int = 1000, at_commit: bool = False
) -> Iterator[None]:
    """Let so many writes to a user's rows of a table fail. A sequence counts them, which no rollback sets back."""
    names = {"table": sql.Identifier(table), "user": user_id, "code": code, "times": times}
    clock.connection.execute("CREATE SEQUENCE failures")
    clock.connection.execute(
        sql.SQL(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
            " IF NEW.user_id = {user} AND nextval('public.failures') <= {times} THEN"
            " RAISE EXCEPTION 'the test says no' USING ERRCODE = {code}; END IF;"
            " RETURN NEW; END $$"
        ).format(**names)
    )
    kind = DEFERRED if at_commit else AT_ONCE
    clock.connection.execute(
        sql.SQL("CREATE " + kind + " FOR EACH ROW EXECUTE FUNCTION fail()").format(sql.Identifier(table))
    )
    try:
        yield
    finally:
        clock.connection.execute("DROP FUNCTION fail CASCADE")
        clock.connection.execute("DROP SEQUENCE failures")


def failed(answer: Response) -> None:
    """Check that this is a problem document of the server's, which says nothing about the database."""
    assert answer.status_code in {500, 503}, answer.text
    assert "application/problem+json" == answer.headers["content-type"]
    assert "test says no" not in answer.text


async def _running_for_three_seconds(story: Story, *users: str) -> None:
    """Let chats run whose first second is free, and that pay a credit a second."""
    await story.card("60", free_us=1 * S)
    for user_id in users or ("u1",):
        await story.buy("25", user_id=user_id)
        await story.start(user_id=user_id)
    story.at(3 * S)


@pytest.mark.parametrize("at_commit", [False, True], ids=["at-once", "at-commit"])
async def test_a_stop_whose_write_fails_changes_nothing_and_the_next_one_charges_once(
    database_url: URL, clock: Clock, *, at_commit: bool
) -> None:
    tables = ("segment", "ledger_entry", "account", "allowance", "chat")
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story, *tables)
        before, stored = await story.everything(), story.stored()
        for table in tables:
            with failing(clock, table, user_id=table, at_commit=at_commit):
                failed(await story.send("stop", user_id=table))
                failed(await story.send("pause", user_id=table))
            assert stored == story.stored()
        assert before == await story.everything()
        story.at(4 * S)
        for table in tables:
            ended = await story.stop(user_id=table)
            assert ("ended", 4 * S, "3.000000", "22.000000") == story.shown(ended, *FIGURES)
            await story.stop(user_id=table)
            assert ["25.000000", "-3.000000"] == await story.amounts(user_id=table)
            assert [(0, 4 * S, "ended", 1 * S, 3 * S, "3.000000")] == await story.segments(user_id=table)


async def test_a_stop_that_breaks_a_constraint_changes_nothing_and_the_next_one_charges_once(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story)
        stored = story.stored()
        clock.connection.execute("ALTER TABLE ledger_entry ADD CONSTRAINT no_charge CHECK (kind <> 'charge')")
        failed(await story.send("stop"))
        assert stored == story.stored()
        clock.connection.execute("ALTER TABLE ledger_entry DROP CONSTRAINT no_charge")
        assert ("ended", 3 * S, "2.000000", "23.000000") == story.shown(await story.stop(), *FIGURES)
        assert ["25.000000", "-2.000000"] == await story.amounts()


async def test_a_stop_that_meets_a_deadlock_or_a_serialization_failure_is_tried_again_and_charges_once(
    database_url: URL, clock: Clock
) -> None:
    cases = [(table, code) for table in ("segment", "ledger_entry", "account") for code in ("40001", "40P01")]
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story, *(f"{table}-{code}" for table, code in cases))
        for table, code in cases:
            user_id = f"{table}-{code}"
            with failing(clock, table, user_id=user_id, code=code, times=1):
                ended = await story.stop(user_id=user_id)
            assert ("ended", 3 * S, "2.000000", "23.000000") == story.shown(ended, *FIGURES)
            assert ["25.000000", "-2.000000"] == await story.amounts(user_id=user_id)


async def test_a_switch_whose_write_fails_leaves_the_old_clock_running_and_makes_no_new_chat(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story)
        before, stored = await story.everything(), story.stored()
        for table in ("segment", "ledger_entry", "account", "chat"):
            with failing(clock, table):
                failed(await story.send("start", "c2", key="k1"))
            assert (before, stored) == (await story.everything(), story.stored()), table
        await story.refused("stop", 404, "chat-not-found", "c2")
        story.at(5 * S)
        assert ("running", 0, "0.000000", "21.000000") == story.shown(await story.start("c2", key="k1"), *FIGURES)
        assert [(0, 5 * S, "switched", 1 * S, 4 * S, "4.000000")] == await story.segments("c1")
        assert ["25.000000", "-4.000000"] == await story.amounts()


async def test_a_credit_whose_write_fails_does_not_use_up_its_key_and_is_entered_once(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story)
        story.at(11 * S)  # the clock has stopped at 10, and a credit writes that down too
        stored = story.stored()
        for table in ("segment", "ledger_entry", "account"):
            with failing(clock, table):
                failed(await story.credit("5", key="order-5"))
            assert stored == story.stored(), table
        entry = json_of(await story.credit("5", key="order-5"), 201)
        assert (3, "21.000000") == story.shown(entry, "number", "balance_after")
        assert entry == json_of(await story.credit("5", key="order-5"), 201)
        assert ["25.000000", "-9.000000", "5.000000"] == await story.amounts()


@pytest.mark.parametrize("at_commit", [False, True], ids=["at-once", "at-commit"])
async def test_a_pass_whose_write_fails_changes_nothing_of_that_user_and_the_next_one_charges_once(
    database_url: URL, clock: Clock, *, at_commit: bool
) -> None:
    async with told(database_url, clock) as story:
        # The one whose write fails, another, and one of the same bucket: a failure is the first one's own.
        same_bucket = next(f"v{n}" for n in count() if bucket_of(f"v{n}") == bucket_of("u1"))
        users = ("u1", "u2", same_bucket)
        await _running_for_three_seconds(story, *users)
        story.at(11 * S)
        before = await story.everything()
        for table in ("segment", "ledger_entry", "account"):
            with failing(clock, table, at_commit=at_commit):
                assert 0 < (await story.materialize()).failed
            assert before == await story.everything()
            assert [] == await story.audit()
            assert ["25.000000"] == await story.amounts()
            for user_id in users[1:]:
                assert ["25.000000", "-9.000000"] == await story.amounts(user_id=user_id)
        assert 0 == (await story.materialize()).failed
        assert ["25.000000", "-9.000000"] == await story.amounts()


# --- locks and ended sessions -----------------------------------------------------------------------------------------


async def test_a_stop_that_waits_too_long_for_a_lock_changes_nothing_and_the_next_one_charges_once(
    database_url: URL, clock: Clock
) -> None:
    tables = ("account", "chat")
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story, *tables)
        stored = story.stored()
        with connect(database_url) as holder, holder.transaction():
            for table in tables:  # each user waits at the one of the two that is held
                holder.execute(f"SELECT 1 FROM {table} WHERE user_id = '{table}' FOR UPDATE")
            stops = asyncio.gather(*(story.send("stop", user_id=table) for table in tables))
            await until_blocked(database_url, 2)
            for table in tables:  # who reads waits for nobody
                reading = await story.reading(user_id=table)
                assert ("running", 3 * S, "2.000000", "23.000000") == story.shown(reading, *FIGURES)
            assert [503, 503] == [answer.status_code for answer in await stops]
        assert stored == story.stored()
        for table in tables:
            ended = await story.stop(user_id=table)
            assert ("ended", 3 * S, "2.000000", "23.000000") == story.shown(ended, *FIGURES)
            assert ["25.000000", "-2.000000"] == await story.amounts(user_id=table)


async def test_a_session_that_is_ended_in_the_middle_of_a_stop_charges_nothing_and_all_tries_together_once(
    database_url: URL, clock: Clock
) -> None:
    cases = [(table, end) for table in ("segment", "ledger_entry") for end in ("terminate", "cancel")]
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story, *(f"{table}-{end}" for table, end in cases))
        for table, end in cases:
            user_id = f"{table}-{end}"
            stored = story.stored()
            with connect(database_url) as holder, holder.transaction():
                holder.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")  # one may read, but not write
                stopping = asyncio.create_task(story.send("stop", user_id=user_id))
                await until_blocked(database_url)
                ended = holder.execute(
                    f"SELECT count(pg_{end}_backend(pid)) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock' AND state = 'active'"
                ).fetchone()
                assert (1,) == ended
                assert stored == story.stored()
            answer = await stopping
            if answer.status_code != 200:
                failed(answer)
            once = await story.stop(user_id=user_id)
            assert ("ended", 3 * S, "2.000000", "23.000000") == story.shown(once, *FIGURES)
            assert ["25.000000", "-2.000000"] == await story.amounts(user_id=user_id)


async def test_a_pass_that_is_ended_in_the_middle_writes_nothing_by_halves_and_the_next_one_charges_once(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await _running_for_three_seconds(story)
        story.at(11 * S)
        before, stored = await story.everything(), story.stored()
        with connect(database_url) as holder, holder.transaction():
            holder.execute("LOCK TABLE ledger_entry IN SHARE ROW EXCLUSIVE MODE")
            passing = asyncio.create_task(story.materialize())
            await until_blocked(database_url)
            holder.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock' AND state = 'active'"
            )
            await asyncio.wait([passing], timeout=0.5)
            assert (before, stored) == (await story.everything(), story.stored())
        await asyncio.gather(passing, return_exceptions=True)
        await story.materialize()
        assert before == await story.everything()
        assert ["25.000000", "-9.000000"] == await story.amounts()
