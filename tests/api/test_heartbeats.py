"""Heartbeats of many chats in one request, and what batches mean for those who wait for them, over a real socket.

The clock is simulated and begins at 2026-01-01T00:00:00Z.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import cast
from urllib.parse import quote

import pytest
from httpx import AsyncClient
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import beats
from talktime.api import connections
from talktime.api.bodies import BEATS_BYTES_MAX, BODY_BYTES_MAX
from talktime.api.many_beats import BEATS_MAX
from talktime.store import database
from talktime.store.database import Database
from tests.api.requests import CHAT, START, Json, fault_of, problem_of
from tests.api.server import json_of, serving
from tests.database import Clock
from tests.store.many_chats import (
    HANGS_AFTER_SECONDS,
    beat_at,
    beats_at,
    copy_user,
    everything,
)
from tests.support import S

PATH = "/v1/heartbeats"
JSON = {"Content-Type": "application/json"}
RUNS = {"status": 200, "state": "running", "accruing": True}
BAD = {"status": 400, "code": "invalid-input"}
UNKNOWN = {"status": 404, "code": "chat-not-found"}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody lose patience with a lock while the test that holds it looks around, nor with a busy machine."""
    monkeypatch.setattr(database, "_SESSION", database._SESSION.replace("'2s'", "'60s'"))
    monkeypatch.setattr(database, "TRANSACTION_SECONDS_MAX", HANGS_AFTER_SECONDS)
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)
    monkeypatch.setattr(connections, "ANSWER_SECONDS_MAX", HANGS_AFTER_SECONDS)


@pytest.fixture
async def client(database_url: URL, clock: Clock) -> AsyncIterator[AsyncClient]:
    """The API with default settings, on simulated time: the lease is 15 s."""
    async with serving(database_url) as client:
        yield client


def chat(user_id: str, chat_id: str = "c") -> str:
    return f"/v1/users/{quote(user_id, safe='')}/chats/{quote(chat_id, safe='')}"


async def start(client: AsyncClient, user_id: str, chat_id: str = "c", advisor_id: str = "a") -> None:
    json_of(await client.post(f"{chat(user_id, chat_id)}/start", json={"advisor_id": advisor_id}))


def beat(user_id: str, chat_id: str = "c") -> Json:
    return {"user_id": user_id, "chat_id": chat_id}


async def send(client: AsyncClient, *sent: Json) -> list[Json]:
    """Send heartbeats, and return the result of each."""
    body = json_of(await client.post(PATH, json={"beats": sent}, timeout=HANGS_AFTER_SECONDS))
    assert {"results"} == set(body)
    assert len(sent) == len(body["results"])
    return cast("list[Json]", body["results"])


# --- what becomes of each ---------------------------------------------------------------------------------------------


async def _all_kinds(client: AsyncClient, url: URL, clock: Clock) -> dict[str, Json]:
    """Make chats of all kinds, at 400 s; return what a heartbeat of each is answered."""
    json_of(await client.put("/v1/advisors/dear", json={"credits_per_minute": "60", "free_seconds": 0}))
    begin = clock.now
    await start(client, "abandoned")
    await start(client, "ended")
    json_of(await client.post(f"{chat('ended')}/stop"))
    clock.set(begin + 200 * S)
    await start(client, "paused")
    json_of(await client.post(f"{chat('paused')}/pause"))
    await start(client, "lapsed")
    await start(client, "refused", advisor_id="dear")
    clock.set(begin + 370 * S)
    await start(client, "switched")
    await start(client, "switched", "d")
    clock.set(begin + 385 * S)
    await start(client, "lease-ends-now")
    clock.set(begin + 390 * S)
    await start(client, "running")
    await client.post(
        "/v1/users/spent/credits", headers={"Idempotency-Key": "k"}, json={"kind": "grant", "amount": "3"}
    )
    await start(client, "spent", advisor_id="dear")
    clock.set(begin + 400 * S)
    return {
        "abandoned": {"status": 409, "state": "abandoned", "code": "chat-not-active"},
        "ended": {"status": 409, "state": "ended", "code": "chat-not-active"},
        "lapsed": RUNS,
        "lease-ends-now": RUNS,
        "paused": {"status": 200, "state": "paused", "accruing": False},
        "refused": {"status": 200, "state": "exhausted", "accruing": False},
        "running": RUNS,
        # Stored as running still: the credits ran out since.
        "spent": {"status": 200, "state": "exhausted", "accruing": False},
        "switched": {"status": 200, "state": "paused", "accruing": False},
        "unknown": UNKNOWN,
    }


