"""The audit as an operator runs it: what it prints, for people and for programs, how it is stopped, what it needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from talktime import operations
from talktime.meter.state import CreditKind
from talktime.store.tables import bucket_of
from tests.database import Clock, connect
from tests.program import on_terminal, written
from tests.support import CREDIT, S, open_service, until_blocked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import URL

AUDIT = (sys.executable, "-m", "reconciler", "--audit")
# The same, and then the most memory that it held.
WATCHED = (
    "import re, sys; from pathlib import Path; from reconciler.__main__ import main; code = main(['--audit']);"
    " print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]); sys.exit(code)"
)

BIG = """
INSERT INTO account VALUES (%(bucket)s, 'big', 0, %(begin)s + %(n)s * interval '10s', %(n)s + 2, NULL);
INSERT INTO allowance VALUES (%(bucket)s, 'big', 'a', 0, 0);
INSERT INTO chat SELECT %(bucket)s, 'big', 'c', 'a', 'paused', 60000000, 0, 0, 15000000, 1000000000000000,
    %(begin)s + %(n)s * interval '10s', %(begin)s, 2 * %(n)s, NULL, %(begin)s + (%(n)s - 1) * interval '10s'
    + interval '1s', 'paused', NULL, 0, %(n)s * 1000000::bigint, %(n)s * 1000000::bigint, 0, %(n)s * 1000000::bigint;
INSERT INTO segment SELECT %(bucket)s, 'big', 'c', %(begin)s + i * interval '10s',
    %(begin)s + i * interval '10s' + interval '1s', 'a', 'paused', 60000000, 0, 0, i * 1000000::bigint, 0, 1000000,
    1000000 FROM generate_series(0, %(n)s - 1) i;
INSERT INTO ledger_entry SELECT %(bucket)s, 'big', 1, 'purchase', %(n)s * 1000000::bigint, %(n)s * 1000000::bigint,
    %(begin)s, %(begin)s, '', 'k', sha256(convert_to(concat('purchase', chr(10), %(n)s * 1000000::bigint, chr(10)),
    'UTF8')), NULL, NULL;
INSERT INTO ledger_entry SELECT %(bucket)s, 'big', i + 2, 'charge', -1000000, (%(n)s - 1 - i) * 1000000::bigint,
    %(begin)s + i * interval '10s' + interval '1s', %(begin)s + i * interval '10s' + interval '1s', '', NULL, NULL,
    'c', %(begin)s + i * interval '10s' FROM generate_series(0, %(n)s - 1) i;
