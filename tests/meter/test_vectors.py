"""The shared vectors: that the core still makes them, that the reference agrees, and that nothing has gone missing.

The reference lives through whole histories of microseconds, and goes on from readings of real leases that have little
time left. What is left over (long leases at a real scale) is held against arithmetic on the reading's figures, which
knows neither `show` nor `advance`, and all cases against `advance`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache
from typing import Any

import pytest

from talktime.meter.advance import advance
from talktime.meter.reading import Reading, show
from talktime.meter.state import Account, ChatState, StopReason, Tariff
from tests import vectors
from tests.meter import reference
from tests.meter.pair import Pair
from tests.meter.reference import Reference
from tests.vectors import CASES, FILE, Case

REWRITE = "rewrite it with: uv run python -m tests.vectors"

NARROW_US = 2_000
"""How much time the running clocks may have left for the reference to go on from a reading."""

_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")

Json = dict[str, Any]


@cache
def _committed() -> dict[str, Json]:
    """The cases of the file by their names."""
    cases = json.loads(FILE.read_text(), parse_float=Decimal)["cases"]
    return {case["name"]: case for case in cases}


def _content(case: Case) -> Json:
    assert case.name in _committed(), f"{FILE.name} lacks this case; {REWRITE}"
    return _committed()[case.name]


def _us(instant: str) -> int:
    assert len(instant) == len("2026-11-20T19:46:10.123456Z")
    assert instant.endswith("Z")
    return (datetime.fromisoformat(instant) - _EPOCH) // timedelta(microseconds=1)


def _us_or_none(instant: str | None) -> int | None:
    return None if instant is None else _us(instant)


def _micro(number: str | int | Decimal) -> int:
    micro = Decimal(number).scaleb(6)
    assert micro == int(micro)
    return int(micro)


def _parse(body: Json) -> Reading:
    """Read a reading back from its JSON form."""
    tariff = body["tariff"]
    reason = body["stop_reason"]
    return Reading(
        user_id=body["user_id"],
        chat_id=body["chat_id"],
        advisor_id=body["advisor_id"],
        state=ChatState(body["state"]),
        revision=body["revision"],
        as_of=_us(body["as_of"]),
        server_time=_us(body["server_time"]),
        elapsed_us=body["elapsed_us"],
        free_used_us=body["free_used_us"],
        free_left_us=body["free_left_us"],
        credits_used=_micro(body["credits_used"]),
        balance=_micro(body["balance"]),
        tariff=Tariff(
            _micro(tariff["credits_per_minute"]),
            _micro(tariff["first_seconds"]),
            _micro(tariff["increment_seconds"]),
        ),
        count_us=body["count_us"],
        accrues_until=_us_or_none(body["accrues_until"]),
        paid_from=_us_or_none(body["paid_from"]),
        free_until=_us_or_none(body["free_until"]),
        exhausts_at=_us_or_none(body["exhausts_at"]),
        started_at=_us(body["started_at"]),
        stopped_at=_us_or_none(body["stopped_at"]),
        stop_reason=None if reason is None else StopReason(reason),
        materialized_through=_us(body["materialized_through"]),
    )


# What a case has to show: elapsed_us, credits_used, and for a clock that runs alone free_left_us and balance.
Figures = tuple[int, ...]


def _expected(case: Case) -> Iterator[tuple[int, Figures]]:
    """Yield each instant of the file from the reading on, in order of time, with the figures written there."""
    content = _content(case)
    as_of = _us(content["reading"]["as_of"])
    alone = _is_alone(case)
    for shown in content["shown"]:
        at = _us(shown["at"])
        figures = (
            shown["elapsed_us"],
            _micro(shown["credits_used"]),
            shown["free_left_us"],
            _micro(shown["balance"]),
        )
        if at >= as_of:
            yield at, figures if alone else figures[:2]


def _view(case: Case) -> Account:
    account, now = case.play()
    return advance(account, max(now, account.at))


def _is_alone(case: Case) -> bool:
    chats = _view(case).chats.values()
    return not any(chat.state is ChatState.RUNNING for chat in chats if chat.chat_id != case.chat_id)


def _check(case: Case, figures_at: Callable[[int], Figures]) -> None:
    """Hold every figure of the case that is at or after the reading against what somebody else says."""
    expected = dict(_expected(case))
    assert len(expected) > 1
    assert expected == {at: figures_at(at)[: len(figures)] for at, figures in expected.items()}


def _check_against_reference(case: Case, future: Reference) -> None:
    def figures_at(at: int) -> Figures:
        # When the last lease has ended nothing runs any more, and no figure changes: no need to tick through a year.
        leases_end = max(
            (c.last_sign_at + c.lease_us for c in future.chats.values() if c.state == "running"), default=0
        )
        future.advance(min(at, leases_end))
        chat = future.chats[case.chat_id]
        left_us = future.granted[chat.advisor_id] - future.used[chat.advisor_id]
        return chat.elapsed_us, chat.cost, left_us, future.balance

    _check(case, figures_at)


def _time_left_us(case: Case) -> int:
    view = _view(case)
    return max((c.lease_end - view.at for c in view.chats.values() if c.state is ChatState.RUNNING), default=0)


def _named(cases: Sequence[Case], at_least: int) -> pytest.MarkDecorator:
    """Run a test for each of the cases; a kind of check that loses its cases is an error, not a pass."""
    if len(cases) < at_least:
        message = f"only {len(cases)} cases, where {at_least} were meant"
        raise AssertionError(message)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


OF_TICKS = [case for case in CASES if case.settings.lease_us < NARROW_US]
OF_SECONDS = [case for case in CASES if case.settings.lease_us >= NARROW_US]
NARROW = [case for case in OF_SECONDS if 0 < _time_left_us(case) < NARROW_US]
LONE = [case for case in OF_SECONDS if _is_alone(case)]


@_named(OF_TICKS, 310)
def test_the_reference_that_lived_the_same_history_shows_the_same(case: Case) -> None:
    pair = Pair(case.settings, case.card, now=vectors.BASE_US)
    for step in case.steps:
        pair.take(step)
    assert pair.account.chats == case.play()[0].chats
    pair.compare()
    future = pair.reference.copy()
    future.advance(max(pair.now, future.at))
    assert future.at == _us(_content(case)["reading"]["as_of"])
    _check_against_reference(case, future)


@_named(NARROW, 35)
def test_the_reference_that_goes_on_from_the_reading_shows_the_same(case: Case) -> None:
    _check_against_reference(case, _reference_of(_view(case)))


def _reference_of(account: Account) -> Reference:
    """The account's state as the reference has it."""
    same = Reference(account.at)
    same.balance = account.balance
    for advisor_id, allowance in account.allowances.items():
        same.granted[advisor_id] = allowance.granted_us
        same.used[advisor_id] = allowance.used_us
    for chat in account.chats.values():
        same.chats[chat.chat_id] = reference.Chat(
            chat_id=chat.chat_id,
            advisor_id=chat.advisor_id,
            state=chat.state.value,
            tariff=_reference_tariff(chat.tariff),
            count_us=chat.count_us,
            lease_us=chat.lease_us,
            abandon_after_us=chat.abandon_after_us,
            last_sign_at=chat.last_heartbeat_at,
            revision=chat.revision,
            started_at=chat.started_at,
            stopped_at=chat.stopped_at,
            stop_reason=chat.stop_reason,
            elapsed_us=chat.elapsed_us,
            free_us=chat.free_us,
            cost=chat.cost,
            open_started_at=chat.opened_at,
            open_count=chat.opened_count_us,
            open_free_us=0,  # only closed segments show it
            start_key=chat.start_key,
        )
    return same