async def test_each_heartbeat_has_the_result_that_its_own_route_would_give_and_does_the_same(
    client: AsyncClient, clock: Clock, database_url: URL
) -> None:
    expected = await _all_kinds(client, database_url, clock)
    kinds = list(expected)
    for kind in kinds:
        copy_user(database_url, kind, [f"{kind}-2"])
    results = await send(client, *map(beat, kinds), beat("running", "unknown"))
    assert [*expected.values(), UNKNOWN] == results
    for kind, result in zip(kinds, results, strict=False):
        alone = await client.post(f"{chat(f'{kind}-2')}/heartbeat")
        answer = alone.json()
        assert result["status"] == alone.status_code
        if alone.is_success:
            assert (result["state"], result["accruing"]) == (answer["state"], answer["accruing"])
        else:
            assert result["code"] == answer["code"]
            assert result.get("state") == answer.get("reading", {}).get("state")
    rows = everything(database_url)["chat"]
    assert _of(rows, "-2") == _of(rows, "")
    assert clock.now == beat_at(database_url, "running")


def _of(rows: list[Json], suffix: str) -> dict[tuple[str, str], Json]:
    """Return the rows of users whose ids end so, by what is before that, without whose they are."""
    return {
        (row["user_id"].removesuffix("-2"), row["chat_id"]): {**row, "user_id": None, "bucket": None}
        for row in rows
        if row["user_id"].endswith("-2") == bool(suffix)
    }


NO_IDS = [
    "",
    ".",
    "..",
    "a b",
    "a/b",
    "\u00e9",
    "x" * 129,
    "a\u0000",
    "a\n",
    '"',
    "\\",
    "{a}",
    "a,b",
    "'",
    "\U0001f600",
    "%41",
]


async def test_ids_that_are_none_are_told_so_and_concern_nobody_else(client: AsyncClient, database_url: URL) -> None:
    for user_id in ("u1", "u2"):
        await start(client, user_id)
    sent = [beat("u1"), *map(beat, NO_IDS), *(beat("u1", bad) for bad in NO_IDS), beat("u2")]
    assert [RUNS, *[BAD] * 2 * len(NO_IDS), RUNS] == await send(client, *sent)
    assert [BAD] == await send(client, beat(""))


async def test_all_that_may_be_in_an_id_may_be_in_a_beat(client: AsyncClient, clock: Clock, database_url: URL) -> None:
    ids = ["NULL", "null", "...", "-_.:@+=~|", "0", "x" * 128]
    for user_id in ids:
        await start(client, user_id, user_id[::-1])
    clock.tick(5 * S)
    keys = [(user_id, user_id[::-1]) for user_id in ids]
    assert [RUNS] * len(ids) == await send(client, *(beat(*key) for key in keys))
    assert {clock.now} == beats_at(database_url, keys)


