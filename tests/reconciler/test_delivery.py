"""What happens is told to the host product: each thing at least once, in order for each user, and when it happened."""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import delivery
from reconciler.__main__ import _run as run_reconciler
from reconciler.delivery import ATTEMPTS_MAX, FAILURES_MAX, LEASE_US, Delivered, deliver, wait_us
from reconciler.sweep import sweep, sweep_and_record
from talktime import operations
from talktime.errors import InsufficientBalance
from talktime.meter.state import CreditKind, RateCard, Tariff
from talktime.store.database import Database
from talktime.webhooks import WebhookSettings
from tests.database import Clock, connect
from tests.program import environment, run, written
from tests.reconciler.receiver import OTHER_SECRET, Receiver, receiving
from tests.support import CREDIT, S, audit_lines, open_service

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.engine import URL

    from talktime.operations import Service

CARD = RateCard(Tariff(60 * CREDIT), 4 * S)
LOW_US = 10 * S


@pytest.fixture
def now(clock: Clock, database_url: URL) -> Clock:
    """The simulated clock, set to about the real time: receivers take nothing that is older than five minutes."""
    with connect(database_url) as connection:
        row = connection.execute("SELECT extract(epoch FROM pg_catalog.clock_timestamp())::bigint").fetchone()
    assert row is not None
    clock.set((row[0] - 200) * S)
    return clock


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def _telling(url: URL) -> AbstractAsyncContextManager[Service]:
    return open_service(url, card=CARD, low_us=LOW_US)


async def _deliver(service: Service, receiver: Receiver) -> Delivered:
    return await deliver(service.database, receiver.settings, asyncio.Event())


async def _credit(service: Service, user_id: str, key: str = "k", amount: int = 50 * CREDIT) -> None:
    await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=amount, memo="", key=key)


def _scalar(url: URL, query: str) -> Any:  # noqa: ANN401 - as the query has it
    with connect(url) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def _at(text: str) -> int:
    # In integers: a float would lose the last of the microseconds.
    since = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * S + since.microseconds