def _reference_tariff(tariff: Tariff) -> reference.Tariff:
    return reference.Tariff(tariff.rate, tariff.first_us, tariff.increment_us)


@_named(LONE, 90)
def test_a_clock_that_runs_alone_follows_from_its_figures(case: Case) -> None:
    view = _view(case)
    chat = view.chats[case.chat_id]
    tariff = _reference_tariff(chat.tariff)
    left_us = view.allowances[chat.advisor_id].left_us
    lease_us = chat.lease_end - view.at if chat.state is ChatState.RUNNING else 0

    def price(paid_us: int) -> int:
        return tariff.cost(chat.count_us + paid_us) - tariff.cost(chat.count_us)

    def figures_at(at: int) -> Figures:
        ticks = min(at - view.at, lease_us)
        free_us = min(ticks, left_us)
        paid_us = ticks - free_us
        if price(paid_us) > view.balance:
            paid_us = bisect_right(range(paid_us), view.balance, key=price) - 1
        spent = price(paid_us)
        return chat.elapsed_us + free_us + paid_us, chat.cost + spent, left_us - free_us, view.balance - spent

    _check(case, figures_at)


@_named(CASES, 450)
def test_advance_shows_the_same(case: Case) -> None:
    account, _ = case.play()

    def figures_at(at: int) -> Figures:
        then = advance(account, at)
        chat = then.chats[case.chat_id]
        return chat.elapsed_us, chat.cost, then.allowances[chat.advisor_id].left_us, then.balance

    _check(case, figures_at)


@_named(CASES, 450)
def test_before_the_reading_its_own_figures_are_shown(case: Case) -> None:
    content = _content(case)
    reading = content["reading"]
    earlier = [shown for shown in content["shown"] if shown["at"] < reading["as_of"]]
    assert len(earlier) >= 2
    for shown in earlier:
        names = ("elapsed_us", "free_left_us", "credits_used", "balance")
        assert [reading[name] for name in names] == [shown[name] for name in names]