async def test_results_are_in_the_order_of_the_beats_also_of_those_that_come_again(
    client: AsyncClient, database_url: URL
) -> None:
    for user_id in ("u1", "u2", "u3"):
        await start(client, user_id)
    json_of(await client.post(f"{chat('u2')}/pause"))
    paused = {"status": 200, "state": "paused", "accruing": False}
    one_of_each = {"u1": RUNS, "u2": paused, "u3": RUNS, "nobody": UNKNOWN, "a b": BAD}
    order = ["a b", "u2", "u1", "nobody", "u1", "u3", "u2", "a b", "nobody", "u2"]
    assert [one_of_each[user_id] for user_id in order] == await send(client, *map(beat, order))
    [row] = [row for row in everything(database_url)["chat"] if row["user_id"] == "u2"]
    assert 3 == row["revision"]  # a start, a pause, and a sign of life


async def test_no_beats_are_answered_with_no_results(client: AsyncClient) -> None:
    assert [] == await send(client)


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_ten_thousand_chats_beat_in_one_request_and_not_one_more(
    client: AsyncClient, clock: Clock, database_url: URL
) -> None:
    await start(client, "u0")
    users = [f"u{n}" for n in range(BEATS_MAX)]
    copy_user(database_url, "u0", users[1:])
    clock.tick(5 * S)
    before = everything(database_url)
    one_more = {"beats": [beat(user_id) for user_id in (*users, "u0")]}
    fault = fault_of(await client.post(PATH, json=one_more))
    assert "/beats" == fault["pointer"]
    assert before == everything(database_url)
    # In an order that is not that of the locks.
    assert [RUNS] * BEATS_MAX == await send(client, *map(beat, users[::-1]))
    query = "SELECT count(*), count(DISTINCT last_heartbeat_at), min(last_heartbeat_at) FROM chat"
    row = clock.connection.execute(query).fetchone()
    assert row is not None
    assert (10_000, 1) == row[:2]
    assert clock.now == beat_at(database_url, "u0")


async def test_a_body_may_be_four_mebibytes_and_not_a_byte_more(client: AsyncClient, database_url: URL) -> None:
    await start(client, "u1")
    text = json.dumps({"beats": [beat("u1")]}).encode()
    for length in (BODY_BYTES_MAX + 1, BEATS_BYTES_MAX):
        answer = await client.post(PATH, content=text + b" " * (length - len(text)), headers=JSON)
        assert [RUNS] == json_of(answer)["results"]
    before = everything(database_url)
    problem_of(
        await client.post(PATH, content=text + b" " * (BEATS_BYTES_MAX + 1 - len(text)), headers=JSON),
        413,
        "content-too-large",
    )
    # Nor where the length is not told before.
    problem_of(await client.post(PATH, content=_pieces(text), headers=JSON), 413, "content-too-large")
    assert before == everything(database_url)
    # It holds for this route alone.
    long = json.dumps(START).encode() + b" " * BODY_BYTES_MAX
    problem_of(await client.post(f"{CHAT}/start", content=long, headers=JSON), 413, "content-too-large")


async def _pieces(text: bytes) -> AsyncIterator[bytes]:
    yield text
    for _ in range(BEATS_BYTES_MAX // 65_536):
        yield b" " * 65_536


ONE = '{"user_id": "u1", "chat_id": "c"}'


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{}", ("/beats", "is required")),
        ("[]", ("", "must be a JSON object")),
        (f'{{"beats": {ONE}}}', ("/beats", "array")),
        ('{"beats": null}', ("/beats", "array")),
        (f'{{"beats": [{ONE}], "beat": 1}}', ("/beat", "is not known here")),
        (f'{{"beats": [{ONE}]', ("", "is not JSON")),
        (f'{{"beats": [{ONE}, ]}}', ("", "is not JSON")),
        (f'{{"beats": [{ONE}, NaN]}}', ("", "is not JSON")),
        (f'[["beats", [{ONE}]]]', ("", "must be a JSON object")),
        (f'{{"beats": [{ONE}, {{"user_id": u1}}]}}', ("", "is not JSON")),
        (f'{{"beats": [{ONE}], "beats": []}}', ("", "holds a member twice")),
        (f'{{"beats": [{ONE}], "b\\u0065ats": [1]}}', ("", "holds a member twice")),
        (f'{{"beats": [{"[" * 100_000}{"]" * 100_000}, {ONE}]}}', ("", "is nested too deeply")),
    ],
)
async def test_a_body_that_is_none_is_refused_with_what_is_wrong_and_where_and_nothing_is_done(
    client: AsyncClient, clock: Clock, database_url: URL, content: str, wrong: tuple[str, str]
) -> None:
    for user_id in ("u1", "u2"):
        await start(client, user_id)
    clock.tick(1 * S)
    before = everything(database_url)
    fault = fault_of(await client.post(PATH, content=content.encode(), headers=JSON))
    pointer, words = wrong
    assert pointer == fault["pointer"]
    assert words in fault["detail"]
    assert before == everything(database_url)


