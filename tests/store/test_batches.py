"""Batches of readings and heartbeats on a real database: each is answered as it would be alone, in few statements.

The clock is simulated and stands still unless it is moved; so instants are equal, not near.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeAlias

import psycopg
import pytest
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import beats, operations
from talktime.errors import ChatNotActive, ChatNotFound, TalktimeError
from talktime.meter.reading import Reading
from talktime.meter.state import ChatState, CreditKind, Scope
from talktime.operations import Service
from talktime.store import batches
from tests.api.requests import Json
from tests.database import Clock
from tests.store.many_chats import (
    ABANDON,
    HANGS_AFTER_SECONDS,
    LEASE,
    TINY,
    Keys,
    beat_at,
    beats_at,
    chat_rows,
    copy_user,
    start,
    state_of,
)
from tests.support import FREE_OF_CHARGE, audit_lines, open_service

A_MICRO_A_MICROSECOND = FREE_OF_CHARGE._replace(tariff=FREE_OF_CHARGE.tariff._replace(rate=60_000_000))


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a request wait longer for those that go the full way than a busy machine takes."""
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)


# --- all kinds of chats -----------------------------------------------------------------------------------------------

# How many microseconds before the beat, whose, what: of a chat and an advisor that are c and a unless they are named.
# A pass is for everybody.
STORY = (
    (15_000, "abandoned-and-written", "start"),
    (10_120, "abandoned-not-written", "start"),
    (300, "lapsed-and-written", "start"),
    (300, "no-credits", "start"),
    (300, "ended", "start"),
    (290, "ended", "stop"),
    (300, "paused", "start"),
    (280, "paused", "pause"),
    # Of these two the lease would still last.
    (60, "paused-just-now", "start"),
    (20, "paused-just-now", "pause"),
    (60, "ended-just-now", "start"),
    (20, "ended-just-now", "stop"),
    (250, "exhausted-and-written", "credit 30"),
    (250, "exhausted-and-written", "start"),
    (250, "two-lapsed", "start"),
    (240, "two-lapsed", "start d b"),
    (160, "running-and-written", "start"),
    (160, "lapsed-not-written", "start"),
    (150, "", "pass"),
    (110, "renewed", "start"),
    (101, "lease-ended-before", "start"),
    (100, "lease-ends-now", "start"),
    (99, "lease-ends-after", "start"),
    (80, "running-and-written", "heartbeat"),
    (60, "switched-away", "start"),
    (50, "switched-away", "start d"),
    (50, "exhausted-not-written", "credit 30"),
    (50, "exhausted-not-written", "start"),
    (50, "pays", "credit 1000"),
    (50, "pays", "start"),
    (45, "pays", "start d b"),
    (40, "renewed", "heartbeat"),
    (0, "new", "start"),
)
# Whose beats need no lock of the account.
FAST = {"exhausted-not-written", "lease-ends-after", "new", "pays", "renewed", "running-and-written"}
PAYING = {"no-credits", "exhausted-and-written", "exhausted-not-written", "pays"}
KINDS = sorted({user_id for _, user_id, _ in STORY if user_id})
# What is beaten and read of each: also chats and users that are none.
WANTED = [(user_id, "c") for user_id in KINDS] + [("running-and-written", "unknown"), ("unknown", "c")]


async def _live(service: Service, clock: Clock) -> None:
    """Live through the story."""
    for advisor_id in ("paid-a", "paid-b"):
        await operations.put_advisor(service, advisor_id, A_MICRO_A_MICROSECOND)
    end = clock.now + STORY[0][0]
    for ago, user_id, told in sorted(STORY, key=lambda step: -step[0]):
        clock.set(end - ago)
        what, *rest = told.split()
        if what == "pass":
            assert 0 == (await sweep(service.database, asyncio.Event())).failed
        elif what == "credit":
            await operations.credit(service, user_id, kind=CreditKind.GRANT, amount=int(rest[0]), memo="", key="k")
        elif what == "start":
            chat_id, advisor_id = [*rest, *"ca"[len(rest) :]]
            await start(service, user_id, chat_id, f"paid-{advisor_id}" if user_id in PAYING else advisor_id)
        else:
            await getattr(operations, what)(service, user_id, "c")
    assert end == clock.now