@_named(CASES, 450)
def test_the_json_form_of_a_reading_is_enough_to_go_on_from(case: Case) -> None:
    content = _content(case)
    reading = _parse(content["reading"])
    assert case.read() == reading
    assert reading.accruing == content["reading"]["accruing"]
    assert case.heartbeat_us == _micro(content["reading"]["heartbeat_seconds"])
    for expected in content["shown"]:
        shown = show(reading, _us(expected["at"]))
        assert (
            expected["elapsed_us"],
            expected["free_left_us"],
            _micro(expected["credits_used"]),
            _micro(expected["balance"]),
        ) == (shown.elapsed_us, shown.free_left_us, shown.credits_used, shown.balance), expected["at"]


def test_the_file_is_what_the_core_makes_now() -> None:
    content, _ = vectors.make()
    # Compared outside of the assertion: its explanation would print a megabyte.
    same = FILE.exists() and FILE.read_bytes() == content
    assert same, f"{FILE} is not what the core makes now; if the change is meant, {REWRITE}"


def test_names_are_unique_and_say_all_that_is_in_the_file() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert names == list(_committed())


def test_the_figures_of_two_segments_with_free_time_worked_out_by_hand() -> None:
    # 12 credits a minute by 60/6, 2 units (0.75 s) free, 4.125003 s until a pause, then on from 11.25 s until the
    # lease ends 15 s later. 18.375003 s are paid: the first minute, 12 credits, is bought once and not used up.
    content = _committed()[
        "a second segment in one count, at 12.000000 a minute by 60000000/6000000 us, a lease of 15000000 us"
    ]
    last = content["shown"][-1]
    assert content["reading"]["accrues_until"] == "2026-11-20T19:46:26.250000Z"
    assert (19_125_003, "12.000000") == (last["elapsed_us"], last["credits_used"])


STATES = {"running": 380, "lapsed": 5, "paused": 5, "exhausted": 10, "abandoned": 5, "ended": 10}

BOUNDARIES = {
    "as_of": 450,
    "paid_from": 300,
    "paid_from, free until then": 90,
    "free_until": 160,
    "free_until, within the lease": 90,
    "accrues_until": 380,
    "accrues_until, where the lease ends": 300,
    "accrues_until, where credits end": 65,
    "exhausts_at": 360,
    "exhausts_at, beyond the lease": 290,
    "stopped_at": 55,
    "block edge": 105,
    "block edge, within the lease": 100,
}
"""How many cases show the boundary from both sides: one microsecond before, at, and one after."""


def _boundaries(content: Json) -> Iterator[tuple[str, int]]:
    """Yield the names and instants of all that can happen in a case, from its JSON alone."""
    reading = _parse(content["reading"])
    for name in ("as_of", "paid_from", "free_until", "accrues_until", "exhausts_at", "stopped_at"):
        at = getattr(reading, name)
        if at is not None:
            yield name, at
    until, paid_from = reading.accrues_until, reading.paid_from
    if until is None:
        return
    if paid_from is not None and paid_from > reading.as_of:
        yield "paid_from, free until then", paid_from
    if reading.free_until is not None and reading.free_until < until:
        yield "free_until, within the lease", reading.free_until
    yield f"accrues_until, where {'credits end' if until == reading.exhausts_at else 'the lease ends'}", until
    if reading.exhausts_at is not None and reading.exhausts_at > until:
        yield "exhausts_at, beyond the lease", reading.exhausts_at
    for at in _block_edges(reading, content):
        yield "block edge", at
        if at < until:
            yield "block edge, within the lease", at


def _block_edges(reading: Reading, content: Json) -> Iterator[int]:
    if reading.paid_from is None or reading.accrues_until is None:
        return
    tariff = _reference_tariff(reading.tariff)
    for shown in content["shown"]:
        at = _us(shown["at"])
        paid_us = reading.count_us + at - reading.paid_from
        # The paid time until this instant fills its blocks, and the next tick opens another.
        is_edge = 0 < paid_us == tariff.blocks(paid_us) and (
            paid_us == tariff.first_us or tariff.blocks(paid_us + 1) > paid_us + 1
        )
        if is_edge and reading.paid_from < at <= reading.accrues_until:
            yield at


def test_every_boundary_is_shown_from_both_sides() -> None:
    found: Counter[str] = Counter()
    for content in _committed().values():
        instants = {_us(shown["at"]) for shown in content["shown"]}
        found.update({name for name, at in _boundaries(content) if {at - 1, at, at + 1} <= instants})
    assert {} == {name: found[name] for name, least in BOUNDARIES.items() if found[name] < least}


