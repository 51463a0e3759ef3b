"""What happens is told to the host product: each thing once, in order, and when it happened."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from reconciler.sweep import sweep, sweep_and_record
from talktime import operations
from talktime.errors import InsufficientBalance
from talktime.meter.state import CreditKind
from tests.database import Clock, connect
from tests.reconciler.receiver import CARD, LOW_US, Receiver, credit, scalar, telling
from tests.support import CREDIT, S, audit_lines, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


def _at(text: str) -> int:
    # In integers: a float would lose the last of the microseconds.
    since = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * S + since.microseconds


async def test_a_session_is_told_in_order_and_to_the_microsecond_though_the_pass_comes_late(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    began = now.now
    async with telling(database_url) as service:
        await credit(service, "u", amount=30 * CREDIT)
        await operations.start(service, "u", "c1", advisor_id="a", key=None)
        now.tick(2 * S)
        await operations.start(service, "u", "c2", advisor_id="a", key=None)
        for _ in range(4):
            now.tick(10 * S)
            await operations.heartbeat(service, "u", "c2")
        await operations.stop(service, "u", "c1")
        now.tick(260 * S)
        for _ in range(2):  # the second has nothing to tell
            await sweep_and_record(service.database, asyncio.Event(), webhook=receiver.settings)
        assert await audit_lines(service.database) == []
    told = [(event["type"], _at(event["occurred_at"]) - began) for event in receiver.events]
    # 4 s are free and 30 paid: c2 ran out of credits after 34 s, which the beat at 42 s found, and was a sign of life.
    assert told == [
        ("account.credited", 0),
        ("chat.started", 0),
        ("chat.switched", 2 * S),
        ("chat.started", 2 * S),
        ("free_time.exhausted", 4 * S),
        ("balance.low", 24 * S),
        ("chat.exhausted", 34 * S),
        ("chat.ended", 42 * S),
    ]
    assert receiver.numbers == [("u", number) for number in range(1, 9)]
    assert len(set(receiver.ids)) == 8
    assert scalar(database_url, "SELECT count(*) FROM event") == 0
    credited, _, switched, *_, low, exhausted, _ = (event["data"] for event in receiver.events)
    assert ("purchase", "30.000000", "30.000000", "k") == tuple(
        credited[name] for name in ("kind", "amount", "balance", "idempotency_key")
    )
    assert ("c1", "c2", 2 * S) == (switched["chat_id"], switched["switched_to"], switched["elapsed_us"])
    assert ("10.000000", began + 34 * S) == (low["balance"], _at(low["exhausts_at"]))
    assert (32 * S, "30.000000") == (exhausted["elapsed_us"], exhausted["credits_used"])


async def test_a_lapse_and_an_abandonment_are_told_by_the_pass_that_finds_them(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    began = now.now
    async with telling(database_url) as service:
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        await operations.pause(service, "u", "c")
        await credit(service, "u")
        await operations.start(service, "u", "d", advisor_id="b", key=None)
        now.tick(350 * S)
        await sweep_and_record(service.database, asyncio.Event(), webhook=receiver.settings)
    told = [
        (event["type"], _at(event["occurred_at"]) - began, event["data"].get("chat_id")) for event in receiver.events
    ]
    assert told == [
        ("chat.started", 0, "c"),
        ("balance.low", 0, None),
        ("account.credited", 0, None),
        ("chat.started", 0, "d"),
        ("free_time.exhausted", 4 * S, None),
        ("chat.lapsed", 15 * S, "d"),
        ("chat.abandoned", 300 * S, "c"),
        ("chat.abandoned", 300 * S, "d"),
    ]


async def test_where_nobody_is_to_be_told_nothing_is_written(database_url: URL, now: Clock) -> None:
    async with open_service(database_url, card=CARD) as service:
        await credit(service, "u")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        now.tick(100 * S)
        await sweep(service.database, asyncio.Event())
    assert scalar(database_url, "SELECT count(*) FROM event") == 0


async def test_what_was_refused_or_rolled_back_is_not_told(database_url: URL, now: Clock) -> None:
    async with telling(database_url) as service:
        await credit(service, "u")
        with pytest.raises(InsufficientBalance):
            await operations.credit(service, "u", kind=CreditKind.REFUND, amount=90 * CREDIT, memo="", key="r")
        await credit(service, "u")  # the same request again
    assert scalar(database_url, "SELECT string_agg(type, ',') FROM event") == "account.credited"


async def test_a_pass_that_was_lost_tells_the_same_when_it_is_made_again(database_url: URL, now: Clock) -> None:
    told = "SELECT array_agg(event_id || payload ORDER BY number) FROM event"
    async with telling(database_url) as service:
        await credit(service, "u")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        before = scalar(database_url, told)
        now.tick(7 * S)
        with connect(database_url) as connection:
            connection.execute("CREATE TABLE kept AS TABLE account")
            await sweep(service.database, asyncio.Event(), low_us=LOW_US)
            first = scalar(database_url, told)
            # As after a crash: the commit of a pass need not have reached the disk.
            connection.execute("DELETE FROM event WHERE type = 'free_time.exhausted'")
            connection.execute(
                "UPDATE account SET (balance, materialized_through, next_event) ="
                " (kept.balance, kept.materialized_through, kept.next_event) FROM kept"
            )
            connection.execute("UPDATE chat SET (count_us, elapsed_us, free_us, cost) = (0, 0, 0, 0)")
            connection.execute("UPDATE allowance SET used_us = 0")
        now.tick(5 * S)
        await sweep(service.database, asyncio.Event(), low_us=LOW_US)
    assert len(before) + 1 == len(first)
    assert first == scalar(database_url, told)
