"""The `talktime` command: its settings, its mistakes and its exit codes. What its commands do is tested elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from talktime import settings
from talktime.cli import main
from tests.database import connect
from tests.program import NOWHERE, environment, run, written

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
    ("TALKTIME_USER_MAY", "everything"),
    ("TALKTIME_CORS_ORIGINS", "https://app.example.com/"),
    ("TALKTIME_CONNECTIONS_MAX", "0"),
    ("TALKTIME_LOG_FORMAT", "xml"),
    ("TALKTIME_LOG_REQUESTS", "true"),
    ("TALKTIME_BALANCE_LOW_SECONDS", "-1"),
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


BAD_USES = [
    [],
    ["down"],
    ["up", "--port", "65536"],
    ["up", "--port", "x"],
    ["migrate", "x"],
    ["key"],
    ["key", "new"],
    ["key", "list", "x"],
    ["token"],
    ["token", "a/b"],
    ["token", "u1", "--seconds", "0"],
    ["token", "u1", "--seconds", "1.5"],
    ["credit", "u1"],
    ["credit", "..", "5"],
    ["credit", "u1", "0"],
    ["credit", "u1", "-5"],
    ["credit", "u1", "0.0000001"],
    ["credit", "u1", "1000000000.000001"],
    ["credit", "u1", "5", "--kind", "charge"],
    ["credit", "u1", "5", "--reason", "x" * 501],
    ["credit", "u1", "5", "--reason", "a\nb"],
    ["credit", "u1", "5", "--key", "\u00e9"],
    ["credit", "u1", "5", "--key", ""],
    ["advisor", "a 1"],
    ["advisor", "a1", "--credits-per-minute", "1000000.000001"],
    ["advisor", "a1", "--free-seconds", "-1"],
    ["advisor", "a1", "--first-seconds", "86401"],
    ["advisor", "a1", "--increment-seconds", "0.0000001"],
    ["events"],
    ["events", "list", "x"],
    ["events", "retry"],
    ["events", "retry", "u1", "--all"],
    ["events", "retry", "u1", "--number", "0"],
    ["watch", "u1"],
    ["watch", "u1", "a/b"],
    ["watch", "u1", "c1", "--every", "0"],
]


@pytest.mark.parametrize("arguments", BAD_USES, ids=" ".join)
def test_bad_use_is_exit_code_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert 2 == end.value.code
    out, err = capsys.readouterr()
    assert "" == out
    assert err.startswith("usage: talktime")


def test_bad_use_is_told_to_the_shell() -> None:
    done = run("credit", "u1", "0")
    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.endswith("error: argument AMOUNT: must be more than 0, not '0'\n")


def test_help_is_there_before_the_web_framework_is() -> None:
    program = (
        "import sys, talktime.cli as cli\ntry: cli.main(['--help'])\nfinally: print([*sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert "watch" in done.stdout
    assert not {"'litestar'", "'alembic'", "'uvicorn'", "'pendulum'"} & set(done.stderr.strip("[]\n").split(", "))
