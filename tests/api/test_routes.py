"""Each route over a real socket and a real database, with answers worked out by hand.

The clock is simulated and begins at 2026-01-01T00:00:00Z, except where a test says otherwise.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest
from httpx import AsyncClient
from psycopg import sql
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime.api.params import write_cursor
from talktime.store import tables
from talktime.store.database import Database
from tests.api.requests import CHAT, START, Json, problem_of
from tests.api.server import json_of, serving
from tests.database import Clock, Databases, connect
from tests.support import S

ONE_A_SECOND = {"credits_per_minute": "60", "free_seconds": 2}
ONE_A_SECOND_JSON = {"credits_per_minute": "60.000000", "first_seconds": 0, "increment_seconds": 0}


def at(clock: str) -> str:
    """Write an instant of the first simulated day."""
    return f"2026-01-01T{clock}Z"


BEGIN = at("00:00:00.000000")


@pytest.fixture
async def client(database_url: URL, clock: Clock) -> AsyncIterator[AsyncClient]:
    """The API with default settings, on simulated time."""
    async with serving(database_url) as client:
        yield client


async def put_card(client: AsyncClient, advisor_id: str = "a1", **card: Json) -> None:
    json_of(await client.put(f"/v1/advisors/{advisor_id}", json={**ONE_A_SECOND, **card}))


async def add(client: AsyncClient, amount: str, key: str = "first", user_id: str = "u1") -> Json:
    body = {"kind": "purchase", "amount": amount}
    headers = {"Idempotency-Key": key}
    return json_of(await client.post(f"/v1/users/{user_id}/credits", headers=headers, json=body), 201)


async def start(client: AsyncClient, chat_id: str = "c1", advisor_id: str = "a1", key: str | None = None) -> Json:
    headers = {} if key is None else {"Idempotency-Key": key}
    path = f"/v1/users/u1/chats/{chat_id}/start"
    return json_of(await client.post(path, headers=headers, json={"advisor_id": advisor_id}))


async def command(client: AsyncClient, name: str) -> Json:
    return json_of(await client.post(f"{CHAT}/{name}"))


async def get(client: AsyncClient, path: str, **query: str | int) -> Json:
    return json_of(await client.get(path, params=query))


async def pages(client: AsyncClient, path: str, **query: str | int) -> list[list[Json]]:
    """Turn the pages of a list from the first to the last."""
    found = []
    cursor: dict[str, str] = {}
    while True:
        page = await get(client, path, **query, **cursor)
        assert {"items", "next"} == set(page)
        found.append(page["items"])
        if page["next"] is None:
            return found
        cursor = {"cursor": page["next"]}


def stored(url: URL) -> dict[str, list[str]]:
    """Return all rows of all tables, so their counts too."""
    with connect(url) as connection:
        return {
            table.name: [
                row
                for (row,) in connection.execute(
                    sql.SQL("SELECT t::text FROM {} t ORDER BY 1").format(sql.Identifier(table.name))
                )
            ]
            for table in tables.metadata.sorted_tables
        }


def without(reading: Json, *names: str) -> Json:
    assert set(names) <= set(reading)
    return {name: value for name, value in reading.items() if name not in names}


# --- advisors ---------------------------------------------------------------------------------------------------------


async def test_an_advisor_has_the_default_card_until_it_is_given_one(client: AsyncClient) -> None:
    default = {
        "advisor_id": "a1",
        "credits_per_minute": "1.000000",
        "free_seconds": 180,
        "first_seconds": 0,
        "increment_seconds": 0,
        "default": True,
    }
    assert default == await get(client, "/v1/advisors/a1")

    card = {"credits_per_minute": "1.5", "free_seconds": 30.000001, "first_seconds": 60, "increment_seconds": 0.5}
    first = {"advisor_id": "a1", **card, "credits_per_minute": "1.500000", "default": False}
    assert first == json_of(await client.put("/v1/advisors/a1", json=card))
    assert first == await get(client, "/v1/advisors/a1")

    card = {"credits_per_minute": "0", "free_seconds": 0}
    second = {**default, **card, "credits_per_minute": "0.000000", "default": False}
    assert second == json_of(await client.put("/v1/advisors/a1", json=card))
    assert second == await get(client, "/v1/advisors/a1")
    assert {**default, "advisor_id": "a2"} == await get(client, "/v1/advisors/a2")


async def test_a_new_card_holds_from_the_next_segment_on(client: AsyncClient, clock: Clock) -> None:
    await put_card(client, free_seconds=0)
    await add(client, "100")
    await start(client)
    clock.tick(1 * S)
    await put_card(client, free_seconds=3600, credits_per_minute="120")
    clock.tick(1 * S)
    assert "2.000000" == (await command(client, "pause"))["credits_used"]
    reading = await start(client)
    assert ("120.000000", 0) == (reading["tariff"]["credits_per_minute"], reading["free_left_us"])
    clock.tick(1 * S)
    assert "4.000000" == (await get(client, CHAT))["credits_used"]


# --- credits ----------------------------------------------------------------------------------------------------------

CREDITS = [  # kind, amount as sent, amount and balance as answered
    ("purchase", "25", "25.000000", "25.000000"),
    ("grant", "1.5", "1.500000", "26.500000"),
    ("compensation", "0.000001", "0.000001", "26.500001"),
    ("refund", "5", "-5.000000", "21.500001"),
    ("correction", "1.00", "-1.000000", "20.500001"),
]


async def test_credits_of_every_kind_are_entered_once_however_often_they_are_sent(
    client: AsyncClient, clock: Clock, database_url: URL
) -> None:
    answers: list[Json] = []
    for number, (kind, amount, signed, balance) in enumerate(CREDITS, 1):
        body = {"kind": kind, "amount": amount, "memo": f"Nr. {number}, \u20ac"}
        headers = {"Idempotency-Key": f"key of {kind}"}
        answer = json_of(await client.post("/v1/users/u1/credits", headers=headers, json=body), 201)
        assert answer == {
            "number": number,
            "kind": kind,
            "amount": signed,
            "balance_after": balance,
            "happened_at": at(f"00:00:0{number - 1}.000000"),
            "recorded_at": at(f"00:00:0{number - 1}.000000"),
            "memo": f"Nr. {number}, \u20ac",
            "chat_id": None,
            "segment_started_at": None,
        }
        answers.insert(0, answer)
        clock.tick(1 * S)
    before = stored(database_url)
    for number, (kind, amount, _, _) in enumerate(CREDITS, 1):
        body = {"kind": kind, "amount": amount, "memo": f"Nr. {number}, \u20ac"}
        headers = {"Idempotency-Key": f"key of {kind}"}
        again = json_of(await client.post("/v1/users/u1/credits", headers=headers, json=body), 201)
        assert answers[-number] == again
    assert before == stored(database_url)
    assert {"items": answers, "next": None} == await get(client, "/v1/users/u1/ledger")
    assert "20.500001" == (await get(client, "/v1/users/u1/account"))["balance"]


async def test_a_credit_that_is_sent_many_times_at_once_is_one_entry(client: AsyncClient) -> None:
    answers = await asyncio.gather(*(add(client, "25") for _ in range(20)))
    assert all(answers[0] == answer for answer in answers)
    assert {"items": [answers[0]], "next": None} == await get(client, "/v1/users/u1/ledger")


async def test_a_key_belongs_to_one_request_of_one_user(client: AsyncClient, database_url: URL) -> None:
    first = await add(client, "25")
    other_user = await add(client, "7", user_id="u2")
    assert ("7.000000", 1) == (other_user["balance_after"], other_user["number"])
    before = stored(database_url)
    right = {"kind": "purchase", "amount": "25", "memo": ""}
    for change in ({"kind": "grant"}, {"amount": "25.000001"}, {"memo": "x"}):
        response = await client.post(
            "/v1/users/u1/credits", headers={"Idempotency-Key": "first"}, json={**right, **change}
        )
        problem_of(response, 422, "idempotency-key-reused")
    assert first == await add(client, "25.00")
    assert before == stored(database_url)


@pytest.mark.parametrize("kind", ["refund", "correction"])
async def test_no_more_is_taken_than_is_left_after_what_is_accrued(
    client: AsyncClient, clock: Clock, kind: str
) -> None:
    await put_card(client, free_seconds=0)
    await add(client, "5")
    await start(client)
    clock.tick(3 * S)
    too_much, all_of_it = [{"kind": kind, "amount": amount} for amount in ("2.000001", "2")]
    headers = {"Idempotency-Key": "taken"}
    problem = problem_of(
        await client.post("/v1/users/u1/credits", headers=headers, json=too_much), 409, "insufficient-balance"
    )
    assert "2.000000" in problem["detail"]
    # What was refused did not use up its key.
    taken = json_of(await client.post("/v1/users/u1/credits", headers=headers, json=all_of_it), 201)
    assert "-2.000000" == taken["amount"]
    reading = await get(client, CHAT)
    assert ("exhausted", "0.000000", 3 * S) == (reading["state"], reading["balance"], reading["elapsed_us"])


# --- start and the reading --------------------------------------------------------------------------------------------


async def test_a_reading_with_all_its_fields_comes_out_exactly(client: AsyncClient, clock: Clock) -> None:
    begin = int(datetime(2026, 11, 20, 19, 46, tzinfo=UTC).timestamp()) * S
    clock.set(begin)
    await put_card(client, credits_per_minute="1.5", free_seconds=180)
    await add(client, "25")
    await start(client)
    await start(client)
    clock.set(begin + 500_000)
    await start(client)
    clock.set(begin + 5_100_000)
    await command(client, "heartbeat")
    clock.set(begin + 10_123_456)
    expected = {
        "user_id": "u1",
        "chat_id": "c1",
        "advisor_id": "a1",
        "state": "running",
        "accruing": True,
        "revision": 3,
        "as_of": "2026-11-20T19:46:10.123456Z",
        "server_time": "2026-11-20T19:46:10.123456Z",
        "elapsed_us": 10123456,
        "free_used_us": 10123456,
        "free_left_us": 169876544,
        "credits_used": "0.000000",
        "balance": "25.000000",
        "tariff": {"credits_per_minute": "1.500000", "first_seconds": 0, "increment_seconds": 0},
        "count_us": 0,
        "accrues_until": "2026-11-20T19:46:20.100000Z",
        "paid_from": None,
        "free_until": "2026-11-20T19:49:00.000000Z",
        "exhausts_at": "2026-11-20T20:05:40.000000Z",
        "started_at": "2026-11-20T19:46:00.000000Z",
        "stopped_at": None,
        "stop_reason": None,
        "materialized_through": "2026-11-20T19:46:00.500000Z",
        "heartbeat_seconds": 5,
    }
    assert expected == await get(client, CHAT)


async def test_a_start_for_an_unknown_user_makes_the_account_and_uses_free_time(client: AsyncClient) -> None:
    problem_of(await client.get("/v1/users/u1/account"), 404, "user-not-found")
    reading = await start(client)
    assert reading == {
        "user_id": "u1",
        "chat_id": "c1",
        "advisor_id": "a1",
        "state": "running",
        "accruing": True,
        "revision": 1,
        "as_of": BEGIN,
        "server_time": BEGIN,
        "elapsed_us": 0,
        "free_used_us": 0,
        "free_left_us": 180_000_000,
        "credits_used": "0.000000",
        "balance": "0.000000",
        "tariff": {"credits_per_minute": "1.000000", "first_seconds": 0, "increment_seconds": 0},
        "count_us": 0,
        "accrues_until": at("00:00:15.000000"),
        "paid_from": None,
        "free_until": at("00:03:00.000000"),
        "exhausts_at": at("00:03:00.000000"),
        "started_at": BEGIN,
        "stopped_at": None,
        "stop_reason": None,
        "materialized_through": BEGIN,
        "heartbeat_seconds": 5,
    }
    assert "0.000000" == (await get(client, "/v1/users/u1/account"))["balance"]


async def test_settings_reach_what_is_read(database_url: URL, clock: Clock) -> None:
    variables = {
        "TALKTIME_LEASE_SECONDS": "4",
        "TALKTIME_HEARTBEAT_SECONDS": "1.5",
        "TALKTIME_ABANDON_AFTER_SECONDS": "7",
        "TALKTIME_FREE_SECONDS": "0",
        "TALKTIME_CREDITS_PER_MINUTE": "60",
        "TALKTIME_EXCLUSIVE": "none",
    }
    async with serving(database_url, **variables) as client:
        await add(client, "100")
        reading = await start(client)
        assert (1.5, at("00:00:04.000000")) == (reading["heartbeat_seconds"], reading["accrues_until"])
        await start(client, "c2")
        clock.tick(4 * S)
        assert ["lapsed", "lapsed"] == [item["state"] for item in (await get(client, "/v1/users/u1/chats"))["items"]]
        assert "92.000000" == (await get(client, "/v1/users/u1/account"))["balance"]
        clock.tick(3 * S)
        assert "abandoned" == (await get(client, CHAT))["state"]


async def test_a_start_without_credits_and_free_time_is_told_that_it_does_not_run(client: AsyncClient) -> None:
    await put_card(client, free_seconds=0)
    reading = await start(client)
    assert reading == {
        "user_id": "u1",
        "chat_id": "c1",
        "advisor_id": "a1",
        "state": "exhausted",
        "accruing": False,
        "revision": 1,
        "as_of": BEGIN,
        "server_time": BEGIN,
        "elapsed_us": 0,
        "free_used_us": 0,
        "free_left_us": 0,
        "credits_used": "0.000000",
        "balance": "0.000000",
        "tariff": ONE_A_SECOND_JSON,
        "count_us": 0,
        "accrues_until": None,
        "paid_from": None,
        "free_until": None,
        "exhausts_at": None,
        "started_at": BEGIN,
        "stopped_at": BEGIN,
        "stop_reason": "exhausted",
        "materialized_through": BEGIN,
        "heartbeat_seconds": 5,
    }
    assert {"items": [], "next": None} == await get(client, f"{CHAT}/segments")


async def test_a_repeated_start_is_a_heartbeat(client: AsyncClient, clock: Clock) -> None:
    first = await start(client)
    clock.tick(10 * S)
    again = await start(client)
    assert again == {
        **first,
        "revision": 2,
        "as_of": at("00:00:10.000000"),
        "server_time": at("00:00:10.000000"),
        "elapsed_us": 10_000_000,
        "free_used_us": 10_000_000,
        "free_left_us": 170_000_000,
        "accrues_until": at("00:00:25.000000"),
        "materialized_through": at("00:00:10.000000"),
    }
    assert 1 == len((await get(client, f"{CHAT}/segments"))["items"])


async def test_a_delayed_duplicate_of_a_start_does_not_restart_a_paused_clock(
    client: AsyncClient, clock: Clock
) -> None:
    await start(client, key="k1")
    clock.tick(2 * S)
    paused = await command(client, "pause")
    clock.tick(1 * S)
    duplicate = await start(client, key="k1")
    passing = ("as_of", "server_time", "materialized_through")
    assert ("paused", 2) == (duplicate["state"], duplicate["revision"])
    assert without(paused, *passing) == without(duplicate, *passing)
    response = await client.post(f"{CHAT}/start", headers={"Idempotency-Key": "k1"}, json={"advisor_id": "a2"})
    problem_of(response, 422, "idempotency-key-reused")
    assert ("running", 3) == ((fresh := await start(client, key="k2"))["state"], fresh["revision"])


async def test_a_chat_stays_with_its_advisor(client: AsyncClient) -> None:
    reading = await start(client)
    problem_of(await client.post(f"{CHAT}/start", json={"advisor_id": "a2"}), 409, "wrong-advisor")
    assert reading == await get(client, CHAT)


async def test_a_start_pauses_the_other_chat_with_the_advisor_at_the_same_instant(
    client: AsyncClient, clock: Clock
) -> None:
    await start(client)
    clock.tick(3 * S)
    await start(client, "c2")
    clock.tick(1 * S)
    first, second = await get(client, CHAT), await get(client, "/v1/users/u1/chats/c2")
    assert ("paused", "switched", at("00:00:03.000000"), 3_000_000) == (
        first["state"],
        first["stop_reason"],
        first["stopped_at"],
        first["elapsed_us"],
    )
    assert (at("00:00:03.000000"), 1_000_000, 176_000_000) == (
        second["started_at"],
        second["elapsed_us"],
        second["free_left_us"],
    )


# --- heartbeat --------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_renews_the_lease_and_resumes_a_lapsed_chat_without_billing_the_gap(
    client: AsyncClient, clock: Clock
) -> None:
    await put_card(client)
    await add(client, "25")
    await start(client)
    clock.tick(10 * S)
    beat = await command(client, "heartbeat")
    assert beat == {
        "user_id": "u1",
        "chat_id": "c1",
        "advisor_id": "a1",
        "state": "running",
        "accruing": True,
        "revision": 1,
        "as_of": at("00:00:10.000000"),
        "server_time": at("00:00:10.000000"),
        "elapsed_us": 10_000_000,
        "free_used_us": 2_000_000,
        "free_left_us": 0,
        "credits_used": "8.000000",
        "balance": "17.000000",
        "tariff": ONE_A_SECOND_JSON,
        "count_us": 8_000_000,
        "accrues_until": at("00:00:25.000000"),
        "paid_from": at("00:00:10.000000"),
        "free_until": None,
        "exhausts_at": at("00:00:27.000000"),
        "started_at": BEGIN,
        "stopped_at": None,
        "stop_reason": None,
        "materialized_through": BEGIN,
        "heartbeat_seconds": 5,
    }
    clock.tick(20 * S)
    lapsed = await get(client, CHAT)
    assert lapsed == {
        **beat,
        "state": "lapsed",
        "accruing": False,
        "as_of": at("00:00:30.000000"),
        "server_time": at("00:00:30.000000"),
        "elapsed_us": 25_000_000,
        "credits_used": "23.000000",
        "balance": "2.000000",
        "count_us": 23_000_000,
        "accrues_until": None,
        "paid_from": None,
        "exhausts_at": None,
        "stopped_at": at("00:00:25.000000"),
        "stop_reason": "lapsed",
    }
    assert await command(client, "heartbeat") == {
        **lapsed,
        "state": "running",
        "accruing": True,
        "revision": 2,
        "accrues_until": at("00:00:32.000000"),
        "paid_from": at("00:00:30.000000"),
        "exhausts_at": at("00:00:32.000000"),
        "stopped_at": None,
        "stop_reason": None,
        "materialized_through": at("00:00:30.000000"),
    }


async def test_a_heartbeat_of_a_paused_chat_is_a_sign_of_life_and_no_more(client: AsyncClient, clock: Clock) -> None:
    await start(client)
    clock.tick(1 * S)
    await command(client, "pause")
    clock.tick(299 * S)
    beat = await command(client, "heartbeat")
    assert ("paused", 1_000_000, 3) == (beat["state"], beat["elapsed_us"], beat["revision"])
    clock.tick(299 * S)
    assert "paused" == (await get(client, CHAT))["state"]
    clock.tick(1 * S)
    assert "abandoned" == (await get(client, CHAT))["state"]


async def test_a_heartbeat_of_an_abandoned_chat_is_refused_with_its_reading(client: AsyncClient, clock: Clock) -> None:
    first = await start(client)
    clock.tick(300 * S)
    problem = problem_of(await client.post(f"{CHAT}/heartbeat"), 409, "chat-not-active")
    assert problem["reading"] == {
        **first,
        "state": "abandoned",
        "accruing": False,
        "as_of": at("00:05:00.000000"),
        "server_time": at("00:05:00.000000"),
        "elapsed_us": 15_000_000,
        "free_used_us": 15_000_000,
        "free_left_us": 165_000_000,
        "accrues_until": None,
        "free_until": None,
        "exhausts_at": None,
        "stopped_at": at("00:00:15.000000"),
        "stop_reason": "lapsed",
    }
    assert problem["reading"] == await get(client, CHAT)
    # A pause is answered, and a start goes on.
    assert problem["reading"] == {**await command(client, "pause"), "materialized_through": BEGIN}
    assert (True, 15_000_000) == ((reading := await start(client))["accruing"], reading["elapsed_us"])


async def test_a_heartbeat_of_an_ended_chat_is_refused_with_its_reading(client: AsyncClient, clock: Clock) -> None:
    await start(client)
    clock.tick(2 * S)
    ended = await command(client, "stop")
    problem = problem_of(await client.post(f"{CHAT}/heartbeat"), 409, "chat-not-active")
    assert ("ended", ended) == (problem["reading"]["state"], problem["reading"])


@pytest.mark.parametrize("name", ["heartbeat", "pause", "stop"])
async def test_commands_on_unknown_chats_are_not_found_and_make_none(
    client: AsyncClient, database_url: URL, name: str
) -> None:
    problem_of(await client.post(f"{CHAT}/{name}"), 404, "chat-not-found")
    await add(client, "25")
    before = stored(database_url)
    problem_of(await client.post(f"{CHAT}/{name}"), 404, "chat-not-found")
    problem_of(await client.get(CHAT), 404, "chat-not-found")
    problem_of(await client.get(f"{CHAT}/segments"), 404, "chat-not-found")
    assert before == stored(database_url)


# --- pause and stop ---------------------------------------------------------------------------------------------------


async def test_a_pause_stops_the_clock_and_a_second_one_is_a_sign_of_life(client: AsyncClient, clock: Clock) -> None:
    await put_card(client)
    await add(client, "25")
    await start(client)
    clock.tick(3_500_000)
    paused = await command(client, "pause")
    assert paused == {
        "user_id": "u1",
        "chat_id": "c1",
        "advisor_id": "a1",
        "state": "paused",
        "accruing": False,
        "revision": 2,
        "as_of": at("00:00:03.500000"),
        "server_time": at("00:00:03.500000"),
        "elapsed_us": 3_500_000,
        "free_used_us": 2_000_000,
        "free_left_us": 0,
        "credits_used": "1.500000",
        "balance": "23.500000",
        "tariff": ONE_A_SECOND_JSON,
        "count_us": 1_500_000,
        "accrues_until": None,
        "paid_from": None,
        "free_until": None,
        "exhausts_at": None,
        "started_at": BEGIN,
        "stopped_at": at("00:00:03.500000"),
        "stop_reason": "paused",
        "materialized_through": at("00:00:03.500000"),
        "heartbeat_seconds": 5,
    }
    assert paused == await get(client, CHAT)
    clock.tick(500_000)
    later = dict.fromkeys(("as_of", "server_time", "materialized_through"), at("00:00:04.000000"))
    assert {**paused, **later, "revision": 3} == await command(client, "pause")


async def test_the_first_stop_wins(client: AsyncClient, clock: Clock) -> None:
    await put_card(client)
    await add(client, "25")
    await start(client)
    clock.tick(3 * S)
    first = await command(client, "stop")
    assert ("ended", "ended", at("00:00:03.000000"), "1.000000", 2) == (
        first["state"],
        first["stop_reason"],
        first["stopped_at"],
        first["credits_used"],
        first["revision"],
    )
    clock.tick(2 * S)
    again = await command(client, "stop")
    passing = ("as_of", "server_time", "materialized_through")
    assert without(first, *passing) == without(again, *passing)
    assert "ended" == (await command(client, "pause"))["state"]
    assert ["-1.000000", "25.000000"] == [e["amount"] for e in (await get(client, "/v1/users/u1/ledger"))["items"]]


# --- account and ledger -----------------------------------------------------------------------------------------------


async def test_an_account_shows_what_runs_and_until_when(client: AsyncClient, clock: Clock) -> None:
    await put_card(client, "a1", free_seconds=0)
    await put_card(client, "a2", free_seconds=2)
    await add(client, "10")
    idle: Json = {
        "user_id": "u1",
        "as_of": BEGIN,
        "server_time": BEGIN,
        "balance": "10.000000",
        "accrued": "0.000000",
        "running": [],
        "exhausts_at": None,
        "materialized_through": BEGIN,
    }
    assert idle == await get(client, "/v1/users/u1/account")
    await start(client, "c1", "a1")
    clock.tick(1 * S)
    await start(client, "c2", "a2")
    clock.tick(1 * S)
    shared = {
        "user_id": "u1",
        "state": "running",
        "accruing": True,
        "revision": 1,
        "as_of": at("00:00:02.000000"),
        "server_time": at("00:00:02.000000"),
        "balance": "8.000000",
        "tariff": ONE_A_SECOND_JSON,
        # From the third second on both take one credit a second: 10 - 3 are left then, for three and a half seconds.
        "accrues_until": at("00:00:06.500000"),
        "exhausts_at": at("00:00:06.500000"),
        "stopped_at": None,
        "stop_reason": None,
        "materialized_through": at("00:00:01.000000"),
        "heartbeat_seconds": 5,
    }
    first = {
        **shared,
        "chat_id": "c1",
        "advisor_id": "a1",
        "started_at": BEGIN,
        "elapsed_us": 2_000_000,
        "free_used_us": 0,
        "free_left_us": 0,
        "credits_used": "2.000000",
        "count_us": 2_000_000,
        "paid_from": at("00:00:02.000000"),
        "free_until": None,
    }
    second = {
        **shared,
        "chat_id": "c2",
        "advisor_id": "a2",
        "started_at": at("00:00:01.000000"),
        "elapsed_us": 1_000_000,
        "free_used_us": 1_000_000,
        "free_left_us": 1_000_000,
        "credits_used": "0.000000",
        "count_us": 0,
        "paid_from": at("00:00:03.000000"),
        "free_until": at("00:00:03.000000"),
    }
    assert await get(client, "/v1/users/u1/account") == {
        "user_id": "u1",
        "as_of": at("00:00:02.000000"),
        "server_time": at("00:00:02.000000"),
        "balance": "8.000000",
        "accrued": "2.000000",
        "running": [first, second],
        "exhausts_at": at("00:00:06.500000"),
        "materialized_through": at("00:00:01.000000"),
    }
    clock.tick(5 * S)
    over = await get(client, "/v1/users/u1/account")
    assert ("0.000000", "0.000000", [], None) == (
        over["balance"],
        over["accrued"],
        over["running"],
        over["exhausts_at"],
    )


async def test_the_ledger_turns_its_pages_though_new_entries_arrive(client: AsyncClient, clock: Clock) -> None:
    await put_card(client)
    await add(client, "25")
    await start(client)
    clock.tick(3_500_000)
    await command(client, "pause")
    clock.tick(1 * S)
    for n in range(3, 6):
        await add(client, str(n), key=f"k{n}")
    charge = {
        "number": 2,
        "kind": "charge",
        "amount": "-1.500000",
        "balance_after": "23.500000",
        "happened_at": at("00:00:03.500000"),
        "recorded_at": at("00:00:03.500000"),
        "memo": "",
        "chat_id": "c1",
        "segment_started_at": BEGIN,
    }
    page = await get(client, "/v1/users/u1/ledger", limit=2)
    assert [(5, "35.500000"), (4, "30.500000")] == [(e["number"], e["balance_after"]) for e in page["items"]]
    await add(client, "6", key="k6")
    page = await get(client, "/v1/users/u1/ledger", limit=2, cursor=page["next"])
    assert ([3, 2], charge) == ([entry["number"] for entry in page["items"]], page["items"][1])
    await add(client, "7", key="k7")
    page = await get(client, "/v1/users/u1/ledger", limit=2, cursor=page["next"])
    assert ([1], None) == ([entry["number"] for entry in page["items"]], page["next"])
    assert [[7, 6, 5], [4, 3, 2], [1]] == [
        [entry["number"] for entry in items] for items in await pages(client, "/v1/users/u1/ledger", limit=3)
    ]
    # A last page that is exactly full has no next one.
    assert None is (await get(client, "/v1/users/u1/ledger", limit=7))["next"]


# --- lists of chats and segments --------------------------------------------------------------------------------------


async def test_chats_are_listed_by_their_state_as_it_is_now(client: AsyncClient, clock: Clock) -> None:
    for n in range(1, 6):
        await start(client, f"c{n}")
        clock.tick(1 * S)

    async def listed(**query: str | int) -> list[list[str]]:
        found = await pages(client, "/v1/users/u1/chats", **query)
        return [[item["chat_id"] for item in items] for items in found]

    assert [["c5", "c4"], ["c3", "c2"], ["c1"]] == await listed(limit=2)
    assert [["c4", "c3"], ["c2", "c1"]] == await listed(limit=2, state="paused")
    assert [["c5"]] == await listed(state="running")
    assert [[]] == await listed(state="ended")
    [items] = await pages(client, "/v1/users/u1/chats")
    assert items == [await get(client, f"/v1/users/u1/chats/{item['chat_id']}") for item in items]
    clock.tick(20 * S)  # nobody writes this down
    assert ([[]], [["c5"]]) == (await listed(state="running"), await listed(state="lapsed"))
    # Signs of life were, for c1 to c5, at seconds 1 to 4 (switched away from) and 4: at 302 two are too long ago.
    clock.set(clock.now + 277 * S)
    assert [["c2"], ["c1"]] == await listed(state="abandoned", limit=1)
    assert [["c5"]] == await listed(state="lapsed")
    assert [["c4"], ["c3"]] == await listed(state="paused", limit=1)


async def test_segments_turn_their_pages_to_the_open_one(client: AsyncClient, clock: Clock) -> None:
    await put_card(client)
    await add(client, "25")

    def segment(second: int, *, free: bool) -> Json:
        return {
            "started_at": at(f"00:00:{second:02d}.000000"),
            "ended_at": at(f"00:00:{second + 1:02d}.000000"),
            "stop_reason": "paused",
            "elapsed_us": 1_000_000,
            "free_us": 1_000_000 if free else 0,
            "paid_us": 0 if free else 1_000_000,
            "cost": "0.000000" if free else "1.000000",
            "tariff": ONE_A_SECOND_JSON,
        }

    for _ in range(4):
        await start(client)
        clock.tick(1 * S)
        await command(client, "pause")
        clock.tick(9 * S)
    await start(client)
    clock.tick(500_000)
    unfinished = {
        "started_at": at("00:00:40.000000"),
        "ended_at": None,
        "stop_reason": None,
        "elapsed_us": 500_000,
        "free_us": 0,
        "paid_us": 500_000,
        "cost": "0.500000",
        "tariff": ONE_A_SECOND_JSON,
    }
    closed = [segment(0, free=True), segment(10, free=True), segment(20, free=False), segment(30, free=False)]
    assert [closed[:2], closed[2:], [unfinished]] == await pages(client, f"{CHAT}/segments", limit=2)
    assert [[*closed, unfinished]] == await pages(client, f"{CHAT}/segments")
    clock.tick(60 * S)  # lapsed at 55, which nobody has written down
    lapsed = {
        **unfinished,
        "ended_at": at("00:00:55.000000"),
        "stop_reason": "lapsed",
        "elapsed_us": 15_000_000,
        "paid_us": 15_000_000,
        "cost": "15.000000",
    }
    assert [closed[:3], [closed[3], lapsed]] == await pages(client, f"{CHAT}/segments", limit=3)


# --- ids --------------------------------------------------------------------------------------------------------------


def every_character(text: str) -> str:
    return "".join(f"%{ord(character):02X}" for character in text)


def only_what_must(text: str) -> str:
    return quote(text, safe="")


@pytest.mark.parametrize("encode", [only_what_must, every_character, str])
async def test_ids_come_through_with_all_their_characters(client: AsyncClient, encode: Callable[[str], str]) -> None:
    for text in ("Az09-_.:@+=~|", "...", "+" * 128, "~"):
        coded = encode(text)
        user, chat = f"/v1/users/{coded}", f"/v1/users/{coded}/chats/{coded}"
        card = {"credits_per_minute": "60", "free_seconds": 0}
        assert text == json_of(await client.put(f"/v1/advisors/{coded}", json=card))["advisor_id"]
        assert not (await get(client, f"/v1/advisors/{coded}"))["default"]
        body = {"kind": "grant", "amount": "9"}
        json_of(await client.post(f"{user}/credits", headers={"Idempotency-Key": text}, json=body), 201)
        reading = json_of(await client.post(f"{chat}/start", json={"advisor_id": text}))
        assert [text] * 3 == [reading[name] for name in ("user_id", "chat_id", "advisor_id")]
        assert reading == await get(client, chat)
        assert [1] == [len(items) for items in await pages(client, f"{user}/chats", limit=1)]
        for name in ("heartbeat", "pause", "stop"):
            assert text == json_of(await client.post(f"{chat}/{name}"))["chat_id"]
        assert text == (await get(client, f"{user}/account"))["user_id"]
        assert "9.000000" == (await get(client, f"{user}/ledger"))["items"][0]["amount"]


async def test_the_cursor_of_chats_holds_any_id(client: AsyncClient) -> None:
    ids = ["Az09-_.:@+=~|", "...", "+" * 128, "~"]
    for chat_id in ids:
        await start(client, quote(chat_id, safe=""))
    # They began at the same instant, so their ids decide.
    found = [item["chat_id"] for items in await pages(client, "/v1/users/u1/chats", limit=1) for item in items]
    assert sorted(ids, reverse=True) == found


# --- what is wrong changes nothing ------------------------------------------------------------------------------------

_KEYED = {"Idempotency-Key": "fresh"}
_JSON = {"Content-Type": "application/json"}
_CREDIT = {"kind": "purchase", "amount": "1"}
# Method, path, what else is sent, the status and the code.
WRONG: list[tuple[str, str, dict[str, Any], int, str]] = [
    # who
    ("PUT", "/v1/advisors/a1", {"json": ONE_A_SECOND, "headers": {"Authorization": ""}}, 401, "unauthorized"),
    ("POST", f"{CHAT}/start", {"json": START, "headers": {"Authorization": "Bearer wrong"}}, 401, "unauthorized"),
    # where
    ("POST", f"{CHAT}/begin", {}, 404, "not-found"),
    ("POST", "/v1/users/u1/chats/c%2F1/start", {"json": START}, 400, "invalid-input"),
    ("DELETE", CHAT, {}, 405, "method-not-allowed"),
    # ids
    ("POST", "/v1/users/u1/chats/%20/start", {"json": START}, 400, "invalid-input"),
    ("PUT", f"/v1/advisors/{'x' * 129}", {"json": ONE_A_SECOND}, 400, "invalid-input"),
    ("POST", "/v1/users/u%001/credits", {"json": _CREDIT, "headers": _KEYED}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"json": {"advisor_id": ".."}}, 400, "invalid-input"),
    # headers
    ("POST", "/v1/users/u1/credits", {"json": _CREDIT}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"json": START, "headers": {"Idempotency-Key": "x" * 256}}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, ""),
    # queries
    ("GET", "/v1/users/u1/ledger?limit=0", {}, 400, "invalid-input"),
    ("GET", "/v1/users/u1/ledger?limit=201", {}, 400, "invalid-input"),
    ("GET", "/v1/users/u1/chats?state=asleep", {}, 400, "invalid-input"),
    ("GET", f"{CHAT}/segments?cursor={write_cursor('ledger', 5)}", {}, 400, "invalid-input"),
    ("POST", f"{CHAT}/pause?really=yes", {}, 400, "invalid-input"),
    # bodies
    ("POST", f"{CHAT}/start", {"content": b"", "headers": _JSON}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"content": b'{"advisor_id": ', "headers": _JSON}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"json": {}}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"json": {**START, "price": "0"}}, 400, "invalid-input"),
    ("POST", f"{CHAT}/start", {"json": {"advisor_id": "x" * 1024 * 1024}}, 413, "content-too-large"),
    ("POST", "/v1/users/u1/credits", {"json": {**_CREDIT, "amount": 1}, "headers": _KEYED}, 400, "invalid-input"),
    ("POST", "/v1/users/u1/credits", {"json": {**_CREDIT, "amount": "0"}, "headers": _KEYED}, 400, "invalid-input"),
    ("POST", "/v1/users/u1/credits", {"json": {**_CREDIT, "amount": "-1"}, "headers": _KEYED}, 400, "invalid-input"),
    ("POST", "/v1/users/u1/credits", {"json": {**_CREDIT, "amount": "1e3"}, "headers": _KEYED}, 400, "invalid-input"),
    ("POST", "/v1/users/u1/credits", {"json": {**_CREDIT, "kind": "charge"}, "headers": _KEYED}, 400, "invalid-input"),
    ("POST", "/v1/users/u1/credits", {"json": {**_CREDIT, "memo": "\0"}, "headers": _KEYED}, 400, "invalid-input"),
    ("PUT", "/v1/advisors/a1", {"json": {**ONE_A_SECOND, "free_seconds": -1}}, 400, "invalid-input"),
    ("PUT", "/v1/advisors/a1", {"json": {**ONE_A_SECOND, "first_seconds": 0.0000001}}, 400, "invalid-input"),
    ("PUT", "/v1/advisors/a1", {"json": {**ONE_A_SECOND, "credits_per_minute": "1000000.1"}}, 400, "invalid-input"),
    # states
    ("GET", "/v1/users/stranger/account", {}, 404, "user-not-found"),
    ("GET", "/v1/users/stranger/ledger", {}, 404, "user-not-found"),
    ("GET", "/v1/users/stranger/chats", {}, 404, "user-not-found"),
    ("GET", "/v1/users/stranger/chats/c1/segments", {}, 404, "user-not-found"),
    ("POST", "/v1/users/stranger/chats/c1/heartbeat", {}, 404, "chat-not-found"),
    ("POST", f"{CHAT}/heartbeat", {}, 409, "chat-not-active"),
    ("POST", f"{CHAT}/start", {"json": {"advisor_id": "a2"}}, 409, "wrong-advisor"),
    (
        "POST",
        "/v1/users/u1/credits",
        {"json": {**_CREDIT, "kind": "refund", "amount": "26"}, "headers": _KEYED},
        409,
        "insufficient-balance",
    ),
    (
        "POST",
        "/v1/users/stranger/credits",
        {"json": {**_CREDIT, "kind": "correction"}, "headers": _KEYED},
        409,
        "insufficient-balance",
    ),
    (
        "POST",
        "/v1/users/u1/credits",
        {"json": _CREDIT, "headers": {"Idempotency-Key": "first"}},
        422,
        "idempotency-key-reused",
    ),
]


async def test_what_is_refused_is_a_problem_document_and_writes_nothing(
    client: AsyncClient, clock: Clock, database_url: URL
) -> None:
    await put_card(client)
    await add(client, "25")
    await start(client)
    clock.tick(1 * S)
    await command(client, "stop")
    clock.tick(1 * S)
    before = stored(database_url)
    assert all(before[name] for name in ("account", "advisor", "allowance", "chat", "ledger_entry", "segment"))
    for method, path, sent, status, code in WRONG:
        response = await client.request(method, path, **sent)
        problem_of(response, status, code or "unsupported-media-type")
        assert before == stored(database_url), (method, path, sent)
    # None of these is so wrong that the right one is refused too.
    await add(client, "1", key="fresh")


async def test_a_balance_has_a_limit(client: AsyncClient, database_url: URL) -> None:
    with connect(database_url) as connection:
        await add(client, "1")
        connection.execute("UPDATE account SET balance = 999999999999000000")
        connection.execute("UPDATE ledger_entry SET amount = 999999999999000000, balance_after = 999999999999000000")
    before = stored(database_url)
    body = {"kind": "purchase", "amount": "1.000001"}
    response = await client.post("/v1/users/u1/credits", headers={"Idempotency-Key": "over"}, json=body)
    problem_of(response, 409, "balance-limit-exceeded")
    assert before == stored(database_url)
    assert "1000000000000.000000" == (await add(client, "1", key="to the limit"))["balance_after"]


# --- the promise ------------------------------------------------------------------------------------------------------


async def _swept(url: URL) -> None:
    database = Database(url)
    try:
        assert 0 == (await sweep(database, asyncio.Event())).failed
    finally:
        await database.close()


async def _charges(client: AsyncClient) -> list[str]:
    items = (await get(client, "/v1/users/u1/ledger"))["items"]
    return [item["amount"] for item in items if item["kind"] == "charge"]


@pytest.mark.parametrize("beaten_us", [2_500_000, 5_000_000], ids=["beats-end-before", "beats-go-on"])
@pytest.mark.parametrize("passes", [True, False], ids=["swept", "unswept"])
async def test_one_credit_buys_one_second_after_two_free_ones_whether_or_not_passes_ran(
    client: AsyncClient, clock: Clock, database_url: URL, *, passes: bool, beaten_us: int
) -> None:
    await put_card(client)
    await add(client, "1")
    await start(client)
    for us in range(500_000, 5_500_000, 500_000):
        clock.tick(500_000)
        elapsed_us = min(us, 3_000_000)
        spent = ["0.000000", "0.500000", "1.000000"][max(0, elapsed_us - 2_000_000) // 500_000]
        for _ in range(2):
            reading = await get(client, CHAT)
            assert (us < 3_000_000, elapsed_us, spent) == (
                reading["accruing"],
                reading["elapsed_us"],
                reading["credits_used"],
            )
            if us <= beaten_us:
                beat = await command(client, "heartbeat")
                assert (elapsed_us, spent) == (beat["elapsed_us"], beat["credits_used"])
            if passes:
                await _swept(database_url)
    final = {
        "user_id": "u1",
        "chat_id": "c1",
        "advisor_id": "a1",
        "state": "exhausted",
        "accruing": False,
        "as_of": at("00:00:05.000000"),
        "server_time": at("00:00:05.000000"),
        "elapsed_us": 3_000_000,
        "free_used_us": 2_000_000,
        "free_left_us": 0,
        "credits_used": "1.000000",
        "balance": "0.000000",
        "tariff": ONE_A_SECOND_JSON,
        "count_us": 1_000_000,
        "accrues_until": None,
        "paid_from": None,
        "free_until": None,
        "exhausts_at": None,
        "started_at": BEGIN,
        "stopped_at": at("00:00:03.000000"),
        "stop_reason": "exhausted",
        "heartbeat_seconds": 5,
    }
    segment = {
        "started_at": BEGIN,
        "ended_at": at("00:00:03.000000"),
        "stop_reason": "exhausted",
        "elapsed_us": 3_000_000,
        "free_us": 2_000_000,
        "paid_us": 1_000_000,
        "cost": "1.000000",
        "tariff": ONE_A_SECOND_JSON,
    }
    # How often heartbeats took the account's lock depends on when the end of the credits was written down.
    assert final == without(await get(client, CHAT), "materialized_through", "revision")
    assert {"items": [segment], "next": None} == await get(client, f"{CHAT}/segments")
    if not passes and beaten_us < 3_000_000:
        assert [] == await _charges(client)
    await _swept(database_url)
    await _swept(database_url)
    assert ["-1.000000"] == await _charges(client)
    assert final == without(await get(client, CHAT), "materialized_through", "revision")
    assert {"items": [segment], "next": None} == await get(client, f"{CHAT}/segments")


@contextmanager
def _reconciler(url: URL) -> Iterator[None]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TALKTIME_")}
    environment["TALKTIME_DATABASE_URL"] = url.render_as_string(hide_password=False)
    command_line = [sys.executable, "-m", "reconciler", "--every", "0.5"]
    with subprocess.Popen(command_line, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert " pass accounts=" in process.stderr.readline()
            yield
            assert None is process.poll()
            process.terminate()
            assert 0 == process.wait(10)
        finally:
            process.kill()


async def test_in_real_time_too_one_credit_buys_one_second(databases: Databases, database_url: URL) -> None:
    """Real clock, real heartbeats, at once with a reconciler process beside and without: takes five seconds."""
    with_passes = databases.create()
    try:
        with _reconciler(with_passes):
            await asyncio.gather(_in_real_time(with_passes), _in_real_time(database_url))
    finally:
        databases.drop(with_passes)


async def _in_real_time(url: URL) -> None:
    async with serving(url) as client:
        await put_card(client)
        await add(client, "1")
        readings = await _beaten(client)
        for earlier, later in pairwise(readings):
            assert earlier["as_of"] <= later["as_of"]
            assert earlier["elapsed_us"] <= later["elapsed_us"]
        started_at = datetime.fromisoformat(readings[0]["started_at"])
        for reading in readings:
            age_us = (datetime.fromisoformat(reading["as_of"]) - started_at) // timedelta(microseconds=1)
            elapsed_us = min(age_us, 3_000_000)
            paid_us = max(0, elapsed_us - 2_000_000)
            assert (elapsed_us, f"{paid_us // S}.{paid_us % S:06d}", age_us < 3_000_000) == (
                reading["elapsed_us"],
                reading["credits_used"],
                reading["accruing"],
            )
        last = readings[-1]
        assert ("exhausted", 3_000_000, 2_000_000, "1.000000", "0.000000", "exhausted") == tuple(
            last[name] for name in ("state", "elapsed_us", "free_used_us", "credits_used", "balance", "stop_reason")
        )
        assert timedelta(seconds=3) == datetime.fromisoformat(last["stopped_at"]) - started_at
        await _swept(url)
        assert ["-1.000000"] == await _charges(client)


async def _beaten(client: AsyncClient) -> list[Json]:
    readings = [await start(client)]
    begun = asyncio.get_running_loop().time()
    for n in range(1, 9):
        await asyncio.sleep(begun + n * 0.5 - asyncio.get_running_loop().time())
        readings += [await command(client, "heartbeat"), await get(client, CHAT)]
    return readings
