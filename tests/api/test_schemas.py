"""How values are written: exact, in one form, whatever they are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from talktime.api.schemas import (
    JsonResponse,
    account_answer,
    advisor_answer,
    format_instant,
    ledger_entry_body,
    reading_body,
    segment_body,
)
from talktime.meter.reading import AccountReading, Reading
from talktime.meter.state import ChatState, RateCard, StopReason, Tariff
from talktime.meter.units import END_OF_TIME_US, MICRO
from talktime.operations import SegmentView
from talktime.store.ledger import LedgerEntry

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _at(text: str) -> int:
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)


def _json(content: object) -> str:
    return JsonResponse(content).render(content, "application/json").decode()


# A reading as clients see it, in full.
READING = Reading(
    user_id="u1",
    chat_id="c1",
    advisor_id="a1",
    state=ChatState.RUNNING,
    revision=3,
    as_of=_at("2026-11-20T19:46:10.123456Z"),
    server_time=_at("2026-11-20T19:46:10.123456Z"),
    elapsed_us=10_123_456,
    free_used_us=10_123_456,
    free_left_us=169_876_544,
    credits_used=0,
    balance=25 * MICRO,
    tariff=Tariff(1_500_000),
    count_us=0,
    accrues_until=_at("2026-11-20T19:46:20.100000Z"),
    paid_from=None,
    free_until=_at("2026-11-20T19:49:00.000000Z"),
    exhausts_at=_at("2026-11-20T20:05:40.000000Z"),
    started_at=_at("2026-11-20T19:46:00.000000Z"),
    stopped_at=None,
    stop_reason=None,
    materialized_through=_at("2026-11-20T19:46:00.500000Z"),
)
READING_TEXT = (
    '{"user_id":"u1","chat_id":"c1","advisor_id":"a1","state":"running","accruing":true,"revision":3,'
    '"as_of":"2026-11-20T19:46:10.123456Z","server_time":"2026-11-20T19:46:10.123456Z",'
    '"elapsed_us":10123456,"free_used_us":10123456,"free_left_us":169876544,'
    '"credits_used":"0.000000","balance":"25.000000",'
    '"tariff":{"credits_per_minute":"1.500000","first_seconds":0,"increment_seconds":0},"count_us":0,'
    '"accrues_until":"2026-11-20T19:46:20.100000Z","paid_from":null,'
    '"free_until":"2026-11-20T19:49:00.000000Z","exhausts_at":"2026-11-20T20:05:40.000000Z",'
    '"started_at":"2026-11-20T19:46:00.000000Z","stopped_at":null,"stop_reason":null,'
    '"materialized_through":"2026-11-20T19:46:00.500000Z","heartbeat_seconds":5}'
)
READING_JSON: Any = msgspec.json.decode(READING_TEXT)


def test_a_reading_is_written_with_all_its_fields() -> None:
    assert _json(reading_body(READING, 5 * MICRO)) == READING_TEXT


def test_a_clock_that_stands_says_why() -> None:
    stopped = READING._replace(state=ChatState.PAUSED, stopped_at=READING.as_of, stop_reason=StopReason.SWITCHED)
    written = msgspec.json.decode(_json(reading_body(stopped, 5 * MICRO)))

    assert (written["state"], written["accruing"], written["stop_reason"]) == ("paused", False, "switched")
    assert written["stopped_at"] == "2026-11-20T19:46:10.123456Z"


@given(st.integers(0, END_OF_TIME_US))
def test_instants_have_microseconds_and_z(at: int) -> None:
    written = format_instant(at)

    assert (at, len("2026-11-20T19:46:10.123456Z")) == (_at(written), len(written))


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0"),
        (1, "0.000001"),
        (100_000, "0.1"),
        (5 * MICRO, "5"),
        (60_500_000, "60.5"),
        (86_399_999_999, "86399.999999"),
    ],
)
def test_seconds_are_exact_json_numbers(us: int, text: str) -> None:
    card = RateCard(Tariff(1_500_000, us, us), us)

    assert (
        f'{{"advisor_id":"a1","credits_per_minute":"1.500000","free_seconds":{text},"first_seconds":{text},'
        f'"increment_seconds":{text},"default":true}}'
    ) == _json(advisor_answer("a1", card, default=True))


@given(st.integers(0, 31_536_000 * MICRO))
def test_no_float_lies_between_a_value_and_its_number(us: int) -> None:
    text = _json(advisor_answer("a1", RateCard(Tariff(0), us), default=False))
    number = text.split('"free_seconds":')[1].split(",")[0]

    assert Decimal(us) / MICRO == Decimal(number)
    assert "E" not in number


def test_an_account_holds_the_readings_of_its_running_chats() -> None:
    account = AccountReading(
        user_id="u1",
        as_of=READING.as_of,
        server_time=READING.server_time,
        balance=25 * MICRO,
        accrued=1,
        running=(READING,),
        exhausts_at=None,
        materialized_through=READING.materialized_through,
    )

    assert msgspec.json.decode(_json(account_answer(account, 5 * MICRO))) == {
        "user_id": "u1",
        "as_of": "2026-11-20T19:46:10.123456Z",
        "server_time": "2026-11-20T19:46:10.123456Z",
        "balance": "25.000000",
        "accrued": "0.000001",
        "running": [READING_JSON],
        "exhausts_at": None,
        "materialized_through": "2026-11-20T19:46:00.500000Z",
    }


def test_a_ledger_entry_is_signed_and_keeps_its_key_to_itself() -> None:
    entry = LedgerEntry(
        user_id="u1",
        number=7,
        kind="charge",
        amount=-1_500_001,
        balance_after=-1,
        happened_at=READING.as_of,
        recorded_at=READING.as_of,
        memo="",
        idempotency_key="secret",
        request_hash=b"secret",
        chat_id="c1",
        segment_started_at=READING.started_at,
    )

    assert msgspec.json.decode(_json(ledger_entry_body(entry))) == {
        "number": 7,
        "kind": "charge",
        "amount": "-1.500001",
        "balance_after": "-0.000001",
        "happened_at": "2026-11-20T19:46:10.123456Z",
        "recorded_at": "2026-11-20T19:46:10.123456Z",
        "memo": "",
        "chat_id": "c1",
        "segment_started_at": "2026-11-20T19:46:00.000000Z",
    }


def test_an_open_segment_has_no_end_yet() -> None:
    segment = SegmentView(
        started_at=READING.started_at,
        ended_at=None,
        stop_reason=None,
        elapsed_us=5,
        free_us=2,
        paid_us=3,
        cost=4,
        tariff=Tariff(60 * MICRO, 60 * MICRO, 6 * MICRO),
    )

    assert msgspec.json.decode(_json(segment_body(segment))) == {
        "started_at": "2026-11-20T19:46:00.000000Z",
        "ended_at": None,
        "stop_reason": None,
        "elapsed_us": 5,
        "free_us": 2,
        "paid_us": 3,
        "cost": "0.000004",
        "tariff": {"credits_per_minute": "60.000000", "first_seconds": 60, "increment_seconds": 6},
    }