def test_every_state_is_there_and_so_is_every_reason() -> None:
    readings = [content["reading"] for content in _committed().values()]
    states = Counter(reading["state"] for reading in readings)
    assert set(STATES) == {state.value for state in ChatState} == set(states)
    assert {} == {state: states[state] for state, least in STATES.items() if states[state] < least}
    assert {None, *(reason.value for reason in StopReason)} == {reading["stop_reason"] for reading in readings}


SITUATIONS: dict[str, tuple[int, Callable[[Json], bool]]] = {
    "far beyond, a day at least": (
        450,
        lambda case: _us(case["shown"][-1]["at"]) >= _us(case["reading"]["as_of"]) + 86_400_000_000,
    ),
    "shown in the year 9999": (150, lambda case: case["shown"][-1]["at"].startswith("9999-")),
    "a clock that stepped back": (25, lambda case: case["reading"]["server_time"] < case["reading"]["as_of"]),
    "not materialized for a while": (
        380,
        lambda case: case["reading"]["materialized_through"] < case["reading"]["as_of"],
    ),
    "a refused start": (5, lambda case: case["reading"]["state"] == "exhausted" and not case["reading"]["elapsed_us"]),
    "free of charge": (20, lambda case: case["reading"]["tariff"]["credits_per_minute"] == "0.000000"),
    "next to free": (30, lambda case: case["reading"]["tariff"]["credits_per_minute"] == "0.000001"),
    "the highest rate": (18, lambda case: case["reading"]["tariff"]["credits_per_minute"] == "1000000.000000"),
    "fractions of a second in blocks": (
        140,
        lambda case: isinstance(case["reading"]["tariff"]["first_seconds"], Decimal),
    ),
    "fractions of a second between heartbeats": (
        280,
        lambda case: isinstance(case["reading"]["heartbeat_seconds"], Decimal),
    ),
    "balance runs down to zero": (
        65,
        lambda case: (
            case["reading"]["balance"] != "0.000000" and any(s["balance"] == "0.000000" for s in case["shown"])
        ),
    ),
    "balance of zero while it runs": (
        100,
        lambda case: case["reading"]["accruing"] and case["reading"]["balance"] == "0.000000",
    ),
    "credits used beyond 2^53": (10, lambda case: any(_micro(s["credits_used"]) > 1 << 53 for s in case["shown"])),
    "credits used, odd and beyond 2^53": (
        5,
        lambda case: any(_micro(s["credits_used"]) > 1 << 53 and _micro(s["credits_used"]) % 2 for s in case["shown"]),
    ),
    "balance beyond 2^53": (8, lambda case: _micro(case["reading"]["balance"]) > 1 << 53),
    "credits that never end": (20, lambda case: case["reading"]["accruing"] and case["reading"]["exhausts_at"] is None),
    "credits that end in another century": (2, lambda case: (case["reading"]["exhausts_at"] or "") > "2100"),
    "a count that goes on": (190, lambda case: case["reading"]["accruing"] and case["reading"]["count_us"] > 0),
    "more used than the present count has cost": (
        12,
        lambda case: _micro(case["reading"]["credits_used"]) > _cost_of_count(case["reading"]),
    ),
    "free time that a shown instant uses up": (
        140,
        lambda case: case["reading"]["free_left_us"] > 0 and any(s["free_left_us"] == 0 for s in case["shown"]),
    ),
}


def _cost_of_count(body: Json) -> int:
    return _parse(body).tariff.cost(body["count_us"])


def test_every_situation_is_there() -> None:
    cases = _committed().values()
    found = {name: sum(holds(case) for case in cases) for name, (_, holds) in SITUATIONS.items()}
    assert {} == {name: found[name] for name, (least, _) in SITUATIONS.items() if found[name] < least}


def test_every_pair_of_blocks_is_there() -> None:
    found = {
        (case["reading"]["tariff"]["first_seconds"], case["reading"]["tariff"]["increment_seconds"])
        for case in _committed().values()
        if case["reading"]["accruing"]
    }
    blocks: set[tuple[int | Decimal, int | Decimal]] = {(0, 0), (60, 60), (60, 6), (1, 1), (30, 0), (86_400, 86_400)}
    assert blocks | {(Decimal("0.5"), Decimal("0.25"))} <= found


def test_several_chats_run_in_parallel_and_share() -> None:
    parallel = [case for case in CASES if not _is_alone(case) and _content(case)["reading"]["accruing"]]
    assert len(parallel) >= 30
    assert len([case for case in parallel if case in OF_SECONDS]) >= 5


def test_the_file_stays_small_and_holds_enough() -> None:
    assert len(_committed()) >= 450
    assert sum(len(content["shown"]) for content in _committed().values()) >= 5_000
    assert FILE.stat().st_size < 1_500_000
