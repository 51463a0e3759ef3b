"""The reconciler as cron runs it: a program of its own, with its exit codes and signals."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from psycopg import AsyncConnection
from sqlalchemy.engine import URL

from reconciler.__main__ import _run as run_reconciler
from talktime import operations
from talktime.meter.state import ChatState, CreditKind, Policy, RateCard, Scope
from talktime.store.batches import lock_beating
from talktime.store.database import Database
from tests.database import Clock, connect
from tests.support import CREDIT, ONE_A_SECOND, POLICY, S, audit_lines, open_service


def _environment(url: URL | None, **settings: str) -> dict[str, str]:
    shown = {} if url is None else {"TALKTIME_DATABASE_URL": url.render_as_string(hide_password=False)}
    return {**{k: v for k, v in os.environ.items() if not k.startswith("TALKTIME_")}, **shown, **settings}


def _run(url: URL | None, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reconciler", *options],
        env=_environment(url, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def _running(url: URL, *options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "reconciler", *options],
        env=_environment(url),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


async def _chats(url: URL, users: int, *, policy: Policy = POLICY, card: RateCard = ONE_A_SECOND) -> None:
    async with open_service(url, policy=policy, card=card) as service:
        for n in range(users):
            await operations.credit(service, f"u{n}", kind=CreditKind.PURCHASE, amount=CREDIT, memo="", key="k")
            await operations.start(service, f"u{n}", "c", advisor_id="a", key=None)


def _scalar(url: URL, query: str) -> int:
    with connect(url) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


async def test_one_pass_materializes_what_everybody_reads(database_url: URL) -> None:
    await _chats(database_url, 3)
    await asyncio.sleep(1.1)
    done = _run(database_url)
    assert (0, 3) == (done.returncode, _scalar(database_url, "SELECT count(*) FROM ledger_entry WHERE kind = 'charge'"))
    assert "pass accounts=3 chats=3 failed=0" in done.stderr
    assert -CREDIT == _scalar(database_url, "SELECT min(amount) FROM ledger_entry")
    again = _run(database_url)
    assert 0 == again.returncode
    assert "pass accounts=0 chats=0 failed=0" in again.stderr
    assert 3 == _scalar(database_url, "SELECT count(*) FROM ledger_entry WHERE kind = 'charge'")


def test_for_a_while_makes_several_passes_and_ends(database_url: URL) -> None:
    done = _run(database_url, "--every", "0.2", "--for", "1")
    assert 0 == done.returncode
    assert 5 == done.stderr.count(" pass accounts=")


async def test_passes_go_on_until_sigterm_and_end_cleanly(database_url: URL) -> None:
    await _chats(database_url, 1)
    with _running(database_url, "--every", "0.1") as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(10)
    assert all("pass accounts=" in line for line in lines)


async def test_two_at_once_share_the_work_and_charge_once(database_url: URL) -> None:
    await _chats(database_url, 60)
    await asyncio.sleep(1.1)
    with _running(database_url) as one, _running(database_url) as two:
        ends = [process.communicate(timeout=60) for process in (one, two)]
        assert [0, 0] == [one.returncode, two.returncode]
    written = [int(err.split("accounts=")[1].split()[0]) for _, err in ends]
    assert sum(written) >= 60
    assert 60 == _scalar(database_url, "SELECT count(*) FROM ledger_entry WHERE kind = 'charge'")
    async with open_service(database_url) as service:
        assert not await audit_lines(service.database)


def test_without_a_database_the_exit_code_asks_to_try_again() -> None:
    done = _run(None, TALKTIME_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert 75 == done.returncode
    assert "Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unmigrated_database_is_told_plainly(empty_database_url: URL) -> None:
    done = _run(empty_database_url)
    assert 75 == done.returncode
    assert "talktime migrate" in done.stderr


@pytest.mark.parametrize("options", [["--every", "0"], ["--every", "soon"], ["--for", "-1"], ["--unknown"]])
def test_bad_use_is_exit_code_two(options: list[str]) -> None:
    assert 2 == _run(None, *options).returncode


def test_a_wrong_setting_is_one_line_that_names_it() -> None:
    done = _run(None, TALKTIME_LEASE_SECONDS="soon")
    assert 2 == done.returncode
    assert ["python -m reconciler: TALKTIME_LEASE_SECONDS: must be a number of seconds, not 'soon'"] == (
        done.stderr.strip().splitlines()
    )


async def test_an_account_that_cannot_be_written_does_not_hold_up_its_neighbours(database_url: URL) -> None:
    await _chats(database_url, 30)
    with connect(database_url) as connection:
        # A ledger entry stands where u7's charge has to go.
        connection.execute(
            "INSERT INTO ledger_entry SELECT bucket, user_id, number + 1, kind, amount, balance_after, happened_at,"
            " recorded_at, memo, 'in the way', request_hash FROM ledger_entry WHERE user_id = 'u7'"
        )
    await asyncio.sleep(1.1)
    done = _run(database_url)
    assert 1 == done.returncode
    assert "account 'u7'" in done.stderr
    assert "accounts=29 chats=29 failed=1" in done.stderr


async def test_the_audit_is_clean_and_then_names_a_row_that_was_tampered_with(database_url: URL) -> None:
    await _chats(database_url, 5)
    await asyncio.sleep(1.1)
    assert 0 == _run(database_url).returncode
    clean = _run(database_url, "--audit")
    assert (0, "") == (clean.returncode, clean.stdout)
    with connect(database_url) as connection:
        connection.execute("UPDATE segment SET cost = cost + 1 WHERE user_id = 'u1'")
    tampered = _run(database_url, "--audit")
    assert 1 == tampered.returncode
    assert "user 'u1': chat 'c': segment of" in tampered.stdout


async def test_an_audit_that_is_stopped_does_not_say_that_all_is_well(database_url: URL) -> None:
    await _chats(database_url, 1)
    stop = asyncio.Event()
    assert 0 == await run_reconciler(argparse.Namespace(audit=True, json=False), Database(database_url), stop)
    stop.set()
    assert 1 == await run_reconciler(argparse.Namespace(audit=True, json=False), Database(database_url), stop)


async def test_a_row_that_somebody_holds_does_not_hold_up_its_neighbours(database_url: URL) -> None:
    await _chats(database_url, 12)
    await asyncio.sleep(1.1)
    async with open_service(database_url) as service:

        async def hold(connection: AsyncConnection) -> subprocess.CompletedProcess[str]:
            key = "u3", "c"
            locked = await lock_beating(connection, [key])
            assert [key] == locked.alive
            return await asyncio.to_thread(_run, database_url)

        done = await service.database.line().run(hold)
    assert 1 == done.returncode
    assert "accounts=11 chats=11 failed=1" in done.stderr
    again = _run(database_url)
    assert "accounts=1 chats=1 failed=0" in again.stderr


async def test_whether_a_pass_ran_changes_nothing_that_is_read(database_url: URL, clock: Clock) -> None:
    policy = Policy(Scope.ADVISOR, 10 * S, 20 * S)
    async with open_service(database_url, policy=policy) as service:
        for user_id in ("passed", "left"):
            await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=3 * CREDIT, memo="", key="k")
            await operations.start(service, user_id, "c", advisor_id="a", key=None)
        for wait_us, state in ((2 * S, ChatState.RUNNING), (2 * S, ChatState.EXHAUSTED), (20 * S, ChatState.ABANDONED)):
            clock.tick(wait_us)
            with connect(database_url) as connection:  # only one of the two is due
                connection.execute("UPDATE account SET due_at = NULL WHERE user_id = 'left'")
            await asyncio.to_thread(_run, database_url)
            passed, left = [await operations.read_chat(service, user_id, "c") for user_id in ("passed", "left")]
            assert state is passed.state
            assert passed.materialized_through == clock.now > left.materialized_through
            assert left._replace(user_id="", materialized_through=0) == passed._replace(
                user_id="", materialized_through=0
            )
            for found in (state, None):
                pages = [
                    await operations.read_chats(service, user_id, state=found, after=None, limit=5)
                    for user_id in ("passed", "left")
                ]
                assert [1, 1] == [len(page) for page, _ in pages]
            receipts = [
                await operations.read_segments(service, user_id, "c", after=None, limit=5)
                for user_id in ("passed", "left")
            ]
            assert receipts[0] == receipts[1]