UPDATE account SET due_at = (SELECT last_heartbeat_at + interval '1000000000s' FROM chat)
"""


def _environment(url: URL | None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TALKTIME_")}
    return inherited if url is None else {**inherited, "TALKTIME_DATABASE_URL": written(url)}


def _run(url: URL | None, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=_environment(url), capture_output=True, text=True, timeout=120, check=False)


def _started(url: URL, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=_environment(url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _objects(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


async def _accounts(url: URL, clock: Clock, count: int) -> None:
    async with open_service(url) as service:
        for number in range(count):
            user_id = f"u{number}"
            await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=9 * CREDIT, memo="", key="k")
            await operations.start(service, user_id, "c", advisor_id="a", key=None)
        clock.tick(4 * S)
        for number in range(count):
            await operations.pause(service, f"u{number}", "c")


def _tamper(url: URL, change: str) -> None:
    with connect(url) as connection:
        connection.execute(change)


async def test_for_programs_it_prints_an_object_for_each_account_that_differs_and_the_totals(
    database_url: URL, clock: Clock
) -> None:
    await _accounts(database_url, clock, 4)
    clean = _run(database_url, *AUDIT, "--json")
    assert 0 == clean.returncode, clean.stderr
    assert [{"accounts": 4, "differing": 0, "differences": 0, "finished": True}] == _objects(clean.stdout)

    _tamper(database_url, "UPDATE account SET balance = balance - 1 WHERE user_id = 'u1'")
    _tamper(database_url, "UPDATE chat SET elapsed_us = 0, cost = 0 WHERE user_id = 'u2'")
    differing = _run(database_url, *AUDIT, "--json")
    assert 1 == differing.returncode
    *accounts, totals = _objects(differing.stdout)
    assert {"accounts": 4, "differing": 2, "differences": 3, "finished": True} == totals
    begin = {"since": "2026-01-01T00:00:00.000000Z"}
    assert {
        "u1": {
            "since": "2026-01-01T00:00:04.000000Z",
            "differences": [
                {
                    "what": "balance",
                    "stored": "4.999999",
                    "derived": "5.000000",
                    "since": "2026-01-01T00:00:04.000000Z",
                }
            ],
            "unlisted": 0,
        },
        "u2": {
            **begin,
            "differences": [
                {"what": "chat 'c': elapsed_us", "stored": 0, "derived": 4_000_000, **begin},
                {"what": "chat 'c': cost", "stored": "0.000000", "derived": "4.000000", **begin},
            ],
            "unlisted": 0,
        },
    } == {account.pop("user_id"): account for account in accounts}


async def test_for_people_it_prints_a_line_for_each_difference(database_url: URL, clock: Clock) -> None:
    await _accounts(database_url, clock, 2)
    _tamper(database_url, "UPDATE ledger_entry SET amount = amount + 1 WHERE kind = 'charge' AND user_id = 'u1'")
    done = _run(database_url, *AUDIT)
    assert 1 == done.returncode
    assert [
        "user 'u1': ledger entry 2: amount is -3.999999, derived -4.000000; since 2026-01-01T00:00:04.000000Z",
        "user 'u1': ledger entry 2: balance_after is 5.000000, derived 5.000001; since 2026-01-01T00:00:04.000000Z",
    ] == done.stdout.splitlines()
    assert "audit accounts=2 differing=1 differences=2" in done.stderr


def test_json_without_an_audit_is_bad_use() -> None:
    done = _run(None, sys.executable, "-m", "reconciler", "--json")
    assert 2 == done.returncode
    assert "--json goes with --audit only" in done.stderr
    assert "" == done.stdout


@contextmanager
def _held(url: URL, table: str) -> Iterator[None]:
    """Keep everybody from reading a table."""
    with connect(url) as connection, connection.transaction():
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_and_it_says_that_it_was_not_done(
    database_url: URL, clock: Clock, number: signal.Signals
) -> None:
    await _accounts(database_url, clock, 3)
    with _held(database_url, "segment"):
        process = _started(database_url, *AUDIT, "--json")
        await until_blocked(database_url)  # in the midst of its first batch
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert 1 == process.returncode, errors
    assert "the audit was stopped before its end" in errors
    assert [{"accounts": 0, "differing": 0, "differences": 0, "finished": False}] == _objects(output)


async def test_a_terminal_shows_how_far_it_is(database_url: URL, clock: Clock) -> None:
    await _accounts(database_url, clock, 3)
    with on_terminal("reconcile", "--audit", TALKTIME_DATABASE_URL=written(database_url)) as terminal:
        terminal.wait_for(r"auditing .*3/3")


async def test_it_is_in_nobodys_way(database_url: URL, clock: Clock) -> None:
    """While it reads, in a snapshot that lasts, accounts are locked and written as ever."""
    await _accounts(database_url, clock, 1)
    with _held(database_url, "allowance"):
        process = _started(database_url, *AUDIT)
        await until_blocked(database_url)
        with connect(database_url) as connection:
            connection.execute("SET lock_timeout = '1s'")
            connection.execute("SELECT FROM account WHERE user_id = 'u0' FOR UPDATE")
            connection.execute("UPDATE account SET balance = balance, next_entry = next_entry")
    _, errors = process.communicate(timeout=60)
    assert 0 == process.returncode, errors


def _peak_kb(url: URL) -> int:
    done = _run(url, sys.executable, "-c", WATCHED)
    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return int(done.stdout)


def test_its_memory_does_not_grow_with_an_account(database_url: URL) -> None:
    empty = _peak_kb(database_url)
    figures = {"bucket": bucket_of("big"), "n": 30_000, "begin": "timestamptz '2026-01-01'"}
    with connect(database_url) as connection:
        connection.execute(BIG % figures)
    whole = _peak_kb(database_url)
    # A segment and its line in the ledger are more than a kilobyte of Python's, and three times as many rows are read.
    assert whole < empty + 8_000, f"{empty} kB without an account, {whole} kB with a large one"


def test_a_large_account_is_gone_through_to_its_end(database_url: URL) -> None:
    figures = {"bucket": bucket_of("big"), "n": 3_500, "begin": "timestamptz '2026-01-01'"}
    with connect(database_url) as connection:
        connection.execute(BIG % figures)
        connection.execute(
            "UPDATE segment SET cost = cost + 1 WHERE started_at = (SELECT max(started_at) FROM segment)"
        )
    done = _run(database_url, *AUDIT)
    found = [re.sub(r"\d{4}-\S+Z", "T", line) for line in done.stdout.splitlines()]
    assert [
        "user 'big': chat 'c': segment of T: cost is 1.000001, derived 1.000000; since T",
        "user 'big': ledger entry 3501: amount is -1.000000, derived -1.000001; since T",
        "user 'big': chat 'c': cost is 3500.000000, derived 3500.000001; since T",
    ] == sorted(found, key=lambda line: (line.startswith("user 'big': chat 'c': cost"), line))


async def test_an_account_that_cannot_be_read_hides_nothing_of_the_others(database_url: URL) -> None:
    async with open_service(database_url) as service:
        neighbours = sorted(f"u{n}" for n in range(3000) if bucket_of(f"u{n}") == bucket_of("u0"))
        for user_id in neighbours:
            await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
    with connect(database_url) as admin:
        admin.execute("UPDATE ledger_entry SET happened_at = 'infinity' WHERE user_id = %s", [neighbours[1]])
        admin.execute("UPDATE account SET balance = balance + 1 WHERE user_id = %s", [neighbours[2]])
    done = _run(database_url, *AUDIT)
    assert 1 == done.returncode
    told = done.stdout.splitlines()
    assert [neighbours[1], neighbours[2]] == [line.split("'")[1] for line in told]
    assert "not to be read" in told[0]
    assert "balance is 1.000001, derived 1.000000" in told[1]