def nobodys(answer: Reading | BaseException) -> object:
    """Return an answer, or what is told of a refusal, without whose it is."""
    if isinstance(answer, Reading):
        return answer._replace(user_id="")
    reading = getattr(answer, "reading", None)
    return type(answer), None if reading is None else reading._replace(user_id="")


async def _outcome(answer: Awaitable[Reading]) -> object:
    try:
        return nobodys(await answer)
    except TalktimeError as error:
        return nobodys(error)


def _twins(suffix: str) -> Keys:
    return [(user_id + suffix, chat_id) for user_id, chat_id in WANTED]


Beating: TypeAlias = Callable[[Service, Keys], Awaitable[Sequence[object]]]


async def at_once(service: Service, keys: Keys) -> Sequence[object]:
    return await asyncio.gather(*(_outcome(operations.heartbeat(service, *key)) for key in keys))


async def in_a_request(service: Service, keys: Keys) -> Sequence[object]:
    return [
        answer if isinstance(answer, ChatState) else nobodys(answer) for answer in await beats.heartbeats(service, keys)
    ]


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("beating", [at_once, in_a_request])
async def test_a_heartbeat_among_others_does_what_it_does_alone(
    database_url: URL, clock: Clock, beating: Beating, order: int
) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await _live(service, clock)
        for user_id in KINDS:
            copy_user(database_url, user_id, [f"{user_id}-2", f"{user_id}-3"])
        alone = [await _outcome(operations.heartbeat(service, *key)) for key in WANTED]
        under_lock = [await _outcome(operations.heartbeat_at_length(service, *key)) for key in _twins("-2")]
        together = (await beating(service, _twins("-3")[::order]))[::order]
        assert [*map(_unread, alone)] == [*map(_unread, together)]
        assert [*map(_unread, under_lock)] == [*map(_unread, together)]
        if beating is at_once:
            assert alone == together
            assert _uncounted(under_lock) == _uncounted(together)
        rows, rows_under_lock, twins_rows = (
            list(chat_rows(database_url, [kind + suffix for kind in KINDS]).values()) for suffix in ("", "-2", "-3")
        )
        assert rows == twins_rows
        counted = zip(KINDS, rows_under_lock, rows, strict=True)
        assert FAST == {kind for kind, *chats in counted if len({_revision(of_kind) for of_kind in chats}) > 1}
        states = {answer for answer in map(state_of, together) if isinstance(answer, ChatState)}
        assert {ChatState.RUNNING, ChatState.PAUSED, ChatState.EXHAUSTED} == states
        refusals = [answer[0] for answer in map(state_of, together) if isinstance(answer, tuple)]
        assert [ChatNotActive] * 4 + [ChatNotFound] * 2 == sorted(refusals, key=lambda kind: kind.__name__)
        clock.tick(LEASE // 2)
        await sweep(service.database, asyncio.Event())
        assert not await audit_lines(service.database)


def _uncounted(answers: Iterable[object]) -> list[object]:
    """Leave out of readings what a fast heartbeat does not count, and until when they are written down."""
    return [
        answer._replace(revision=0, materialized_through=0) if isinstance(answer, Reading) else answer
        for answer in answers
    ]


def _unread(answer: object) -> object:
    """Leave the state alone, or what was refused and in which state the chat was."""
    return (answer[0], state_of(answer[1])) if type(answer) is tuple else state_of(answer)


def _revision(rows: Sequence[Json]) -> int:
    [revision] = {row["revision"] for row in rows if row["chat_id"] == "c"}
    return int(revision)


async def test_a_reading_among_others_shows_what_it_shows_alone_and_in_a_list(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await _live(service, clock)
        stored = chat_rows(database_url, KINDS)
        wanted = [*WANTED, ("pays", "d"), ("two-lapsed", "d"), ("switched-away", "d"), *WANTED[:3]]
        alone = [await _outcome(operations.read_chat(service, *key)) for key in wanted]
        together = await asyncio.gather(*(_outcome(operations.read_chat(service, *key)) for key in wanted))
        assert alone == together
        shown = dict(zip(wanted, together, strict=True))
        for user_id in KINDS:
            # Other statements, which find them by another way.
            listed, _ = await operations.read_chats(service, user_id, state=None, after=None, limit=10)
            assert listed
            for reading in listed:
                assert shown[user_id, reading.chat_id] == nobodys(reading)
        assert stored == chat_rows(database_url, KINDS)


async def test_running_chats_of_one_user_in_one_batch_are_each_read_with_all_of_them(
    database_url: URL, clock: Clock
) -> None:
    policy = TINY._replace(scope=Scope.NONE)
    async with open_service(database_url, policy=policy, card=A_MICRO_A_MICROSECOND) as service:
        chats = ["c3", "c1", "c2"]
        for user_id in ("u", "v"):
            await operations.credit(service, user_id, kind=CreditKind.GRANT, amount=1_000, memo="", key="k")
            for chat_id in chats:
                await start(service, user_id, chat_id, f"advisor-of-{chat_id}")
                clock.tick(10)
        wanted = [(user_id, chat_id) for chat_id in chats for user_id in ("u", "v")]
        clock.tick(20)
        for ask in (operations.read_chat, operations.heartbeat):
            readings = await asyncio.gather(*(ask(service, *key) for key in wanted))
            assert wanted == [(reading.user_id, reading.chat_id) for reading in readings]
            # v began 30 later than u; each pays for all three clocks from when they began.
            assert [80, 50, 70, 40, 60, 30] == [reading.elapsed_us for reading in readings]
            assert [790, 880] * 3 == [reading.balance for reading in readings]


async def test_a_users_running_chats_are_read_once_for_all_that_are_wanted_of_this_user(database_url: URL) -> None:
    policy = TINY._replace(scope=Scope.NONE, lease_us=10**9, abandon_after_us=10**10)
    async with open_service(database_url, policy=policy, card=FREE_OF_CHARGE) as service:
        keys = [(user_id, f"c{n}") for n in range(30) for user_id in ("u", "v")]
        for key in keys:
            await start(service, *key)
        read: list[int] = []

        async def work(connection: psycopg.AsyncConnection[Any]) -> dict[batches.ChatKey, batches.Loaded]:
            rows = await (await batches._send_reading(connection, keys, None)).fetchall()
            read.append(sum(row[-1] is not None for row in rows))
            return await batches.load_many(connection, keys)

        found = await service.database.line().run(work)
    assert [len(keys)] == read
    assert keys == list(found)
    assert 2 == len({id(loaded.account) for loaded in found.values()})
    for loaded in found.values():
        assert {f"c{n}" for n in range(30)} == set(loaded.account.chats)


async def test_a_batch_sees_one_instant(database_url: URL) -> None:
    async with open_service(database_url, card=FREE_OF_CHARGE) as service:
        await start(service, "u0")
        keys = [(f"u{n}", "c") for n in range(100)]
        copy_user(database_url, "u0", [user_id for user_id, _ in keys[1:]])
        for ask in (operations.read_chat, operations.heartbeat):
            readings = await asyncio.gather(*(ask(service, *key) for key in keys))
            assert 1 == len({reading.as_of for reading in readings})
        assert 1 == len(beats_at(database_url, keys[::30]))


# --- the clock --------------------------------------------------------------------------------------------------------


async def test_leases_that_end_before_at_and_after_the_instant_of_a_batch(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        users = ["before", "at", "after"]
        for user_id in users:
            await start(service, user_id)
            clock.tick(1)
        clock.tick(LEASE - 2)
        readings = await asyncio.gather(*(operations.heartbeat(service, user_id, "c") for user_id in users))
        receipts = [await operations.read_segments(service, user_id, "c", after=None, limit=9) for user_id in users]
        now = clock.now
        assert [now] * 3 == [reading.as_of for reading in readings]
        assert [
            [(now - 101, now - 1), (now, None)],
            [(now - 100, now), (now, None)],
            [(now - 99, None)],
        ] == [[(segment.started_at, segment.ended_at) for segment in receipt] for receipt, _ in receipts]
        assert [LEASE, LEASE, LEASE - 1] == [reading.elapsed_us for reading in readings]


async def test_a_clock_that_steps_back_between_two_batches_takes_nothing_back(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        users = ["u", "v", "w"]
        for user_id in users:
            await start(service, user_id)
        began = clock.now
        clock.set(began + 50)
        await operations.heartbeat(service, "u", "c")
        await sweep(service.database, asyncio.Event())
        await operations.pause(service, "w", "c")
        clock.set(began + 20)
        for ask, lease_end in ((operations.read_chat, began + 100), (operations.heartbeat, began + 120)):
            readings = await asyncio.gather(*(ask(service, user_id, "c") for user_id in users))
            for reading in readings:
                assert (50, began + 50, began + 20) == (reading.elapsed_us, reading.as_of, reading.server_time)
            u, v, w = readings
            assert (began + 150, ChatState.PAUSED) == (u.accrues_until, w.state)
            assert v.accrues_until is not None
            assert lease_end <= v.accrues_until
        assert began + 50 == beat_at(database_url, "u")
        assert not await audit_lines(service.database)


@pytest.mark.parametrize("beating", [at_once, in_a_request])
async def test_a_heartbeat_after_the_credits_ran_out_says_that_the_clock_does_not_run(
    database_url: URL, clock: Clock, beating: Beating
) -> None:
    async with open_service(database_url, policy=TINY, card=A_MICRO_A_MICROSECOND) as service:
        began = clock.now
        for user_id, amount in (("poor", 40), ("exact", 50), ("rich", 51)):
            await operations.credit(service, user_id, kind=CreditKind.GRANT, amount=amount, memo="", key="k")
            await start(service, user_id)
        clock.tick(50)
        users = ("poor", "exact", "rich")
        found = await beating(service, [(user_id, "c") for user_id in users])
        assert [ChatState.EXHAUSTED, ChatState.EXHAUSTED, ChatState.RUNNING] == [*map(state_of, found)]
        assert [(False, 40, 0, began + 40), (False, 50, 0, began + 50), (True, 50, 1, None)] == [
            (r.accruing, r.elapsed_us, r.balance, r.stopped_at)
            for r in [await operations.read_chat(service, user_id, "c") for user_id in users]
        ]
        # It was a sign of life all the same: it counts from there when the chat is abandoned.
        clock.set(began + 50 + ABANDON - 1)
        assert ChatState.EXHAUSTED is (await operations.read_chat(service, "poor", "c")).state
        clock.tick(1)
        assert ChatState.ABANDONED is (await operations.read_chat(service, "poor", "c")).state
        await sweep(service.database, asyncio.Event())
        assert not await audit_lines(service.database)


# --- the order of a request's beats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("c1", "c2"), ("c2", "c1"), ("c1", "c2", "c1")])
async def test_of_lapsed_clocks_that_exclude_each_other_the_first_that_is_beaten_resumes_and_no_other(
    database_url: URL, clock: Clock, order: Sequence[str]
) -> None:
    async with open_service(database_url, policy=TINY._replace(scope=Scope.NONE), card=FREE_OF_CHARGE) as service:
        for user_id in ("u", "v", "w"):
            for chat_id in ("c1", "c2"):
                await start(service, user_id, chat_id)
    # The setting is another one now: of these, only one may run.
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        clock.tick(LEASE + 1)
        # Others' beats between them change nothing.
        keys = [(user_id, chat_id) for chat_id in order for user_id in ("u", "v", "w")]
        answers = await beats.heartbeats(service, keys)
        for (user_id, chat_id), answer in zip(keys, answers, strict=True):
            assert (ChatState.RUNNING if chat_id == order[0] else ChatState.LAPSED) is answer
            assert answer == (await operations.read_chat(service, user_id, chat_id)).state
        assert {clock.now} == beats_at(database_url, keys)
        assert not await audit_lines(service.database)


@pytest.mark.parametrize(("scope", "first"), [("advisor", "running"), ("none", "running"), ("user", "paused")])
async def test_lapsed_clocks_of_several_advisors_all_resume_unless_the_scope_is_the_user(
    database_url: URL, clock: Clock, scope: str, first: str
) -> None:
    async with open_service(database_url, policy=TINY._replace(scope=Scope(scope)), card=FREE_OF_CHARGE) as service:
        for user_id in ("u", "v"):
            await start(service, user_id, "c1", "a1")
        clock.tick(LEASE)  # which is when these lapse
        for user_id in ("u", "v"):
            await start(service, user_id, "c2", "a2")
        clock.tick(LEASE)
        keys = [(user_id, chat_id) for chat_id in ("c1", "c2") for user_id in ("u", "v")]
        answers = await beats.heartbeats(service, keys)
        assert [first, first, "running", "running"] == answers
