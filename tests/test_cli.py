"""The `talktime` command as people run it: an installed program, its output, its signals and its exit codes."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from sqlalchemy.engine import URL

from talktime import settings
from tests.api.requests import Json, problem_of
from tests.api.server import json_of
from tests.database import connect

TALKTIME = str(Path(sys.executable).with_name("talktime"))
PATIENCE_S = 60
CHAT = "/v1/users/u1/chats/c1"
KEY = "a-key-from-the-environment"
NOWHERE = "postgresql://nobody@127.0.0.1:1/none"


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without talktime's variables but these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TALKTIME_")}
    # So that what is not to touch the user's own data cannot: a run without --home would make a home here.
    inherited["XDG_DATA_HOME"] = "/nonexistent/data"
    return {**inherited, **variables}


def written(url: URL) -> str:
    """Write a URL as it stands in the environment."""
    return url.render_as_string(hide_password=False)


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [TALKTIME, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Running:
    """A service that was started, with what it said, and a client with its key."""

    process: subprocess.Popen[bytes]
    output: Path
    key: str
    client: httpx.Client

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def running(log: Path, *arguments: str | Path, **variables: str) -> Iterator[Running]:
    """Run a service until the block ends, and wait until it has said where it listens and its key."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [TALKTIME, *arguments], env=environment(**variables), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        key = said(r"^service key: (\S+)$", log, process)
        origin = said(r"^listening on (http://127\.0\.0\.1:[1-9]\d*)$", log, process)
        with httpx.Client(
            base_url=origin, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S, trust_env=False
        ) as client:
            yield Running(process, log, key, client)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def said(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until a service has said something."""
    patient_until = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < patient_until:
        if found := re.search(pattern, log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.02)
    pytest.fail(f"it did not say {pattern!r} but:\n{log.read_text()}")


# --- processes --------------------------------------------------------------------------------------------------------


def stat_of(pid: int) -> list[str]:
    """Return the fields of a process after its name: state, parent, ...; of one that is gone, those of a dead one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0"]


def is_running(pid: int) -> bool:
    return stat_of(pid)[0] not in ("Z", "X")


def family_of(*pids: int) -> set[int]:
    """Return processes with all their descendants."""
    parents = {int(path.name): int(stat_of(int(path.name))[1]) for path in Path("/proc").glob("[0-9]*")}
    family = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def postmaster(home: Path) -> int:
    return int((home / "postgres" / "postmaster.pid").read_text().split()[0])


def still_running(pids: set[int]) -> set[int]:
    """Return which of the processes do not end by themselves."""
    patient_until = time.monotonic() + 10
    while (left := {pid for pid in pids if is_running(pid)}) and time.monotonic() < patient_until:
        time.sleep(0.02)
    return left


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home that does not exist yet; what a failed test left running in it is killed."""
    home = tmp_path / "home"
    yield home
    # Nothing to do where there is none, or where the test put a file in its way.
    with suppress(FileNotFoundError, NotADirectoryError, ProcessLookupError):
        pid = postmaster(home)
        if is_running(pid) and Path(f"/proc/{pid}/comm").read_text() == "postgres\n":
            os.kill(pid, signal.SIGQUIT)
            still_running({pid})


def add(service: Running, key: str = "k") -> Json:
    body = {"kind": "purchase", "amount": "25"}
    return json_of(service.client.post("/v1/users/u1/credits", headers={"Idempotency-Key": key}, json=body), 201)


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
        assert 0o600 == stat.S_IMODE((home / "service_key").stat().st_mode)
        assert f"{service.key}\n" == (home / "service_key").read_text()
        began = json_of(service.client.get(CHAT))["started_at"]
        family = family_of(service.process.pid, postmaster(home))
        assert len(family) > 2  # PostgreSQL has children
        assert 0 == service.end(signal.SIGTERM)
        assert set() == still_running(family)
    assert "Traceback" not in service.output.read_text()

    with running(tmp_path / "second.log", *up) as again:
        assert service.key == again.key
        assert entry == add(again)
        assert began == json_of(again.client.get(CHAT))["started_at"]
        orphan = postmaster(home)
        family = family_of(again.process.pid, orphan)
        assert -signal.SIGKILL == again.end(signal.SIGKILL)

    with running(tmp_path / "third.log", *up) as third:
        assert service.key == third.key
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
        assert KEY == service.key
        assert "25.000000" == add(service)["balance_after"]
        with connect(empty_database_url) as connection:
            assert (1,) == connection.execute("SELECT count(*) FROM ledger_entry").fetchone()
        password = empty_database_url.password
        assert password is None or f":{password}@" not in service.output.read_text()
        assert 0 == service.end()
    # Neither a database nor a key of its own was needed.
    assert not list(home.glob("*"))


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


# --- settings ---------------------------------------------------------------------------------------------------------

WRONG_SETTINGS = [
    ("TALKTIME_DATABASE_URL", "no url"),
    ("TALKTIME_DATABASE_URL", "mysql://root@127.0.0.1/db"),
    ("TALKTIME_DATABASE_URL", "postgresql://127.0.0.1:port/db"),
    ("TALKTIME_DATABASE_URL", "postgresql://127.0.0.1:99999/db"),
    ("TALKTIME_DATABASE_URL", "postgresql://127.0.0.1/db?bogus=1"),
    ("TALKTIME_HOME", "~nobody-of-this-name/talktime"),
    ("TALKTIME_SERVICE_KEY", "short"),
    ("TALKTIME_LEASE_SECONDS", "0"),
    ("TALKTIME_HEARTBEAT_SECONDS", "-5"),
    ("TALKTIME_HEARTBEAT_SECONDS", "7.500001"),  # more than half of the lease
    ("TALKTIME_ABANDON_AFTER_SECONDS", "soon"),
    ("TALKTIME_ABANDON_AFTER_SECONDS", "15"),  # not more than the lease
    ("TALKTIME_EXCLUSIVE", "chat"),
    ("TALKTIME_CREDITS_PER_MINUTE", "1e3"),
    ("TALKTIME_FREE_SECONDS", "-1"),
    ("TALKTIME_RECONCILE_SECONDS", "0.0000001"),
]


@pytest.fixture(scope="module")
def refusals() -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """What `talktime serve` says to each wrong setting; several at a time, because starting is most of it."""

    def refusal(setting: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        return run("serve", "--port", "0", **dict([("TALKTIME_DATABASE_URL", NOWHERE), setting]))

    with ThreadPoolExecutor(4) as threads:
        return dict(zip(WRONG_SETTINGS, threads.map(refusal, WRONG_SETTINGS), strict=True))


@pytest.mark.parametrize(("name", "value"), WRONG_SETTINGS)
def test_a_wrong_setting_is_one_line_that_names_it(
    refusals: dict[tuple[str, str], subprocess.CompletedProcess[str]], name: str, value: str
) -> None:
    done = refusals[name, value]
    assert (2, "") == (done.returncode, done.stdout), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith((f"talktime: {name}: must be ", f"talktime: {name}: must not be "))


def test_every_setting_is_among_the_wrong_ones() -> None:
    named = set(re.findall(r'"(TALKTIME_[A-Z_]+)"', Path(settings.__file__).read_text()))
    assert {name for name, _ in WRONG_SETTINGS} == named


def test_a_setting_at_the_edge_is_not_wrong() -> None:
    at_the_edge = {"TALKTIME_HEARTBEAT_SECONDS": "7.5", "TALKTIME_ABANDON_AFTER_SECONDS": "15.000001"}
    done = run("migrate", TALKTIME_DATABASE_URL=NOWHERE, **at_the_edge)
    assert 75 == done.returncode


# --- the other commands -----------------------------------------------------------------------------------------------


def test_migrate_can_be_run_twice(empty_database_url: URL) -> None:
    for _ in range(2):
        done = run("migrate", TALKTIME_DATABASE_URL=written(empty_database_url))
        assert (0, "the database has the newest schema\n", "") == (done.returncode, done.stdout, done.stderr)
        with connect(empty_database_url) as connection:
            assert (1,) == connection.execute("SELECT count(*) FROM alembic_version").fetchone()
            assert (0,) == connection.execute("SELECT count(*) FROM account").fetchone()


def test_serve_is_the_api_alone(database_url: URL, home: Path, tmp_path: Path) -> None:
    serve = ("serve", "--port", "0", "--home", home)
    with running(
        tmp_path / "log", *serve, TALKTIME_DATABASE_URL=written(database_url), TALKTIME_RECONCILE_SECONDS="0.1"
    ) as service:
        assert {"status": "ready"} == service.client.get("/readyz").json()
        reading = start(service)
        time.sleep(0.5)
        later = json_of(service.client.get(CHAT))
        assert later["elapsed_us"] >= 500_000
        assert reading["materialized_through"] == later["materialized_through"]
        assert ["service_key"] == [path.name for path in home.iterdir()]
        assert 0 == service.end(signal.SIGINT)


def test_serve_starts_without_its_database_and_says_so(home: Path, tmp_path: Path) -> None:
    serve = ("serve", "--port", "0", "--home", home)
    with running(tmp_path / "log", *serve, TALKTIME_DATABASE_URL=NOWHERE, TALKTIME_SERVICE_KEY=KEY) as service:
        problem_of(service.client.get("/readyz"), 503, "unavailable")
        problem_of(service.client.get(CHAT), 503, "unavailable")
        assert 200 == service.client.get("/livez").status_code
        assert 0 == service.end()


def test_reconcile_is_the_reconciler_under_another_name(database_url: URL) -> None:
    program = [sys.executable, "-m", "reconciler", "--help"]
    other = subprocess.run(program, env=environment(), capture_output=True, text=True, check=True).stdout
    done = run("reconcile", "--help")
    assert 0 == done.returncode
    expected = other.replace("python -m reconciler", "talktime reconcile")
    assert expected.split() == done.stdout.split()
    assert "usage: talktime reconcile " in done.stdout
    done = run("reconcile", TALKTIME_DATABASE_URL=written(database_url))
    assert 0 == done.returncode
    assert " pass accounts=0 chats=0 failed=0 " in done.stderr


def test_the_version_is_that_of_the_package() -> None:
    done = run("--version")
    assert (0, f"talktime {version('talktime')}\n", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "arguments", [[], ["down"], ["up", "--port", "65536"], ["up", "--port", "x"], ["migrate", "x"]]
)
def test_bad_use_is_exit_code_two(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("usage: talktime")
