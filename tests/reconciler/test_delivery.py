"""Events are delivered at least once, in order for each user, whatever fails on the way."""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from reconciler import delivery
from reconciler.__main__ import _run as run_reconciler
from reconciler.delivery import ATTEMPTS_MAX, FAILURES_MAX, LEASE_US, deliver, wait_us
from talktime import operations
from talktime.store.database import Database
from talktime.webhooks import WebhookSettings
from tests.database import Clock, connect
from tests.program import environment, run, written
from tests.reconciler.receiver import (
    OTHER_SECRET,
    Receiver,
    credit,
    deliver_now,
    receiving,
    scalar,
    telling,
    variables_of,
)
from tests.support import CREDIT, S

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


async def test_a_failed_delivery_is_tried_again_and_those_behind_it_wait(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    receiver.answer = lambda event: 500 if event["data"]["user_id"] == "u" else 200
    async with telling(database_url) as service:
        for user_id in ("u", "v"):
            await credit(service, user_id, "k1")
            await credit(service, user_id, "k2")
        made = await deliver_now(service, receiver)
        assert (2, 1, 0) == (made.delivered, made.failed, made.dead)
        assert sorted(receiver.numbers) == [("u", 1), ("v", 1), ("v", 2)]
        assert scalar(database_url, "SELECT last_error FROM event WHERE number = 1") == "answered 500"
        receiver.forget()
        now.tick(wait_us(1) - 1)
        assert 0 == (await deliver_now(service, receiver)).failed
        now.tick(1)
        assert 1 == (await deliver_now(service, receiver)).failed
        now.tick(wait_us(2) - 1)
        assert 0 == (await deliver_now(service, receiver)).failed
        receiver.answer = lambda _: 204
        now.tick(1)
        assert 2 == (await deliver_now(service, receiver)).delivered
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
    async with telling(database_url) as service:
        for user_id in users:
            for n in range(5):
                await credit(service, user_id, f"k{n}", CREDIT)
        for _ in range(16):
            await asyncio.gather(*(deliver_now(service, receiver) for _ in range(2)))
            now.tick(wait_us(2))
    last = dict.fromkeys(users, 0)
    for user_id, number in receiver.numbers:
        assert number - last[user_id] in (0, 1)
        last[user_id] = number
    assert last == dict.fromkeys(users, 5)
    assert (
        len(receiver.numbers) == sum(tries.values()) == 15 + sum((n + len(u)) % 3 for u in users for n in range(1, 6))
    )
    assert scalar(database_url, "SELECT count(*) FROM event") == 0


async def test_what_fails_for_too_long_is_dead_and_does_not_hold_up_those_behind_it_until_it_is_retried(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    receiver.answer = lambda event: 400 if event["number"] == 1 else 200
    async with telling(database_url) as service:
        await credit(service, "u", "k1")
        await credit(service, "u", "k2")
        with connect(database_url) as connection:
            connection.execute("UPDATE event SET attempts = %s WHERE number = 1", [ATTEMPTS_MAX - 1])
        made = await deliver_now(service, receiver)
        assert (1, 1, 1) == (made.delivered, made.failed, made.dead)
        now.tick(200 * S)
        assert (0, 0) == ((made := await deliver_now(service, receiver)).delivered, made.failed)
        url = {"TALKTIME_DATABASE_URL": written(database_url)}
        listed = run("events", "list", "--dead", **url).stdout.split("\t")
        assert ["u", "1", "account.credited"] == listed[:3]
        assert [str(ATTEMPTS_MAX), "dead", "answered 400\n"] == listed[4:]
        assert "0 dead events will" in run("events", "retry", "u", "--number", "2", **url).stdout
        assert "0 dead events will" in run("events", "retry", "v", **url).stdout
        assert "1 dead event will" in run("events", "retry", "--all", **url).stdout
        assert run("events", "list", "--dead", **url).stdout == ""
        receiver.answer = lambda _: 200
        assert 1 == (await deliver_now(service, receiver)).delivered
    assert receiver.numbers == [("u", 1), ("u", 2), ("u", 1)]


async def test_a_receiver_that_is_gone_is_not_asked_again(database_url: URL, now: Clock, receiver: Receiver) -> None:
    receiver.answer = lambda _: 410
    async with telling(database_url) as service:
        await credit(service, "u")
        made = await deliver_now(service, receiver)
    assert (1, 1) == (made.failed, made.dead)
    assert scalar(database_url, "SELECT state FROM event") == "dead"


async def test_a_reconciler_that_is_killed_while_it_sends_is_followed_by_another_after_its_claim(
    database_url: URL, now: Clock, receiver: Receiver
) -> None:
    receiver.hangs = hanging = threading.Event()
    async with telling(database_url) as service:
        await credit(service, "u")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "reconciler", env=environment(**variables_of(database_url, receiver))
        )
        assert await asyncio.to_thread(receiver.came.wait, 30)
        process.kill()
        await process.wait()
        hanging.set()
        receiver.hangs = None
        assert 1 == scalar(database_url, "SELECT attempts FROM event")
        now.tick(LEASE_US - 1)
        assert 0 == (await deliver_now(service, receiver)).delivered
        now.tick(1)
        assert 1 == (await deliver_now(service, receiver)).delivered
    assert receiver.ids[0] == receiver.ids[1]
    assert receiver.events[0] == receiver.events[1]


async def test_a_receiver_that_is_down_is_left_alone_until_the_next_pass(database_url: URL, now: Clock) -> None:
    with receiving() as receiver:
        settings = receiver.settings
    async with telling(database_url) as service:
        for n in range(40):
            await credit(service, f"u{n}")
        made = await deliver(service.database, settings, asyncio.Event())
        assert FAILURES_MAX <= made.failed < 40
        assert scalar(database_url, "SELECT count(*) FROM event WHERE attempts = 0") == 40 - made.failed
        assert scalar(database_url, "SELECT max(last_error) FROM event") == "no answer: ConnectError"


async def test_a_pass_that_is_stopped_sends_nothing_more(database_url: URL, now: Clock, receiver: Receiver) -> None:
    stop = asyncio.Event()
    stop.set()
    async with telling(database_url) as service:
        await credit(service, "u")
        await deliver(service.database, receiver.settings, stop)
    assert receiver.events == []
    assert scalar(database_url, "SELECT attempts FROM event") == 0


async def test_a_receiver_that_does_not_answer_is_not_waited_for(
    database_url: URL, now: Clock, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SEND_SECONDS_MAX", 0.2)
    receiver.hangs = threading.Event()
    async with telling(database_url) as service:
        await credit(service, "u")
        assert 1 == (await deliver_now(service, receiver)).failed
    assert scalar(database_url, "SELECT last_error FROM event") == "no answer within 0.2 s"


async def test_an_answer_without_end_is_read_no_further(database_url: URL, now: Clock, receiver: Receiver) -> None:
    receiver.answer_bytes = 10 * delivery.ANSWER_BYTES_MAX
    receiver.answer = lambda _: 200
    async with telling(database_url) as service:
        await credit(service, "u")
        assert 1 == (await deliver_now(service, receiver)).delivered


async def test_a_pass_is_not_less_done_for_what_could_not_be_delivered(
    database_url: URL, now: Clock, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    one_pass = argparse.Namespace(audit=False, every=None, duration=None)
    async with telling(database_url) as service:
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        now.tick(S)
        with connect(database_url) as connection:
            connection.execute("ALTER TABLE event RENAME TO lost")
        assert 0 == await run_reconciler(one_pass, Database(database_url), asyncio.Event(), receiver.settings)
        assert now.now == scalar(
            database_url, "SELECT (extract(epoch FROM materialized_through) * 1000000)::bigint FROM account"
        )
    assert "events could not be delivered" in caplog.text


async def test_several_reconcilers_send_each_event_once(database_url: URL, now: Clock, receiver: Receiver) -> None:
    async with telling(database_url) as service:
        for n in range(20):
            await credit(service, f"u{n}", "k1")
            await credit(service, f"u{n}", "k2")
        await asyncio.gather(*(deliver_now(service, receiver) for _ in range(3)))
    assert sorted(receiver.numbers) == sorted((f"u{n}", number) for n in range(20) for number in (1, 2))


async def test_with_two_secrets_either_is_enough(database_url: URL, now: Clock, receiver: Receiver) -> None:
    both = WebhookSettings(url=receiver.url, secrets=(OTHER_SECRET, *receiver.settings.secrets), low_us=0)
    other = WebhookSettings(url=receiver.url, secrets=(OTHER_SECRET,), low_us=0)
    async with telling(database_url) as service:
        await credit(service, "u")
        await deliver(service.database, both, asyncio.Event())
        await credit(service, "v")
        made = await deliver(service.database, other, asyncio.Event())
    assert receiver.numbers == [("u", 1)]
    assert 1 == made.failed


async def test_the_reconciler_as_cron_runs_it_delivers(database_url: URL, receiver: Receiver) -> None:
    async with telling(database_url) as service:
        await credit(service, "u")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
    done = run("reconcile", "--every", "0.2", "--for", "0.4", **variables_of(database_url, receiver))
    assert 0 == done.returncode
    assert "webhooks delivered=2 failed=0 dead=0" in done.stderr
    assert [event["type"] for event in receiver.events] == ["account.credited", "chat.started"]


def test_waits_double_up_to_an_hour() -> None:
    waits = [wait_us(attempts) // S for attempts in range(1, ATTEMPTS_MAX)]
    assert [15, 30, 60, 120] == waits[:4]
    assert 3600 == max(waits)
    assert 11 * 3600 < sum(waits) < 14 * 3600
