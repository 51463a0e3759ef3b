"""What the log says of an error; and that a service, used, abused and left by its database, tells no secrets."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import sys
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import URL

from talktime.api.tokens import mint
from talktime.logs import DiscreetFormatter, JsonFormatter
from talktime.settings import load_settings
from tests.api.requests import ROUTES, problem_of
from tests.api.server import json_of
from tests.database import Databases, connect
from tests.program import NOWHERE, Running, run, running, written

TOKENS = {"TALKTIME_TOKEN_SECRET": f"mark{secrets.token_hex(20)}", "TALKTIME_TOKEN_ISSUER": "tests"}


# --- one error --------------------------------------------------------------------------------------------------------


def logged(error: BaseException, formatter: logging.Formatter | None = None) -> str:
    """Return what the log says of an error."""

    def fail() -> None:
        raise error

    try:
        fail()
    except BaseException:  # noqa: BLE001 - any
        record = logging.LogRecord("n", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
    return (formatter or DiscreetFormatter()).format(record)


def kinds_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("builtins.")]


def test_an_error_is_told_by_its_kind_and_place_and_not_by_its_words() -> None:
    text = logged(KeyError("secret"))
    assert "secret" not in text
    assert text.splitlines()[-1] == "builtins.KeyError"
    assert f'File "{__file__}", line ' in text
    assert "in logged" in text
    assert "ERROR it failed" in text.splitlines()[0]


def test_what_it_came_from_is_told_likewise() -> None:
    cause, inner = ValueError("secret-1"), ExceptionGroup("secret-2", [OSError(2, "No such file", "secret-3")])
    error = RuntimeError("secret-4")
    error.__cause__ = cause
    cause.__context__ = inner
    error.add_note("secret-5")
    text = logged(error)
    assert "secret" not in text
    expected = ["builtins.FileNotFoundError: No such file", "builtins.ExceptionGroup", "builtins.ValueError"]
    assert [*expected, "builtins.RuntimeError"] == kinds_in(text)


def test_errors_that_go_round_in_a_circle_are_told_once_each() -> None:
    one, other = ValueError("secret"), KeyError("secret")
    one.__cause__, other.__cause__ = other, one
    assert ["builtins.KeyError", "builtins.ValueError"] == kinds_in(logged(one))


def test_an_error_that_was_raised_from_itself_still_tells_what_came_before() -> None:
    error = RuntimeError("secret")
    error.__context__ = KeyError("secret")
    error.__cause__ = error
    assert ["builtins.KeyError", "builtins.RuntimeError"] == kinds_in(logged(error))


def test_of_the_database_s_words_the_constraint_and_the_state_are_kept(database_url: URL) -> None:
    with connect(database_url) as connection:
        connection.execute("CREATE TABLE t (n text CONSTRAINT t_short CHECK (length(n) < 3))")
        with pytest.raises(psycopg.errors.CheckViolation) as refusal:
            connection.execute("INSERT INTO t VALUES (%s)", ["s" + "ecret"])
    assert "secret" in str(refusal.value)
    text = logged(refusal.value)
    assert "secret" not in text
    assert "psycopg.errors.CheckViolation 23514 ERROR t t_short" in text


def test_as_json_an_error_is_one_line_and_as_discreet() -> None:
    text = logged(KeyError("secret"), JsonFormatter())
    assert "secret" not in text
    [line] = text.splitlines()
    said = json.loads(line)
    assert {"time", "level", "logger", "message", "error"} == said.keys()
    assert ("ERROR", "n", "it failed") == (said["level"], said["logger"], said["message"])
    assert "builtins.KeyError" == said["error"].splitlines()[-1]


def test_a_pass_is_logged_with_its_figures(database_url: URL) -> None:
    variables = {"TALKTIME_DATABASE_URL": written(database_url), "TALKTIME_LOG_FORMAT": "json"}
    done = run("reconcile", **variables)
    assert 0 == done.returncode
    said = json.loads(done.stderr.splitlines()[-1])
    assert ("INFO", "reconciler") == (said["level"], said["logger"])
    assert said["message"].startswith("pass accounts=0 chats=0 failed=0 ")
    assert (0, 0, 0) == (said["accounts"], said["chats"], said["failed"])
    wrong = run("reconcile", **{**variables, "TALKTIME_DATABASE_URL": NOWHERE})
    assert 75 == wrong.returncode
    assert all(json.loads(line) for line in wrong.stderr.splitlines())


# --- a service --------------------------------------------------------------------------------------------------------


class Marks:
    """Secrets that can be told again wherever they turn up."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self) -> str:
        self.made.append(f"mark{secrets.token_hex(12)}")
        return self.made[-1]


def with_marked_password(url: URL, mark: str) -> URL:
    """Return the URL for a login that has this password."""
    role = f"login_{secrets.token_hex(4)}"
    with connect(url) as connection:
        connection.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{mark}'")
    return url.set(username=role, password=mark)


