"""What operators look at: running chats, the last hour, users, passes."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talktime import operating, operations, passes
from talktime.meter.advance import advance
from talktime.meter.state import (
    Account,
    Allowance,
    Chat,
    ChatState,
    CreditKind,
    RateCard,
    Scope,
    Segment,
    StopReason,
    Tariff,
)
from talktime.operating import KeptHour, minutes_of
from talktime.store.database import Database
from tests.database import Clock, connect
from tests.support import CREDIT, POLICY, S, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from talktime.operations import Service

MINUTE = 60 * S
ALL_AT_ONCE = POLICY._replace(scope=Scope.NONE, lease_us=2 * 60 * MINUTE, abandon_after_us=9 * 60 * MINUTE)
CLOSED_PORT = "postgresql+psycopg://nobody:nothing@127.0.0.1:1/nowhere"


# --- the last hour, by hand -------------------------------------------------------------------------------------------


@st.composite
def accounts(draw: st.DrawFn) -> Account:
    """An account with running chats that share allowances and a balance, and stop at different times."""
    advisors = ("a", "b")
    times = st.integers(0, 12 * MINUTE)
    allowances = {}
    for advisor in advisors:
        granted_us = draw(st.one_of(st.integers(0, 3), times))
        allowances[advisor] = Allowance(granted_us, draw(st.integers(0, granted_us)))
    chats = {}
    for number in range(draw(st.integers(1, 4))):
        tariff = Tariff(
            draw(st.integers(0, 3 * CREDIT)), draw(st.sampled_from((0, 60 * S))), draw(st.sampled_from((0, S, 60 * S)))
        )
        count_us = draw(st.integers(0, 2 * MINUTE))
        chats[f"c{number}"] = Chat(
            chat_id=f"c{number}",
            advisor_id=draw(st.sampled_from(advisors)),
            state=ChatState.RUNNING,
            tariff=tariff,
            lease_us=draw(st.integers(1, 10 * MINUTE)),
            abandon_after_us=60 * MINUTE,
            last_heartbeat_at=MINUTE,
            started_at=MINUTE,
            opened_at=MINUTE,
            opened_count_us=count_us,
            count_us=count_us,
        )
    balance = draw(st.integers(0, 20 * CREDIT))
    return Account(user_id="u", at=MINUTE, balance=balance, allowances=allowances, chats=chats)


@given(account=accounts(), end=st.integers(2 * MINUTE, 14 * MINUTE))
def test_minutes_are_what_the_meter_says_when_it_is_asked_minute_by_minute(account: Account, end: int) -> None:
    view = advance(account, end)
    closed = [event for event in view.journal if isinstance(event, Segment)]
    minutes = 8
    made = minutes_of([*closed, *operating._open_segments(view)], end, minutes=minutes)
    marks = [end - step * MINUTE for step in range(minutes, -1, -1)]
    views = [advance(account, mark) if mark >= account.at else account._replace(chats={}) for mark in marks]
    costs = [sum(chat.cost for chat in view.chats.values()) for view in views]
    lives = [sum(chat.state is ChatState.RUNNING for chat in view.chats.values()) for view in views]
    assert marks[1:] == [minute.at for minute in made]
    assert [after - before for before, after in pairwise(costs)] == [m.cost for m in made]
    assert lives[1:] == [minute.live for minute in made]


@pytest.mark.parametrize("tariff", [Tariff(3 * CREDIT + 1), Tariff(7, 60 * S, 6 * S), Tariff(CREDIT, 90 * S)])
def test_the_minutes_of_a_segment_add_up_to_its_cost(tariff: Tariff) -> None:
    rng = random.Random(7)
    for _ in range(50):
        count_us, free_us, paid_us = (rng.randrange(1, 3 * MINUTE) for _ in range(3))
        started_at = rng.randrange(10 * MINUTE)
        segment = Segment(
            chat_id="c",
            advisor_id="a",
            started_at=started_at,
            ended_at=started_at + free_us + paid_us,
            reason=StopReason.ENDED,
            tariff=tariff,
            count_us=count_us,
            free_us=free_us,
            paid_us=paid_us,
            cost=tariff.cost(count_us + paid_us) - tariff.cost(count_us),
        )
        minutes = minutes_of([segment], 20 * MINUTE + rng.randrange(MINUTE))
        assert segment.cost == sum(minute.cost for minute in minutes)


# --- on a database ----------------------------------------------------------------------------------------------------


async def _credit(service: Service, user_id: str, amount: int = 100 * CREDIT) -> None:
    await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=amount, memo="", key="k")


async def test_the_last_hour_is_what_the_balances_lost_minute_by_minute(database_url: URL, clock: Clock) -> None:
    rng = random.Random(11)
    users = ("ann", "bob", "cy")
    async with open_service(database_url, policy=ALL_AT_ONCE, card=RateCard(Tariff(CREDIT), 2 * MINUTE)) as service:
        for user_id in users:
            await _credit(service, user_id, 40 * CREDIT)
        balances, lives = [], []
        for minute in range(75):
            clock.tick(1)  # what is done at the very instant of a mark would count at it
            for user_id in users:
                chat_id = f"c{rng.randrange(3)}"
                if rng.random() < 0.3:
                    await operations.start(service, user_id, chat_id, advisor_id=f"a-{chat_id}", key=None)
                    clock.tick(rng.randrange(S))
                elif rng.random() < 0.3:
                    await operations.start(service, user_id, chat_id, advisor_id=f"a-{chat_id}", key=None)
                    await operations.pause(service, user_id, chat_id)
            if minute == 40:
                await _pass(service)
            clock.set(MINUTE * (clock.now // MINUTE + 1))
            readings = [await operations.read_account(service, user_id) for user_id in users]
            balances.append(sum(reading.balance for reading in readings))
            lives.append(sum(len(reading.running) for reading in readings))
        hour = await operating.last_hour(service.database, KeptHour())
    assert clock.now == hour.as_of
    assert [before - after for before, after in pairwise(balances[-61:])] == [minute.cost for minute in hour.minutes]
    assert lives[-60:] == [minute.live for minute in hour.minutes]
    assert lives[-1] == hour.live
    assert max(lives) > 3


async def _pass(service: Service) -> None:
    buckets, now, _ = await passes.due(service.database)
    for bucket in buckets:
        await passes.materialize(service.database, bucket, after="", before=now, limit=99)


async def test_running_chats_come_newest_first_and_those_that_have_stopped_are_left_out(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, policy=POLICY._replace(scope=Scope.NONE)) as service:
        for user_id in ("ann", "bob", "cy"):
            await _credit(service, user_id)
            await operations.start(service, user_id, "c", advisor_id="a", key=None)
            clock.tick(6 * S)
        await operations.start(service, "bob", "d", advisor_id="a", key=None)
        clock.tick(S)  # ann's lease ended 4 s ago, and no pass has written it
        now = await operating.running_now(service.database, limit=10)
        hour = await operating.last_hour(service.database, KeptHour())
        some = await operating.running_now(service.database, limit=2)
    assert [("bob", "d"), ("cy", "c"), ("bob", "c")] == [(r.user_id, r.chat_id) for r in now.readings]
    assert [S, 7 * S, 13 * S] == [reading.elapsed_us for reading in now.readings]
    assert (True, 4) == (now.complete, now.stored)
    assert 3 == hour.live
    assert 3 * 60 * CREDIT == operating.rate_of(now.readings) == hour.rate
    assert [("bob", "d"), ("cy", "c")] == [(r.user_id, r.chat_id) for r in some.readings]
    assert (False, 4) == (some.complete, some.stored)


async def test_free_time_costs_nothing_a_minute(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, card=RateCard(Tariff(3 * CREDIT), 5 * S)) as service:
        await _credit(service, "ann")
        await operations.start(service, "ann", "c", advisor_id="a", key=None)
        rates = []
        for _ in range(2):
            clock.tick(4 * S)
            now = await operating.running_now(service.database, limit=9)
            hour = await operating.last_hour(service.database, KeptHour())
            rates.append((operating.rate_of(now.readings), hour.rate))
    assert [(0, 0), (3 * CREDIT, 3 * CREDIT)] == rates


async def test_the_hour_is_kept_for_a_while_and_then_computed_again(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service:
        kept = KeptHour()
        first = await operating.last_hour(service.database, kept)
        clock.tick(MINUTE)
        assert first is await operating.last_hour(service.database, kept)
        kept.until -= operating.HOUR_KEPT_S
        later = await operating.last_hour(service.database, kept)
    assert MINUTE == later.as_of - first.as_of


async def test_users_are_found_by_how_their_ids_begin_and_signs_are_taken_as_they_are(database_url: URL) -> None:
    ids = ("u", "u-1", "u_1", "u%", "U", "u|", "u~", "v", "um", "ux~~")
    async with open_service(database_url) as service:
        for user_id in ids:
            await _credit(service, user_id.replace("%", "="))

        async def found(prefix: str, limit: int = 99) -> tuple[list[str], bool]:
            return await operating.find_users(service.database, prefix, limit=limit)

        assert (["u", "u-1", "u=", "u_1", "um", "ux~~", "u|", "u~"], False) == await found("u")
        assert (["u_1"], False) == await found("u_")
        assert (["u~"], False) == await found("u~")
        assert ([], False) == await found("u%")
        assert (["u", "u-1"], True) == await found("u", 2)


async def test_the_lag_is_how_long_the_oldest_figures_wait(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service:
        assert 0 == await operating.lag(service.database)
        await _credit(service, "ann")
        await operations.start(service, "ann", "c", advisor_id="a", key=None)
        clock.tick(40 * S)
        assert 40 * S == await operating.lag(service.database)


# --- passes -----------------------------------------------------------------------------------------------------------


async def test_passes_are_kept_for_a_day(database_url: URL, clock: Clock) -> None:
    day = 24 * 60 * MINUTE
    async with open_service(database_url) as service:
        began = clock.now
        for at in (0, 1, day // 2, day + 1):
            clock.set(began + at)
            await operating.record_pass(
                service.database, began_at=began + at, took_us=5, lag_us=6, accounts=7, chats=8, failed=9
            )
        passes, now = await operating.last_passes(service.database, limit=9)
        newest, _ = await operating.last_passes(service.database, limit=1)
    assert clock.now == now
    assert [began + day + 1, began + day // 2, began + 1] == [made.began_at for made in passes]
    assert [(5, 6, 7, 8, 9)] * 3 == [(m.took_us, m.lag_us, m.accounts, m.chats, m.failed) for m in passes]
    assert passes[:1] == newest


async def test_a_pass_that_cannot_be_recorded_is_logged_and_no_error(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"began_at": 0, "took_us": 0, "lag_us": 0, "accounts": 0, "chats": 0, "failed": 0}
    away = Database(CLOSED_PORT)
    await operating.record_pass(away, **record)
    await away.close()
    with connect(database_url) as connection:
        connection.execute("ALTER TABLE reconciler_pass ADD CONSTRAINT no_more CHECK (began_at IS NULL)")
    async with open_service(database_url) as service:
        await operating.record_pass(service.database, **record)
    told = [line.getMessage() for line in caplog.records if line.name == "talktime.operating"]
    assert ["the pass could not be recorded: the database is not available", "the pass could not be recorded"] == told
