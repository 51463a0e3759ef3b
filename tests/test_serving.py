"""`talktime up` and `talktime serve` as people run them: what they say, what they start, and that it ends."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from tests.api.requests import Json, problem_of
from tests.api.server import json_of
from tests.database import connect
from tests.program import (
    NOWHERE,
    PATIENCE_S,
    TALKTIME,
    Running,
    environment,
    family_of,
    fresh_home,
    postmaster,
    run,
    running,
    said,
    still_running,
    written,
)

CHAT = "/v1/users/u1/chats/c1"
KEY = "a-key-from-the-environment"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    with fresh_home(tmp_path) as home:
        yield home


def add(service: Running, key: str = "k") -> Json:
    body = {"kind": "purchase", "amount": "25"}
    return json_of(service.client.post("/v1/users/u1/credits", headers={"Idempotency-Key": key}, json=body), 201)


def made_key(name: str, **variables: str) -> str:
    return run("key", "new", name, **variables).stdout.strip()


def use(service: Running, key: str) -> None:
    """Go on with a key that was made before."""
    service.client.headers["Authorization"] = f"Bearer {key}"


def start(service: Running) -> Json:
    return json_of(service.client.post(f"{CHAT}/start", json={"advisor_id": "a1"}))


# --- up ---------------------------------------------------------------------------------------------------------------


def test_a_newcomer_needs_one_command_and_finds_everything_again_after_an_end_and_after_a_crash(
    home: Path, tmp_path: Path
) -> None:
    up = ("up", "--port", "0", "--home", home)
    with running(tmp_path / "first.log", *up) as service:
        assert {"status": "ready"} == service.client.get("/readyz").json()
        entry = add(service)
        assert "25.000000" == entry["balance_after"]
        assert start(service)["accruing"]
        for wrong in (service.key + "x", service.key.lower(), "x"):
            headers = {"Authorization": f"Bearer {wrong}"}
            problem_of(service.client.get(CHAT, headers=headers), 401, "unauthorized")
        # The key is nowhere but on the screen, and the secret that signs tokens is its owner's alone.
        assert 0o600 == stat.S_IMODE((home / "token_secret").stat().st_mode)
        assert not [path for path in home.glob("*") if path.is_file() and service.key in path.read_text()]
        secret = (home / "token_secret").read_text()
        began = json_of(service.client.get(CHAT))["started_at"]
        # Commands work on the database of the home while it is up.
        assert "grant of 1 credit " in run("credit", "u2", "1", "--home", home).stdout
        family = family_of(service.process.pid, postmaster(home))
        assert len(family) > 2  # PostgreSQL has children
        assert 0 == service.end(signal.SIGTERM)
        assert set() == still_running(family)
    assert "Traceback" not in service.output.read_text()

    with running(tmp_path / "second.log", *up) as again:
        assert "" == again.key
        assert "service keys in force: 1; `talktime key new NAME --home " in again.output.read_text()
        use(again, service.key)
        assert entry == add(again)
        assert began == json_of(again.client.get(CHAT))["started_at"]
        orphan = postmaster(home)
        family = family_of(again.process.pid, orphan)
        assert -signal.SIGKILL == again.end(signal.SIGKILL)

    with running(tmp_path / "third.log", *up) as third:
        use(third, service.key)
        assert secret == (home / "token_secret").read_text()
        assert entry == add(third)
        assert began == json_of(third.client.get(CHAT))["started_at"]
        family |= family_of(third.process.pid, postmaster(home))
        assert 0 == third.end(signal.SIGINT)
        assert set() == still_running(family)
    assert "Traceback" not in third.output.read_text()


def test_up_starts_its_database_again_when_that_dies(home: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "up", "--port", "0", "--home", home) as service:
        entry = add(service)
        os.kill(postmaster(home), signal.SIGKILL)
        patient_until = time.monotonic() + 30
        while service.client.get("/readyz").status_code != 200:
            assert time.monotonic() < patient_until
            time.sleep(0.1)
        said(r"(the embedded PostgreSQL had died; it runs again)", service.output, service.process)
        assert entry == add(service)
        family = family_of(service.process.pid, postmaster(home))
        assert 0 == service.end()
        assert set() == still_running(family)


def test_a_second_signal_does_not_leave_the_database_running(home: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "up", "--port", "0", "--home", home) as service:
        family = family_of(service.process.pid, postmaster(home))
        with (home / "postgres.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as another process of this home that starts or stops
            service.process.send_signal(signal.SIGTERM)
            for number in (signal.SIGTERM, signal.SIGINT):
                time.sleep(1)
                service.process.send_signal(number)
            assert service.process.poll() is None
        assert 0 == service.process.wait(PATIENCE_S)
        assert set() == still_running(family)


def test_up_that_is_ended_while_it_starts_leaves_nothing_running(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [TALKTIME, "up", "--port", "0", "--home", home], env=environment(), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        pid_file = home / "postgres" / "postmaster.pid"
        patient_until = time.monotonic() + PATIENCE_S
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < patient_until:
            time.sleep(0.01)
        family = family_of(process.pid, postmaster(home))
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(PATIENCE_S), log.read_text()
        assert set() == still_running(family)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_passes_are_made_inside_up(database_url: URL, home: Path, tmp_path: Path) -> None:
    up = ("up", "--port", "0", "--home", home)
    with running(
        tmp_path / "log", *up, TALKTIME_DATABASE_URL=written(database_url), TALKTIME_RECONCILE_SECONDS="0.3"
    ) as service:
        seen = {start(service)["materialized_through"]}
        patient_until = time.monotonic() + PATIENCE_S
        while len(seen) < 4 and time.monotonic() < patient_until:
            time.sleep(0.05)
            seen.add(json_of(service.client.get(CHAT))["materialized_through"])
        assert 4 == len(seen)
        assert 1 == json_of(service.client.get(CHAT))["revision"]
        assert 0 == service.end()


def test_up_migrates_the_database_it_is_given_and_starts_none_of_its_own(
    empty_database_url: URL, home: Path, tmp_path: Path
) -> None:
    up = ("up", "--port", "0", "--home", home)
    with running(
        tmp_path / "log", *up, TALKTIME_DATABASE_URL=written(empty_database_url), TALKTIME_SERVICE_KEY=KEY
    ) as service:
        assert "service keys in force: 1, one of them that of TALKTIME_SERVICE_KEY; " in service.output.read_text()
        assert "25.000000" == add(service)["balance_after"]
        with connect(empty_database_url) as connection:
            assert (1,) == connection.execute("SELECT count(*) FROM ledger_entry WHERE user_id = 'u1'").fetchone()
            assert (0,) == connection.execute("SELECT count(*) FROM service_key").fetchone()
        password = empty_database_url.password
        assert password is None or f":{password}@" not in service.output.read_text()
        assert 0 == service.end()
    # No database of its own was needed.
    assert ["token_secret"] == [path.name for path in home.iterdir()]


@pytest.mark.parametrize("command", ["up", "serve"])
def test_a_taken_port_is_told_in_one_line_before_anything_is_started(home: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(command, "--port", str(port), "--home", home)
    assert (1, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"talktime: cannot listen on 127.0.0.1 port {port}: ")
    assert not home.exists()


@pytest.mark.parametrize("command", ["up", "migrate"])
def test_a_database_that_is_not_there_is_told_in_one_line(home: Path, command: str) -> None:
    port = ["--port", "0"] if command == "up" else []
    done = run(command, *port, "--home", home, TALKTIME_DATABASE_URL=NOWHERE)
    assert (75, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert line.startswith("talktime: cannot migrate the database: ")


@pytest.mark.parametrize("command", ["up", "migrate"])
def test_a_home_that_is_no_folder_is_told_in_one_line(home: Path, command: str) -> None:
    home.write_text("a file")
    port = ["--port", "0"] if command == "up" else []
    done = run(command, *port, TALKTIME_HOME=str(home))
    assert (75, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"talktime: cannot keep a database in {home}: ")


def test_serve_is_the_api_alone(database_url: URL, home: Path, tmp_path: Path) -> None:
    serve = ("serve", "--port", "0", "--home", home)
    with running(
        tmp_path / "log",
        *serve,
        TALKTIME_DATABASE_URL=written(database_url),
        TALKTIME_RECONCILE_SECONDS="0.1",
        TALKTIME_SERVICE_KEY=KEY,
    ) as service:
        assert {"status": "ready"} == service.client.get("/readyz").json()
        reading = start(service)
        time.sleep(0.5)
        later = json_of(service.client.get(CHAT))
        assert later["elapsed_us"] >= 500_000
        assert reading["materialized_through"] == later["materialized_through"]
        for page in ("/console", "/schema"):
            assert 200 == service.client.get(page, follow_redirects=True).status_code
        # There is no demo on a server that others reach.
        assert "/console" == service.client.get("/").headers["location"]
        assert "demo at" not in service.output.read_text()
        assert 0 == service.end(signal.SIGINT)
    assert not home.exists()


def test_serve_starts_without_its_database_and_says_so(home: Path, tmp_path: Path) -> None:
    serve = ("serve", "--port", "0", "--home", home)
    with running(tmp_path / "log", *serve, TALKTIME_DATABASE_URL=NOWHERE, TALKTIME_SERVICE_KEY=KEY) as service:
        problem_of(service.client.get("/readyz"), 503, "unavailable")
        problem_of(service.client.get(CHAT), 503, "unavailable")
        assert 200 == service.client.get("/livez").status_code
        said(r"(service keys: the database does not answer yet)", service.output, service.process)
        assert 0 == service.end()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_service_may_open_more_files_than_its_shell_lets_it_and_says_if_that_is_too_few(
    home: Path, tmp_path: Path
) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = {"TALKTIME_DATABASE_URL": NOWHERE, "TALKTIME_SERVICE_KEY": KEY, "TALKTIME_CONNECTIONS_MAX": "500"}

    def limit_of(service: Running) -> tuple[int, int]:
        return resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE)

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, files[1]))
        with running(tmp_path / "log", "serve", "--port", "0", "--home", home, **few) as service:
            assert (files[1], files[1]) == limit_of(service)
            assert "connections at once" not in service.output.read_text()
            assert 0 == service.end()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    limited = Path("/bin/sh"), "-c", 'ulimit -n 400; exec "$@"', "sh", TALKTIME
    done = subprocess.Popen(
        [*limited, "serve", "--port", "0", "--home", home],
        env=environment(**few),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout
    try:
        lines = iter(done.stdout.readline, "")
        assert next(line for line in lines if "connections at once" in line).endswith(
            "this process may open 400 files: it serves 100 connections at once, not 500\n"
        )
    finally:
        done.kill()
        done.wait()
        done.stdout.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [("TALKTIME_USER_REQUESTS_PER_SECOND", "0"), ("TALKTIME_CONNECTIONS_MAX", "many")],
)
def test_a_wrong_limit_stops_the_start_with_one_line(home: Path, name: str, text: str) -> None:
    done = run("serve", "--port", "0", "--home", home, **{name: text})
    assert (2, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"talktime: {name}: must be an integer from 1 to 1000000")
    assert line.endswith(f"not '{text}'")


# --- keys, the console and the demo -----------------------------------------------------------------------------------


def test_serve_makes_no_key_and_tells_how_to_make_one(database_url: URL, home: Path, tmp_path: Path) -> None:
    url = {"TALKTIME_DATABASE_URL": written(database_url)}
    with running(tmp_path / "log", "serve", "--port", "0", **url) as service:
        assert "no service key is in force: `talktime key new NAME` makes one\n" in service.output.read_text()
        with connect(database_url) as connection:
            assert (0,) == connection.execute("SELECT count(*) FROM service_key").fetchone()
        use(service, made_key("shop", **url))
        assert "25.000000" == add(service)["balance_after"]
        assert 0 == service.end()
    with running(tmp_path / "again", "serve", "--port", "0", **url) as service:
        assert "service keys in force: 1; `talktime key new NAME` makes another\n" in service.output.read_text()


def test_up_makes_its_first_key_once_and_never_another(database_url: URL, tmp_path: Path) -> None:
    url = {"TALKTIME_DATABASE_URL": written(database_url)}
    up = ("up", "--no-demo", "--port", "0", "--home", tmp_path / "home")
    with running(tmp_path / "first", *up, **url) as service:
        assert re.fullmatch(r"tt_[A-Za-z0-9_-]{43}", service.key)
        assert "it is shown only now; `talktime key new NAME --home " in service.output.read_text()
        add(service)
    with running(tmp_path / "second", *up, **url) as service:
        assert "" == service.key
        assert "service keys in force: 1;" in service.output.read_text()
    assert 0 == run("key", "revoke", "first", **url).returncode
    with running(tmp_path / "third", *up, **url) as service:
        assert "" == service.key
        assert "no service key is in force: `talktime key new NAME --home " in service.output.read_text()


def test_a_revoked_key_is_refused_within_five_seconds_and_others_go_on(database_url: URL, tmp_path: Path) -> None:
    url = {"TALKTIME_DATABASE_URL": written(database_url)}
    with running(tmp_path / "log", "up", "--no-demo", "--port", "0", "--home", tmp_path / "home", **url) as service:
        shop = made_key("shop", **url)
        add(service)
        revoked = run("key", "revoke", "first", **url)
        assert "is refused within 5 seconds" in revoked.stdout
        time.sleep(5.5)
        problem_of(service.client.get("/v1/users/u1/account"), 401, "unauthorized")
        use(service, shop)
        assert "25.000000" == json_of(service.client.get("/v1/users/u1/account"))["balance"]


def test_up_shows_its_demo_and_its_console_before_its_key(database_url: URL, tmp_path: Path) -> None:
    up = ("up", "--port", "0", "--home", tmp_path / "home")
    with running(tmp_path / "log", *up, TALKTIME_DATABASE_URL=written(database_url)) as service:
        origin = str(service.client.base_url).rstrip("/")
        lines = service.output.read_text().splitlines()
        places = [
            lines.index(f"{what} at {origin}{path}")
            for what, path in [("documentation", "/schema"), ("demo", "/"), ("console", "/console")]
        ]
        places.append(lines.index(f"service key: {service.key}"))
        assert sorted(places) == places
        for path in ("/", "/console"):
            page = service.client.get(path, follow_redirects=True, headers={"Authorization": ""})
            assert (200, "text/html") == (page.status_code, page.headers["content-type"].partition(";")[0])
        with connect(database_url) as connection:
            seeded = connection.execute("SELECT count(*) FROM advisor").fetchone()
            assert seeded
            assert seeded[0] > 0


def test_up_without_the_demo_leaves_the_database_empty(database_url: URL, tmp_path: Path) -> None:
    up = ("up", "--no-demo", "--port", "0", "--home", tmp_path / "home")
    with running(tmp_path / "log", *up, TALKTIME_DATABASE_URL=written(database_url)) as service:
        assert "demo at" not in service.output.read_text()
        assert "/console" == service.client.get("/").headers["location"]
        with connect(database_url) as connection:
            for table in ("advisor", "account"):
                assert (0,) == connection.execute(f"SELECT count(*) FROM {table}").fetchone()


def test_up_takes_the_tokens_that_the_token_command_makes(database_url: URL, home: Path, tmp_path: Path) -> None:
    url = {"TALKTIME_DATABASE_URL": written(database_url)}
    with running(tmp_path / "log", "up", "--no-demo", "--port", "0", "--home", home, **url) as service:
        add(service)
        use(service, run("token", "u1", "--home", home).stdout.strip())
        assert "25.000000" == json_of(service.client.get("/v1/users/u1/account"))["balance"]
        use(service, run("token", "u2", "--home", home).stdout.strip())
        problem_of(service.client.get("/v1/users/u1/account"), 403, "forbidden")
