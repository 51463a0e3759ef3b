"""Requests made up from the OpenAPI document, by schemathesis: each answer is one that the document declares.

All its checks are on, and what is left out is listed below with its reason. `pytest -s` shows its figures. The limit of
requests is off, for schemathesis is one caller; that a 429 is declared, test_docs.py sees to.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from talktime.api.tokens import mint
from talktime.settings import load_settings
from tests.api.requests import CREDIT, KEY, ROUTES, START, UNLIMITED
from tests.api.server import json_of
from tests.program import Running, running, written

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
SECONDS_MAX = 300

TOKENS = {"TALKTIME_TOKEN_SECRET": "s" * 32, "TALKTIME_TOKEN_ISSUER": "tests"}


LISTS = [
    "/v1/users/{user_id}/ledger",
    "/v1/users/{user_id}/chats",
    "/v1/users/{user_id}/chats/{chat_id}/segments",
]
# The document says of a cursor only that it is the `next` of the page before. Those made up are refused, as they should
# be (test_params.py), though the document cannot say why; so each list gets one of its own.
CURSOR = """
[[operations]]
include-path = "{path}"
parameters = {{ "query.cursor" = "{cursor}" }}
"""
# A key used again with another body is refused, and it is not the document that could say which were used before.
USED_KEYS = "".join(
    f"""
[[operations]]
include-path = "{path}"
[operations.checks]
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422", "5xx"]
"""
    for path in ("/v1/users/{user_id}/credits", "/v1/users/{user_id}/chats/{chat_id}/start")
)
# What is no heartbeat is one that fails: so it is told among the results, of a request that succeeds.
MALFORMED_BEATS = """
[[operations]]
include-path = "/v1/heartbeats"
[operations.checks]
negative_data_rejection.expected-statuses = ["200", "400", "401", "403", "408", "413", "415", "429", "5xx"]
"""
# A user may look at what is his alone: else all answers were 403.
OWN = """
[parameters]
"path.user_id" = "u1"
"path.chat_id" = "c1"
"path.advisor_id" = "a1"
"""


def add_data(service: Running) -> dict[str, str]:
    """Give the user u1 an account and chats, and return a cursor of each list."""
    for number in range(3):
        headers = {"Idempotency-Key": f"before-{number}"}
        json_of(service.client.post("/v1/users/u1/credits", headers=headers, json=CREDIT), 201)
        json_of(service.client.post(f"/v1/users/u1/chats/c{number}/start", json=START))
        json_of(service.client.post(f"/v1/users/u1/chats/c{number}/pause"))
        json_of(service.client.post("/v1/users/u1/chats/c1/start", json=START))
    return {
        path: json_of(service.client.get(path.format(user_id="u1", chat_id="c1"), params={"limit": 1}))["next"]
        for path in LISTS
    }


@pytest.fixture
def service(database_url: URL, tmp_path: Path) -> Iterator[Running]:
    settings = {"TALKTIME_SERVICE_KEY": KEY, "TALKTIME_USER_MAY": "control", **UNLIMITED, **TOKENS}
    with running(
        tmp_path / "log", "serve", "--port", "0", TALKTIME_DATABASE_URL=written(database_url), **settings
    ) as service:
        yield service


def examine(service: Running, credential: str, settings: str, *options: str) -> int:
    """Run schemathesis, check that all passed, and return how many requests it made up."""
    folder = service.output.parent
    cursors = "".join(CURSOR.format(path=path, cursor=cursor) for path, cursor in add_data(service).items())
    (folder / "schemathesis.toml").write_text(settings + cursors)
    done = subprocess.run(
        [
            SCHEMATHESIS,
            "run",
            f"{service.client.base_url}/schema/openapi.json",
            f"--header=Authorization: Bearer {credential}",
            "--checks=all",
            "--seed=20261121",
            "--generation-database=none",
            "--no-color",
            *options,
        ],
        cwd=folder,  # where it finds its settings, and may leave its files
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    print(done.stdout)  # noqa: T201 - the figures
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "Traceback" not in service.output.read_text()
    routes = len(ROUTES) + 2  # livez and readyz
    assert f"Selected: {routes}/{routes}" in done.stdout
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found, done.stdout
    assert found[1] == found[2], done.stdout
    return int(found[1])


def test_what_a_service_gets_is_what_the_document_says(service: Running) -> None:
    assert examine(service, KEY, USED_KEYS + MALFORMED_BEATS, "--max-examples=40") > 1000


def test_what_a_user_gets_is_what_the_document_says(service: Running) -> None:
    tokens = load_settings(TOKENS).tokens
    assert tokens is not None
    assert (
        examine(
            service, mint(tokens, "u1", seconds=SECONDS_MAX), OWN + USED_KEYS + MALFORMED_BEATS, "--max-examples=10"
        )
        > 400
    )