def send_raw(service: Running, text: str) -> None:
    """Send what no client library would, and wait for the end."""
    url = service.client.base_url
    assert url.port
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(text.encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(65_536):
                pass
        except ConnectionError:
            pass


def use_and_abuse(service: Running, mark: Marks, url: URL) -> None:
    """Send requests of all kinds with marks in all places where something secret may stand."""
    client, key, user, chat = service.client, mark(), mark(), mark()
    json_of(client.put(f"/v1/advisors/{mark()}", json={"credits_per_minute": "1", "free_seconds": 1}))
    credit = {"kind": "purchase", "amount": "25", "memo": mark()}
    path = f"/v1/users/{user}"
    json_of(client.post(f"{path}/credits", headers={"Idempotency-Key": key}, json=credit), 201)
    problem_of(
        client.post(f"{path}/credits", headers={"Idempotency-Key": key}, json={**credit, "memo": mark()}),
        422,
        "idempotency-key-reused",
    )
    json_of(client.post(f"{path}/chats/{chat}/start", headers={"Idempotency-Key": mark()}, json={"advisor_id": mark()}))
    client.post(f"{path}/chats/{chat}/start", json={"advisor_id": mark()})
    for method, route, body in ROUTES:
        marked = route.replace("u1", mark()).replace("c1", mark()).replace("a1", mark())
        for headers in ({}, {"Authorization": f"Bearer {mark()}"}, {"Authorization": f"Bearer tt_{mark()}"}):
            client.request(method, marked, headers=headers, json=body)
            client.request(method, f"{marked}?x={mark()}", headers=headers, content=f'{{"{mark()}": "{mark()}"')
    tokens = load_settings(TOKENS).tokens
    assert tokens is not None
    for token in (mint(tokens, user, seconds=60), mint(tokens, user, seconds=60) + "x", f"a.{mark()}.c"):
        mark.made += [part for part in token.split(".")[1:] if len(part) > 1]
        client.get(f"{path}/account", headers={"Authorization": f"Bearer {token}"})
    # The console, with a key, with none, and with a cookie that somebody made up.
    client.post("/console/sign-in", data={"key": mark(), "next": mark()})
    client.get(f"/console/users/{mark()}", headers={"Cookie": f"talktime_console={mark()}"})
    signed_in = client.post("/console/sign-in", data={"key": service.key})
    assert 303 == signed_in.status_code
    mark.made.append(signed_in.cookies["talktime_console"])
    assert 200 == client.get(f"/console/users/{user}").status_code
    assert 403 == client.post("/console/sign-out", data={"csrf": mark()}).status_code
    # No HTTP.
    send_raw(service, f"{mark()}\r\n\r\n")
    send_raw(service, f"GET /{mark()} HTTP/1.1\r\nauthorization: bearer {mark()}\r\n\r\n")
    send_raw(service, f"GET /{mark()} HTTP/1.1\r\nhost: x\r\nx: {mark()}{'x' * 70_000}")
    head = f"POST {path}/chats/{chat}/pause HTTP/1.1\r\nhost: x\r\nauthorization: bearer {service.key}\r\n"
    send_raw(service, f"{head}content-length: 1000\r\n\r\n{mark()}")
    send_raw(service, f"{head}transfer-encoding: chunked\r\n\r\n5\r\n{mark()}")
    send_raw(service, f"GET /{mark()} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
    # A rule of the database that the service does not know of: PostgreSQL's message quotes the row.
    memo = mark()
    with connect(url) as connection:
        connection.execute(f"ALTER TABLE ledger_entry ADD CONSTRAINT unknown CHECK (memo <> '{memo}')")
    refused = client.post(
        f"{path}/credits", headers={"Idempotency-Key": mark()}, json={"kind": "grant", "amount": "1", "memo": memo}
    )
    problem_of(refused, 500, "internal-error")


@pytest.mark.parametrize("command", [["serve"], ["up", "--no-demo"]], ids=["serve", "up"])
def test_nothing_secret_is_in_what_a_service_says(databases: Databases, tmp_path: Path, command: list[str]) -> None:
    mark, url = Marks(), databases.create()
    login = with_marked_password(url, mark())
    settings = {"TALKTIME_SERVICE_KEY": mark(), "TALKTIME_RECONCILE_SECONDS": "0.2", **TOKENS}
    mark.made.append(TOKENS["TALKTIME_TOKEN_SECRET"])
    log = tmp_path / "log"
    arguments: tuple[str | Path, ...] = (*command, "--port", "0", "--home", tmp_path / "home")
    with running(log, *arguments, TALKTIME_DATABASE_URL=written(login), **settings) as service:
        use_and_abuse(service, mark, url)
        databases.drop(url)
        for path in ("/readyz", f"/v1/users/{mark()}/account", f"/v1/users/{mark()}/chats/{mark()}"):
            problem_of(service.client.get(path), 503, "unavailable")
        time.sleep(0.5)  # a pass
        assert 0 == service.end()
    said = log.read_text()
    assert [] == [made for made in mark.made if made in said], said
    # It did say something: what failed, and where.
    assert "unexpected error in POST /v1/users/{user_id}/credits" in said
    assert "psycopg.errors.CheckViolation 23514 ERROR ledger_entry unknown" in said
    assert "Invalid HTTP request received." not in said  # whoever sends that could fill the disk with it
    assert "the database is not available: " in said
    with connect(databases.server) as connection:
        connection.execute(f"DROP ROLE {login.username}")
