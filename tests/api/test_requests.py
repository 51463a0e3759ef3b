"""The id of a request: in its answer, and in all that is logged of it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from httpx import AsyncClient
from sqlalchemy.engine import URL

from talktime.api import connections
from talktime.logs import REQUEST_ID
from tests.api.requests import CHAT, CREDIT, START, problem_of
from tests.api.server import json_of, serving
from tests.database import connect
from tests.program import running, written

KEYED = {"Idempotency-Key": "k"}


@pytest.fixture
async def client(database_url: URL) -> AsyncIterator[AsyncClient]:
    async with serving(database_url) as client:
        json_of(await client.post(f"{CHAT}/start", json=START))
        yield client


def header(text: str) -> dict[str, str]:
    return {"X-Request-Id": text}


ANSWERS = [
    ("GET", CHAT, 200),  # straight to its handler
    ("GET", f"{CHAT}?x=1", 400),
    ("GET", "/v1/users/u2/chats/c1", 404),
    ("POST", f"{CHAT}/heartbeat", 200),
    ("GET", "/v1/users/u1/account", 200),
    ("GET", "/v1/nowhere", 404),
    ("DELETE", CHAT, 405),
    ("GET", "/livez", 200),
    ("GET", "/metrics", 200),
]


@pytest.mark.parametrize(("method", "path", "status"), ANSWERS)
async def test_an_answer_has_the_callers_id_if_it_is_plain_and_else_one_of_its_own(
    client: AsyncClient, method: str, path: str, status: int
) -> None:
    for sane in ("a", "x" * 128, "01J9-_.:=+/Z"):
        answer = await client.request(method, path, headers=header(sane))
        assert (status, [sane]) == (answer.status_code, answer.headers.get_list("x-request-id"))
    made = set()
    for insane in ("", "x" * 129, "two words", "a\tb", 'a"b', "a,b", "{}"):
        [own] = (await client.request(method, path, headers=header(insane))).headers.get_list("x-request-id")
        assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", own)
        made.add(own)
    [own] = (await client.request(method, path)).headers.get_list("x-request-id")
    assert 7 == len(made - {own})


async def test_a_refusal_without_a_credential_and_one_for_want_of_time_have_an_id_too(
    client: AsyncClient, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = await client.get(CHAT, headers={"Authorization": "Bearer wrong", **header("r1")})
    problem_of(refused, 401, "unauthorized")
    assert "r1" == refused.headers["x-request-id"]
    monkeypatch.setattr(connections, "ANSWER_SECONDS_MAX", 0)
    with connect(database_url) as holder, holder.transaction():
        holder.execute("LOCK TABLE chat IN ACCESS EXCLUSIVE MODE")
        late = await client.get(CHAT, headers=header("r2"))
    problem_of(late, 503, "unavailable")
    assert ["r2"] == late.headers.get_list("x-request-id")
    monkeypatch.undo()
    assert "\ntalktime_requests_unanswered_total 1.0\n" in (await client.get("/metrics")).text


async def test_an_error_is_logged_with_the_id_of_its_request_and_a_batch_with_none(
    client: AsyncClient, database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[tuple[str, str | None]] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append((record.name, REQUEST_ID.get()))

    note = Note(logging.ERROR)
    logging.getLogger().addHandler(note)
    try:
        json_of(await client.post("/v1/users/u2/chats/c1/start", json=START))
        with connect(database_url) as connection:
            connection.execute("ALTER TABLE allowance RENAME COLUMN granted_us TO x")
            connection.execute("ALTER TABLE allowance ADD granted_us boolean")
        answers = await asyncio.gather(
            *(client.get(f"/v1/users/{user}/chats/c1", headers=header(user)) for user in ("u1", "u2", "u1"))
        )
    finally:
        logging.getLogger().removeHandler(note)
    assert {500} == {answer.status_code for answer in answers}
    assert {"u1", "u2"} == {request_id for name, request_id in found if name == "talktime.api.problems"}
    assert {None} >= {request_id for name, request_id in found if name == "talktime.batching"}


# --- what is written --------------------------------------------------------------------------------------------------


def test_lines_are_json_where_that_is_wanted_and_tell_what_became_of_a_request(
    database_url: URL, tmp_path: Path
) -> None:
    variables = {
        "TALKTIME_DATABASE_URL": written(database_url),
        "TALKTIME_SERVICE_KEY": "a-service-key-for-tests",
        "TALKTIME_LOG_FORMAT": "json",
        "TALKTIME_LOG_REQUESTS": "on",
    }
    with connect(database_url) as connection:
        connection.execute("ALTER TABLE ledger_entry ADD CONSTRAINT unknown CHECK (memo <> '') NOT VALID")
    with running(tmp_path / "log", "serve", "--port", "0", **variables) as service:
        client = service.client
        json_of(client.post(f"{CHAT}/start", json=START, headers=header("r1")))
        json_of(client.get(CHAT, headers=header("r2")))
        json_of(client.post(f"{CHAT}/start", json=START, headers=header("r3")))
        problem_of(
            client.post("/v1/users/u1/credits", json=CREDIT, headers={**KEYED, **header("r4")}), 500, "internal-error"
        )
        json_of(client.put("/v1/advisors/a2", json={"credits_per_minute": "1", "free_seconds": 0}))
        json_of(client.post("/v1/users/u1/chats/c2/start", json={"advisor_id": "a2"}, headers=header("r5")))
        assert 0 == service.end()
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in service.output.read_text().splitlines() if line.startswith("{")
    ]
    with connect(database_url) as connection:
        row = connection.execute("SELECT opened_at FROM chat WHERE chat_id = 'c1'").fetchone()
    assert row
    since = row[0].isoformat(timespec="microseconds").replace("+00:00", "Z")
    told = {request_id: [line for line in lines if line.get("request_id") == request_id] for request_id in REQUESTS}
    for request_id in ("r1", "r3"):
        [start] = [line for line in told[request_id] if line["logger"] == "talktime"]
        assert f"start: the clock runs, from {since}" == start["message"]
        assert ("INFO", "running", since) == (start["level"], start["state"], start["running_since"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", start["time"])
    [refused] = [line for line in told["r5"] if line["logger"] == "talktime"]
    assert "start: the clock does not run, the chat is exhausted" == refused["message"]
    [read] = told["r2"]
    assert ("GET", "/v1/users/{user_id}/chats/{chat_id}", 200) == (read["method"], read["route"], read["status"])
    assert 0 < read["took_ms"] < 60_000
    error, answered = told["r4"]
    assert ("ERROR", 500) == (error["level"], answered["status"])
    assert "unexpected error in POST /v1/users/{user_id}/credits" == error["message"]
    assert error["error"].splitlines()[-1].startswith("sqlalchemy.exc.IntegrityError")
    assert "25" not in error["error"].splitlines()[-1]


REQUESTS = ("r1", "r2", "r3", "r4", "r5")


def test_lines_are_text_else_and_tell_of_starts_and_errors_alone(database_url: URL, tmp_path: Path) -> None:
    variables = {
        "TALKTIME_DATABASE_URL": written(database_url),
        "TALKTIME_SERVICE_KEY": "a-service-key-for-tests",
    }
    with running(tmp_path / "log", "serve", "--port", "0", **variables) as service:
        json_of(service.client.post(f"{CHAT}/start", json=START, headers=header("r1")))
        json_of(service.client.get(CHAT, headers=header("r2")))
        assert 0 == service.end()
    said = service.output.read_text()
    assert re.search(r"^\S+ \S+ talktime INFO start: the clock runs, from \S+Z request_id=r1$", said, re.MULTILINE)
    assert "r2" not in said