@pytest.mark.parametrize(
    "malformed",
    [
        "null",
        "5",
        '"u1"',
        "[]",
        '[["user_id", "u1"], ["chat_id", "c"]]',
        "{}",
        '{"user_id": "u1"}',
        '{"user_id": "u1", "chat_id": 5}',
        f'{{"user_id": "u1", "chat_id": {"5" * 10_000}}}',
        '{"user_id": "u1", "chat_id": null}',
        '{"user_id": "u1", "chat_id": ["c"]}',
        '{"user_id": "u1", "chat_id": "c", "at": 1}',
        '{"user_id": "u1", "chat_id": "\\ud800"}',
        '{"user_id": "u1", "user_id": "u1", "chat_id": "c"}',
        '{"user_id": "u1", "chat_id": "c", "chat\\u005fid": "d"}',
        '{"user_id": "u1", "chat_id": {"beats": 1, "beats": 2}}',
    ],
)
async def test_a_malformed_beat_is_told_so_and_fails_no_other(
    client: AsyncClient, clock: Clock, database_url: URL, malformed: str
) -> None:
    await start(client, "u1")
    await start(client, "u2")
    clock.tick(1 * S)
    content = f'{{"beats": [{malformed}, {json.dumps(beat("u2"))}, {malformed}, {json.dumps(beat("nobody"))}]}}'
    answer = json_of(await client.post(PATH, content=content.encode(), headers=JSON))
    assert [BAD, RUNS, BAD, UNKNOWN] == answer["results"]
    assert (clock.now - 1 * S, clock.now) == (beat_at(database_url, "u1"), beat_at(database_url, "u2"))


async def test_what_only_looks_like_a_member_twice_is_an_id_that_is_none(client: AsyncClient) -> None:
    await start(client, "u1")
    looks = ['"user_id"', '"user_id', 'user_id"', '{"user_id": "u1", "user_id": "u1"}', '"beats"']
    assert [RUNS, *[BAD] * 10] == await send(
        client, beat("u1"), *map(beat, looks), *(beat("u1", look) for look in looks)
    )


# --- at once ----------------------------------------------------------------------------------------------------------


async def test_a_beat_and_a_pass_and_a_request_at_once_are_one_clock(
    client: AsyncClient, clock: Clock, database_url: URL
) -> None:
    users = [f"u{n}" for n in range(20)]
    await start(client, "u0")
    copy_user(database_url, "u0", users[1:])
    passing = Database(database_url, pool_size=2)
    try:
        for _ in range(3):
            clock.tick(5 * S)
            results, again, passed, answers = await asyncio.gather(
                send(client, *map(beat, users)),
                send(client, *map(beat, users[::-1])),
                sweep(passing, asyncio.Event()),
                asyncio.gather(*(client.post(f"{chat(user_id)}/heartbeat") for user_id in users[::4])),
            )
            assert [RUNS] * 40 == results + again
            assert 0 == passed.failed
            assert [200] * 5 == [answer.status_code for answer in answers]
    finally:
        await passing.close()
    for user_id in users:
        assert 15 * S == json_of(await client.get(chat(user_id)))["elapsed_us"]