async def test_a_session_is_told_in_order_and_to_the_microsecond_though_the_pass_comes_late(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    began = now.now
    async with _telling(database_url) as service:
        await _credit(service, "u", amount=30 * CREDIT)
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
    assert _scalar(database_url, "SELECT count(*) FROM event") == 0
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
    async with _telling(database_url) as service:
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        await operations.pause(service, "u", "c")
        await _credit(service, "u")
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
        await _credit(service, "u")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        now.tick(100 * S)
        await sweep(service.database, asyncio.Event())
    assert _scalar(database_url, "SELECT count(*) FROM event") == 0


async def test_what_was_refused_or_rolled_back_is_not_told(database_url: URL, now: Clock) -> None:
    async with _telling(database_url) as service:
        await _credit(service, "u")
        with pytest.raises(InsufficientBalance):
            await operations.credit(service, "u", kind=CreditKind.REFUND, amount=90 * CREDIT, memo="", key="r")
        await _credit(service, "u")  # the same request again
    assert _scalar(database_url, "SELECT string_agg(type, ',') FROM event") == "account.credited"


async def test_a_pass_that_was_lost_tells_the_same_when_it_is_made_again(database_url: URL, now: Clock) -> None:
    told = "SELECT array_agg(event_id || payload ORDER BY number) FROM event"
    async with _telling(database_url) as service:
        await _credit(service, "u")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        before = _scalar(database_url, told)
        now.tick(7 * S)
        with connect(database_url) as connection:
            connection.execute("CREATE TABLE kept AS TABLE account")
            await sweep(service.database, asyncio.Event(), low_us=LOW_US)
            first = _scalar(database_url, told)
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
    assert first == _scalar(database_url, told)


async def test_a_failed_delivery_is_tried_again_and_those_behind_it_wait(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    receiver.answer = lambda event: 500 if event["data"]["user_id"] == "u" else 200
    async with _telling(database_url) as service:
        for user_id in ("u", "v"):
            await _credit(service, user_id, "k1")
            await _credit(service, user_id, "k2")
        made = await _deliver(service, receiver)
        assert (2, 1, 0) == (made.delivered, made.failed, made.dead)
        assert sorted(receiver.numbers) == [("u", 1), ("v", 1), ("v", 2)]
        assert _scalar(database_url, "SELECT last_error FROM event WHERE number = 1") == "answered 500"
        receiver.forget()
        now.tick(wait_us(1) - 1)
        assert 0 == (await _deliver(service, receiver)).failed
        now.tick(1)
        assert 1 == (await _deliver(service, receiver)).failed
        now.tick(wait_us(2) - 1)
        assert 0 == (await _deliver(service, receiver)).failed
        receiver.answer = lambda _: 204
        now.tick(1)
        assert 2 == (await _deliver(service, receiver)).delivered
    assert receiver.numbers == [("u", 1), ("u", 1), ("u", 2)]
    assert receiver.ids[0] == receiver.ids[1] != receiver.ids[2]


async def test_each_users_events_come_in_order_whatever_fails(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    tries: dict[tuple[str, int], int] = {}

    def answer(event: dict[str, Any]) -> int:
        key = event["data"]["user_id"], event["number"]
        tries[key] = tries.get(key, 0) + 1
        return 503 if tries[key] <= (event["number"] + len(key[0])) % 3 else 200

    receiver.answer = answer
    users = ["u", "vv", "www"]
    async with _telling(database_url) as service:
        for user_id in users:
            for n in range(5):
                await _credit(service, user_id, f"k{n}", CREDIT)
        for _ in range(16):
            await asyncio.gather(*(_deliver(service, receiver) for _ in range(2)))
            now.tick(wait_us(2))
    last = dict.fromkeys(users, 0)
    for user_id, number in receiver.numbers:
        assert number - last[user_id] in (0, 1)
        last[user_id] = number
    assert last == dict.fromkeys(users, 5)
    assert (
        len(receiver.numbers) == sum(tries.values()) == 15 + sum((n + len(u)) % 3 for u in users for n in range(1, 6))
    )
    assert _scalar(database_url, "SELECT count(*) FROM event") == 0


async def test_what_fails_for_too_long_is_dead_and_does_not_hold_up_those_behind_it_until_it_is_retried(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    receiver.answer = lambda event: 400 if event["number"] == 1 else 200
    async with _telling(database_url) as service:
        await _credit(service, "u", "k1")
        await _credit(service, "u", "k2")
        with connect(database_url) as connection:
            connection.execute("UPDATE event SET attempts = %s WHERE number = 1", [ATTEMPTS_MAX - 1])
        made = await _deliver(service, receiver)
        assert (1, 1, 1) == (made.delivered, made.failed, made.dead)
        now.tick(200 * S)
        assert (0, 0) == ((made := await _deliver(service, receiver)).delivered, made.failed)
        url = {"TALKTIME_DATABASE_URL": written(database_url)}
        listed = run("events", "list", "--dead", **url).stdout.split("\t")
        assert ["u", "1", "account.credited"] == listed[:3]
        assert [str(ATTEMPTS_MAX), "dead", "answered 400\n"] == listed[4:]
        assert "0 dead events will" in run("events", "retry", "u", "--number", "2", **url).stdout
        assert "0 dead events will" in run("events", "retry", "v", **url).stdout
        assert "1 dead event will" in run("events", "retry", "--all", **url).stdout
        assert run("events", "list", "--dead", **url).stdout == ""
        receiver.answer = lambda _: 200
        assert 1 == (await _deliver(service, receiver)).delivered
    assert receiver.numbers == [("u", 1), ("u", 2), ("u", 1)]


async def test_a_receiver_that_is_gone_is_not_asked_again(database_url: URL, now: Clock, receiver: Receiver) -> None:
    receiver.answer = lambda _: 410
    async with _telling(database_url) as service:
        await _credit(service, "u")
        made = await _deliver(service, receiver)
    assert (1, 1) == (made.failed, made.dead)
    assert _scalar(database_url, "SELECT state FROM event") == "dead"


async def test_a_reconciler_that_is_killed_while_it_sends_is_followed_by_another_after_its_claim(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    receiver.hangs = hanging = threading.Event()
    async with _telling(database_url) as service:
        await _credit(service, "u")
        variables = {
            "TALKTIME_DATABASE_URL": written(database_url),
            "TALKTIME_WEBHOOK_URL": receiver.url,
            "TALKTIME_WEBHOOK_SECRET": receiver.settings.secrets[0],
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "reconciler", env=environment(**variables))
        assert await asyncio.to_thread(receiver.came.wait, 30)
        process.kill()
        await process.wait()
        hanging.set()
        receiver.hangs = None
        assert 1 == _scalar(database_url, "SELECT attempts FROM event")
        now.tick(LEASE_US - 1)
        assert 0 == (await _deliver(service, receiver)).delivered
        now.tick(1)
        assert 1 == (await _deliver(service, receiver)).delivered
    assert receiver.ids[0] == receiver.ids[1]
    assert receiver.events[0] == receiver.events[1]


async def test_a_receiver_that_is_down_is_left_alone_until_the_next_pass(database_url: URL, now: Clock) -> None:
    with receiving() as receiver:
        settings = receiver.settings
    async with _telling(database_url) as service:
        for n in range(40):
            await _credit(service, f"u{n}")
        made = await deliver(service.database, settings, asyncio.Event())
        assert FAILURES_MAX <= made.failed < 40
        assert _scalar(database_url, "SELECT count(*) FROM event WHERE attempts = 0") == 40 - made.failed
        assert _scalar(database_url, "SELECT max(last_error) FROM event") == "no answer: ConnectError"


async def test_a_pass_that_is_stopped_sends_nothing_more(database_url: URL, now: Clock, receiver: Receiver) -> None:
    stop = asyncio.Event()
    stop.set()
    async with _telling(database_url) as service:
        await _credit(service, "u")
        await deliver(service.database, receiver.settings, stop)
    assert receiver.events == []
    assert _scalar(database_url, "SELECT attempts FROM event") == 0


async def test_a_receiver_that_does_not_answer_is_not_waited_for(
    database_url: URL, now: Clock, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SEND_SECONDS_MAX", 0.2)
    receiver.hangs = threading.Event()
    async with _telling(database_url) as service:
        await _credit(service, "u")
        assert 1 == (await _deliver(service, receiver)).failed
    assert _scalar(database_url, "SELECT last_error FROM event") == "no answer within 0.2 s"


async def test_an_answer_without_end_is_read_no_further(database_url: URL, now: Clock, receiver: Receiver) -> None:
    receiver.answer_bytes = 10 * delivery.ANSWER_BYTES_MAX
    receiver.answer = lambda _: 200
    async with _telling(database_url) as service:
        await _credit(service, "u")
        assert 1 == (await _deliver(service, receiver)).delivered


async def test_a_pass_is_not_less_done_for_what_could_not_be_delivered(
    database_url: URL, now: Clock, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    one_pass = argparse.Namespace(audit=False, every=None, duration=None)
    async with _telling(database_url) as service:
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        now.tick(S)
        with connect(database_url) as connection:
            connection.execute("ALTER TABLE event RENAME TO lost")
        assert 0 == await run_reconciler(one_pass, Database(database_url), asyncio.Event(), receiver.settings)
        assert now.now == _scalar(
            database_url, "SELECT (extract(epoch FROM materialized_through) * 1000000)::bigint FROM account"
        )
    assert "events could not be delivered" in caplog.text


async def test_several_reconcilers_send_each_event_once(database_url: URL, now: Clock, receiver: Receiver) -> None:
    async with _telling(database_url) as service:
        for n in range(20):
            await _credit(service, f"u{n}", "k1")
            await _credit(service, f"u{n}", "k2")
        await asyncio.gather(*(_deliver(service, receiver) for _ in range(3)))
    assert sorted(receiver.numbers) == sorted((f"u{n}", number) for n in range(20) for number in (1, 2))


async def test_with_two_secrets_either_is_enough(database_url: URL, now: Clock, receiver: Receiver) -> None:
    both = WebhookSettings(url=receiver.url, secrets=(OTHER_SECRET, *receiver.settings.secrets), low_us=0)
    other = WebhookSettings(url=receiver.url, secrets=(OTHER_SECRET,), low_us=0)
    async with _telling(database_url) as service:
        await _credit(service, "u")
        await deliver(service.database, both, asyncio.Event())
        await _credit(service, "v")
        made = await deliver(service.database, other, asyncio.Event())
    assert receiver.numbers == [("u", 1)]
    assert 1 == made.failed


async def test_the_reconciler_as_cron_runs_it_delivers(database_url: URL, receiver: Receiver) -> None:
    async with _telling(database_url) as service:
        await _credit(service, "u")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
    variables = {
        "TALKTIME_DATABASE_URL": written(database_url),
        "TALKTIME_WEBHOOK_URL": receiver.url,
        "TALKTIME_WEBHOOK_SECRET": receiver.settings.secrets[0],
        "TALKTIME_BALANCE_LOW_SECONDS": "0",
    }
    done = run("reconcile", "--every", "0.2", "--for", "0.4", **variables)
    assert 0 == done.returncode
    assert "webhooks delivered=2 failed=0 dead=0" in done.stderr
    assert [event["type"] for event in receiver.events] == ["account.credited", "chat.started"]


def test_waits_double_up_to_an_hour() -> None:
    waits = [wait_us(attempts) // S for attempts in range(1, ATTEMPTS_MAX)]
    assert [15, 30, 60, 120] == waits[:4]
    assert 3600 == max(waits)
    assert 11 * 3600 < sum(waits) < 14 * 3600
