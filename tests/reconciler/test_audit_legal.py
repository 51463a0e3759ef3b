"""What a legal history leaves behind is no difference: at no step, in no coincidence, and not while it goes on."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from reconciler.sweep import sweep
from talktime import operations
from talktime.errors import ChatNotActive, ChatNotFound, InsufficientBalance, LockTimeout
from talktime.meter.state import ChatState, CreditKind, Policy, RateCard, Scope, Tariff
from tests.database import connect
from tests.meter.histories import BLOCKS, CHATS, RATES
from tests.reconciler.rich_history import found_in
from tests.support import CREDIT, ONE_A_SECOND, POLICY, S, audit_lines, open_service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from talktime.operations import Service
    from tests.database import Clock

NOTHING_TO_DO = (ChatNotActive, ChatNotFound, InsufficientBalance)
LIKELY = ("start",) * 5 + ("heartbeat",) * 6 + ("credit",) * 3 + ("pass",) * 2 + ("pause", "stop", "card", "settings")


def _policy(rng: random.Random) -> Policy:
    lease_us = rng.choice((4, 20, 50))
    return Policy(rng.choice(list(Scope)), lease_us, lease_us + rng.choice((1, 10, 60)))


def _card(rng: random.Random) -> RateCard:
    return RateCard(Tariff(rng.choice(RATES), *rng.choice(BLOCKS)), rng.choice((0, 1, 5, 13, 40)))


async def _step(service: Service, rng: random.Random, number: int) -> Service:
    """Let something happen; returns the service with the settings then in force."""
    chat_id = rng.choice(sorted(CHATS))
    what = rng.choice(LIKELY)
    try:
        if what == "settings":
            return replace(service, policy=_policy(rng))
        if what == "card":
            await operations.put_advisor(service, CHATS[chat_id], _card(rng))
        elif what == "pass":
            await sweep(service.database, asyncio.Event())
        elif what == "credit":
            kind, amount = rng.choice(list(CreditKind)), rng.choice((1, 2, 9, 30, 200))
            await operations.credit(service, "u", kind=kind, amount=amount, memo="", key=f"{number}")
        elif what == "start":
            key = rng.choice((None, "k1", "k2"))
            await operations.start(service, "u", chat_id, advisor_id=CHATS[chat_id], key=key)
        elif what == "heartbeat":
            await operations.heartbeat(service, "u", chat_id)
        elif what == "pause":
            await operations.pause(service, "u", chat_id)
        else:
            await operations.stop(service, "u", chat_id)
    except NOTHING_TO_DO:
        pass
    return service


@pytest.mark.parametrize("seed", range(6))
async def test_no_step_of_a_random_history_is_a_difference(database_url: URL, clock: Clock, seed: int) -> None:
    rng = random.Random(seed)
    async with open_service(database_url, policy=_policy(rng), card=_card(rng)) as opened:
        service = opened
        for number in range(60):
            clock.set(clock.now + rng.choice((0, 0, 0, 1, 2, 3, 5, 8, 13, 30, 60, -4)))
            service = await _step(service, rng, number)
            assert [] == await audit_lines(service.database), (seed, number)
    with connect(database_url) as connection:
        [(segments,)] = connection.execute("SELECT count(*) FROM segment").fetchall()
    assert segments > 3  # something did happen


async def test_a_segment_that_was_over_at_once_leaves_another_reason_than_the_last_one_recorded(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url) as service:
        await operations.credit(service, "u", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        clock.tick(9)
        await operations.pause(service, "u", "c")
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        await operations.start(service, "u", "d", advisor_id="a", key=None)
        reading = await operations.read_chat(service, "u", "c")
        assert (ChatState.PAUSED, "switched") == (reading.state, reading.stop_reason)
        assert [] == await audit_lines(service.database)
        await operations.stop(service, "u", "d")  # of its start, too, nothing is recorded
        assert [] == await audit_lines(service.database)


async def test_an_exhausted_chat_could_not_pay_because_of_a_senior_who_was_paused_at_that_very_instant(
    database_url: URL, clock: Clock
) -> None:
    policy = POLICY._replace(scope=Scope.NONE)
    async with open_service(database_url, policy=policy, card=RateCard(Tariff(60 * CREDIT), 0)) as service:
        await operations.credit(service, "u", kind=CreditKind.PURCHASE, amount=5, memo="", key="k")
        for chat_id in ("senior", "younger"):
            await operations.start(service, "u", chat_id, advisor_id="a", key=None)
        clock.tick(2)  # five ticks for two: one is left for the senior
        assert ChatState.EXHAUSTED is (await operations.read_chat(service, "u", "younger")).state
        await operations.pause(service, "u", "senior")
        assert [] == await audit_lines(service.database)


async def test_a_count_may_begin_anew_at_a_tariff_that_was_another_in_between(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service:
        await operations.credit(service, "u", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
        for rate in (60, 30, 60):
            await operations.put_advisor(service, "a", RateCard(Tariff(rate * CREDIT), 0))
            await operations.start(service, "u", "c", advisor_id="a", key=None)
            clock.tick(0 if rate == 30 else 9)
            await operations.pause(service, "u", "c")
        segments, _ = await operations.read_segments(service, "u", "c", after=None, limit=9)
        assert [60 * CREDIT] * 2 == [segment.tariff.rate for segment in segments]
        assert [] == await audit_lines(service.database)


async def test_a_switch_that_nobody_can_have_made_is_found(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service:
        await operations.credit(service, "u", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
        for chat_id in "cdc":
            await operations.start(service, "u", chat_id, advisor_id="a", key=None)
            clock.tick(9)
        await operations.pause(service, "u", "c")
        clock.tick(9)
        await operations.start(service, "u", "c", advisor_id="a", key=None)
        assert [] == await audit_lines(service.database)
        with connect(database_url) as connection:
            connection.execute("UPDATE segment SET reason = 'switched' WHERE reason = 'paused'")
        [line] = await audit_lines(service.database)
    assert "reason is switched, derived another: no other chat was started then" in line


async def _live(service: Service, seed: int, user_id: str) -> int:
    """Do what clients do, as fast as it goes; returns how often."""
    rng, done = random.Random(seed), 0
    for number in range(120):
        chat_id = rng.choice("abc")
        try:
            match rng.choice(("start", "beat", "beat", "beat", "pause", "stop", "credit", "take")):
                case "start":
                    await operations.start(service, user_id, chat_id, advisor_id="x", key=None)
                case "beat":
                    await operations.heartbeat(service, user_id, chat_id)
                case "pause":
                    await operations.pause(service, user_id, chat_id)
                case "stop":
                    await operations.stop(service, user_id, chat_id)
                case kind:
                    await operations.credit(
                        service,
                        user_id,
                        kind=CreditKind.GRANT if kind == "credit" else CreditKind.REFUND,
                        amount=rng.choice((10, 1_000, 50_000)),
                        memo="",
                        key=f"{seed}-{number}",
                    )
            done += 1
        except (*NOTHING_TO_DO, LockTimeout):  # the last on a busy machine; nothing was written
            pass
    return done


async def test_a_service_in_full_swing_causes_no_false_alarm(database_url: URL) -> None:
    policy = Policy(Scope.NONE, 20_000, 60_000)  # leases end all the time
    audits = 0
    async with open_service(database_url, policy=policy, card=RateCard(ONE_A_SECOND.tariff, S // 10)) as service:

        async def passes() -> None:
            while True:
                await sweep(service.database, asyncio.Event())

        passing = asyncio.create_task(passes())
        lives = asyncio.gather(*(_live(service, n, f"u{n % 3}") for n in range(6)))
        while not lives.done():
            assert [] == await found_in(database_url, batch_accounts=2)
            audits += 1
        passing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await passing
        assert all(done > 30 for done in await lives)
        assert [] == await audit_lines(service.database)
    assert audits > 3
