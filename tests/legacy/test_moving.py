"""Moving in and out with the real command: what is taken over, that it is taken over once, and the way back."""

from __future__ import annotations

import asyncio
import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import operations
from talktime.meter.state import ChatState
from talktime.meter.units import ceil_div
from tests.database import connect
from tests.legacy.old_database import CAMEL_CASE, USUAL, beat, fill
from tests.program import NOWHERE, TALKTIME, environment, run, written
from tests.support import S, audit_lines, open_service

if TYPE_CHECKING:
    from tests.database import Clock, Databases

RECORDS = int(os.environ.get("TALKTIME_TEST_OLD_RECORDS") or 1_500)
PATIENCE_S = 600
VIEWS = ('"user"', "chat", "conversation_time_record")
FIGURES = ("seconds", "free_seconds", "credits_used", "credits")

CONTENTS = [
    "SELECT user_id, balance, next_entry FROM account ORDER BY user_id",
    "SELECT user_id, chat_id, state, elapsed_us, free_us, cost, revision FROM chat ORDER BY user_id, chat_id",
    "SELECT user_id, advisor_id, granted_us, used_us FROM allowance ORDER BY user_id, advisor_id",
    "SELECT user_id, number, kind, amount, balance_after FROM ledger_entry ORDER BY user_id, number",
    "SELECT * FROM opening_account ORDER BY user_id",
    "SELECT * FROM opening_allowance ORDER BY user_id, advisor_id",
    "SELECT * FROM opening_chat ORDER BY user_id, chat_id",
]
OLD_COLUMNS = [
    'SELECT id, credits FROM {}"user" ORDER BY id',
    "SELECT id, user_id, advisor_id, duration FROM {}chat ORDER BY user_id, id",
    """
    SELECT
        id, user_id, advisor_id, chat_id, duration, credits_used, free_time_used, total_free_time_allocation, is_active,
        "timestamp", last_heartbeat_time
    FROM {}conversation_time_record ORDER BY user_id, chat_id
    """,
]


@pytest.fixture
def old(databases: Databases) -> Iterator[URL]:
    """An old system's database, without tables yet."""
    url = databases.create(empty=True)
    yield url
    databases.drop(url)


@pytest.fixture
def another(databases: Databases) -> Iterator[URL]:
    """A second database of talktime's."""
    url = databases.create()
    yield url
    databases.drop(url)


def bring(source: URL, into: URL, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Import, and expect that it goes well."""
    done = subprocess.run(
        [TALKTIME, "import", "--source", written(source), *options],
        env=environment(TALKTIME_DATABASE_URL=written(into)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr if "Traceback" in done.stderr else ""), done.stderr
    return done


def rows(url: URL, queries: list[str], schema: str = "") -> list[list[tuple[object, ...]]]:
    """Return what these queries find."""
    with connect(url) as connection:
        return [connection.execute(query.format(schema)).fetchall() for query in queries]


def sum_of(url: URL, what: str) -> int:
    """Return a sum."""
    with connect(url) as connection:
        row = connection.execute(f"SELECT coalesce((SELECT {what}), 0)").fetchone()
        assert row is not None
        return int(row[0])


async def audited(url: URL) -> list[str]:
    """Return what the audit finds."""
    async with open_service(url) as service:
        return await audit_lines(service.database)


async def test_an_old_database_moves_in_and_out_and_in_again(
    old: URL, database_url: URL, another: URL, databases: Databases, tmp_path: Path
) -> None:
    fill(old, RECORDS)
    began = time.monotonic()
    first = bring(old, database_url, "--report", tmp_path / "report.csv")
    took_s = time.monotonic() - began
    # The report: what was there before is what is here after, and what is listed.
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        report = [*csv.DictReader(file)]
    assert {"yes"} == {row["equal"] for row in report}
    outcomes = Counter(row["outcome"] for row in report)
    assert outcomes["imported"] == sum_of(database_url, "count(*) FROM opening_account") > RECORDS / 5
    assert {"imported", "refused"} == outcomes.keys()
    totals = {name: sum(micro(row[f"{name}_after"]) for row in report) for name in FIGURES}
    assert totals == {
        "seconds": sum_of(database_url, "sum(elapsed_us) FROM opening_chat"),
        "free_seconds": sum_of(database_url, "sum(free_us) FROM opening_chat"),
        "credits_used": sum_of(database_url, "sum(cost) FROM opening_chat"),
        "credits": sum_of(database_url, "sum(amount) FROM ledger_entry WHERE kind = 'opening'"),
    }
    assert sums_before(old) == {name: sum(micro(row[f"{name}_before"]) for row in report) for name in FIGURES}
    assert len(first.stdout.splitlines()) > RECORDS / 100  # each of the oddities is listed
    assert [] == await audited(database_url)

    # A second import changes nothing.
    before = rows(database_url, CONTENTS[-3:])
    again = bring(old, database_url, "--report", tmp_path / "again.csv")
    assert before == rows(database_url, CONTENTS[-3:])
    assert f"imported=0 already={outcomes['imported']}" in again.stderr
    with (tmp_path / "again.csv").open(encoding="utf-8", newline="") as file:
        assert {"imported before", "refused"} == {row["outcome"] for row in csv.DictReader(file)}

    # Out, once all leases are over, and into an empty database: equal in the old columns.
    await asyncio.sleep(16)
    back = databases.create(empty=True)
    began_out = time.monotonic()
    out = run("export-legacy", "--target", written(back), TALKTIME_DATABASE_URL=written(database_url))
    out_s = time.monotonic() - began_out
    assert (0, "") == (out.returncode, out.stderr if "Traceback" in out.stderr else "")
    old_columns = rows(database_url, OLD_COLUMNS, "talktime_legacy.")
    # Whose heartbeats have just ceased are active as in the old system, though no clock runs.
    assert sum_of(database_url, "count(*) FROM chat WHERE state = 'running'") == 0
    assert sum_of(database_url, "count(*) FROM talktime_legacy.conversation_time_record WHERE is_active") > 0
    assert old_columns == rows(back, OLD_COLUMNS)
    bring(back, another)
    assert old_columns == rows(another, OLD_COLUMNS, "talktime_legacy.")
    assert [] == await audited(another)
    databases.drop(back)
    sys.stdout.write(f"\n{RECORDS} records, {len(report)} users: in {took_s:.1f} s, out {out_s:.1f} s\n")


def sums_before(old: URL) -> dict[str, int]:
    """Add up the old tables of users who have an id, independently of the import; a chat's duration is its record's."""
    number = "CASE WHEN {0} <> 'NaN' THEN ({0}::numeric * 1000000)::bigint ELSE 0 END"
    of_chats = f"""sum({number.format("duration")}) FROM chat
    WHERE user_id IS NOT NULL AND NOT (duration >= 0 AND EXISTS (
        SELECT FROM conversation_time_record AS record
        WHERE record.user_id = chat.user_id AND record.chat_id = chat.id AND record.advisor_id IS NOT NULL
    ))"""
    of_records = {
        name: sum_of(old, f"sum({number.format(name)}) FROM conversation_time_record WHERE user_id IS NOT NULL")
        for name in ("duration", "free_time_used", "credits_used")
    }
    return {
        "seconds": of_records["duration"] + sum_of(old, of_chats),
        "free_seconds": of_records["free_time_used"],
        "credits_used": of_records["credits_used"],
        "credits": sum_of(old, f"""sum({number.format("credits")}) FROM "user" WHERE id IS NOT NULL"""),
    }


def micro(text: str) -> int:
    """Read a decimal of the report in millionths."""
    whole, decimals = text.split(".")
    return int(whole + decimals)


async def test_a_dry_run_says_all_of_it_and_writes_nothing(old: URL, database_url: URL, tmp_path: Path) -> None:
    fill(old, 300)
    tried = bring(old, database_url, "--dry-run", "--report", tmp_path / "dry.csv")
    assert [[], [], [], [], [], [], []] == rows(database_url, CONTENTS)
    done = bring(old, database_url, "--report", tmp_path / "real.csv")
    assert sorted(tried.stdout.splitlines()) == sorted(done.stdout.splitlines())
    assert sorted((tmp_path / "dry.csv").read_text().splitlines()) == sorted(
        (tmp_path / "real.csv").read_text().splitlines()
    )


def test_an_import_that_is_killed_goes_on_where_it_was(old: URL, database_url: URL, another: URL) -> None:
    fill(old, 4_000)
    for number in (signal.SIGKILL, signal.SIGTERM):
        had = sum_of(database_url, "count(*) FROM opening_account")
        with subprocess.Popen(
            [TALKTIME, "import", "--source", written(old)],
            env=environment(TALKTIME_DATABASE_URL=written(database_url)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                while process.poll() is None and sum_of(database_url, "count(*) FROM opening_account") == had:
                    time.sleep(0.01)
                process.send_signal(number)
                assert process.wait(60) != 0
            finally:
                process.kill()
    bring(old, database_url)
    bring(old, another)
    # All of it is there once; what runs, and until when, is another matter at another time.
    queries = [CONTENTS[0], CONTENTS[2], CONTENTS[-1]]
    assert rows(database_url, queries) == rows(another, queries)
    assert [] == asyncio.run(audited(database_url))


async def test_what_was_taken_over_goes_on_exactly_and_is_never_billed_again(old: URL, database_url: URL) -> None:
    with connect(old) as connection:
        connection.execute(USUAL)
        connection.execute("""INSERT INTO "user" VALUES ('u', 25)""")
        connection.execute("INSERT INTO chat VALUES ('live', 'u', 'a', 60), ('old', 'u', 'a', 30)")
        connection.execute(
            "INSERT INTO conversation_time_record VALUES"
            " ('r7', 'u', 'a', 'live', 60, 1.5, 180, 180, true, clock_timestamp(), clock_timestamp()),"
            " ('r2', 'u', 'a', 'old', 30, 0, 30, 180, false, '2026-01-01', '2026-01-01')"
        )
        beat(old)
    bring(old, database_url)
    async with open_service(database_url) as service:
        reading = await operations.read_chat(service, "u", "live")
        assert ChatState.RUNNING is reading.state
        assert 60 * S <= reading.elapsed_us < 75 * S
        # A credit a minute, from the import on: what was before is neither billed nor forgotten.
        cost = ceil_div(reading.elapsed_us - 60 * S, 60)
        assert (1_500_000 + cost, 25 * S - cost) == (reading.credits_used, reading.balance)
        await sweep(service.database, asyncio.Event())
        stopped = await operations.stop(service, "u", "live")
        entries, _ = await operations.read_ledger(service, "u", before=None, limit=10)
        cost = ceil_div(stopped.elapsed_us - 60 * S, 60)
        assert [("charge", -cost), ("opening", 25 * S)] == [(entry.kind, entry.amount) for entry in entries]
        # History, which a start takes up again; the free time is used up.
        history = await operations.read_chat(service, "u", "old")
        assert (ChatState.ENDED, 30 * S, 0) == (history.state, history.elapsed_us, history.free_left_us)
        await operations.start(service, "u", "old", advisor_id="a", key=None)
        await operations.stop(service, "u", "old")
        assert (await operations.read_chat(service, "u", "old")).elapsed_us > 30 * S
        assert [] == await audit_lines(service.database)


async def test_the_views_show_what_the_old_tables_said_until_a_chat_runs_again(old: URL, database_url: URL) -> None:
    with connect(old) as connection:
        connection.execute(USUAL)
        connection.execute("""INSERT INTO "user" VALUES ('u', 25.25)""")
        connection.execute(
            "INSERT INTO conversation_time_record VALUES"
            " ('r1', 'u', 'a', 'one', 60.9, 1.25, 30, 180, false, '2026-01-01', '2026-01-01'),"
            " ('r2', 'u', 'a', 'two', 10, 0, 45, 180, false, '2026-01-01', '2026-01-01')"
        )
    bring(old, database_url)
    shown = [
        """
        SELECT id, duration, credits_used, free_time_used, total_free_time_allocation, is_active
        FROM talktime_legacy.conversation_time_record ORDER BY id
        """
    ]
    two = ("r2", 10, Decimal(0), 45, 180, False)
    # Seconds that have passed, and of each record the free time that it told.
    assert [[("r1", 60, Decimal("1.25"), 30, 180, False), two]] == rows(database_url, shown)
    async with open_service(database_url) as service:
        await operations.start(service, "u", "one", advisor_id="a", key=None)
    # It is not written down yet that it runs on, and so not shown either; that it runs is.
    assert ("r1", 60, Decimal("1.25"), 30, 180, True) == rows(database_url, shown)[0][0]
    async with open_service(database_url) as service:
        await sweep(service.database, asyncio.Event())
    # Now its free time is the pair's.
    assert [[("r1", 60, Decimal("1.25"), 45, 180, True), two]] == rows(database_url, shown)
    through = [f"SELECT DISTINCT materialized_through FROM talktime_legacy.{view}" for view in VIEWS]
    assert rows(database_url, ["SELECT materialized_through FROM account"]) * 3 == rows(database_url, through)


async def test_who_is_alive_by_the_old_clock_runs_on_from_the_instant_of_the_new_one(
    old: URL, database_url: URL, clock: Clock
) -> None:
    clock.tick(700 * 24 * 3600 * S)  # long after any heartbeat that the old database can tell of
    with connect(old) as connection:
        connection.execute(USUAL)
        connection.execute(
            "INSERT INTO conversation_time_record VALUES"
            " ('r7', 'u', 'a', 'c', 60, 1.5, 0, 180, true, clock_timestamp(), clock_timestamp())"
        )
    bring(old, database_url)
    async with open_service(database_url) as service:
        reading = await operations.read_chat(service, "u", "c")
    assert (ChatState.RUNNING, 60 * S) == (reading.state, reading.elapsed_us)
    assert reading.as_of == reading.materialized_through


async def test_an_account_that_is_there_already_is_left_alone_and_listed(old: URL, database_url: URL) -> None:
    with connect(old) as connection:
        connection.execute(USUAL)
        connection.execute("""INSERT INTO "user" VALUES ('u', 25)""")
    async with open_service(database_url) as service:
        await operations.start(service, "u", "c", advisor_id="a", key=None)
    before = rows(database_url, CONTENTS)
    done = bring(old, database_url)
    assert before == rows(database_url, CONTENTS)
    assert "u\tuser\tthere is an account already that was not imported" in done.stdout
    assert "credits=25.000000" in done.stdout


async def test_other_names_are_found_or_mapped_and_written_back_to(old: URL, database_url: URL, tmp_path: Path) -> None:
    with connect(old) as connection:
        connection.execute(CAMEL_CASE)
        connection.execute("""INSERT INTO product."Users" VALUES (7, 25, 'seven@example.com')""")
        connection.execute("""INSERT INTO product."Chats" VALUES (1, 7, 3, 60)""")
        connection.execute(
            """INSERT INTO product."conversationTimeRecord"
            VALUES (11, 7, 3, 1, 60, 2, 45, 180, 1, '2026-01-01 00:00', '2026-01-01 00:01')"""
        )
        connection.execute("""ALTER TABLE product."conversationTimeRecord" RENAME "lastHeartbeatTime" TO "pingedAt" """)
    unmapped = run("import", "--source", written(old), TALKTIME_DATABASE_URL=written(database_url))
    assert unmapped.returncode == 1
    assert "the column 'last_heartbeat_time' of the old table product.conversationTimeRecord is not there" in (
        unmapped.stderr
    )
    mapping = tmp_path / "names.toml"
    mapping.write_text('[record]\nlast_heartbeat_time = "pingedAt"\n[units]\ntime_zone = "Europe/Berlin"\n')
    bring(old, database_url, "--mapping", mapping)
    assert [[("7", "1", "3", 60, 45, "2026-01-01T00:00")]] == rows(
        database_url,
        [
            """
            SELECT
                user_id, chat_id, advisor_id, duration, free_time_used,
                to_char("timestamp" AT TIME ZONE 'Europe/Berlin', 'YYYY-MM-DD"T"HH24:MI')
            FROM talktime_legacy.conversation_time_record
            """
        ],
    )
    async with open_service(database_url) as service:
        await operations.start(service, "7", "2", advisor_id="3", key=None)
        await operations.stop(service, "7", "2")
        await operations.start(service, "7", "1", advisor_id="3", key=None)
        await operations.stop(service, "7", "1")
    for updated, added in ((1, 1), (2, 0)):
        done = run(
            "export-legacy",
            "--target",
            written(old),
            "--mapping",
            mapping,
            TALKTIME_DATABASE_URL=written(database_url),
        )
        assert done.returncode == 0, done.stderr
        assert [
            "product.Users\t1 updated\t0 added",
            f"product.Chats\t{updated} updated\t{added} added",
            f"product.conversationTimeRecord\t{updated} updated\t{added} added",
        ] == done.stdout.splitlines()
    with connect(old) as connection:
        assert connection.execute('SELECT * FROM product."Users"').fetchall() == [(7, 25, "seven@example.com")]
        records = """
            SELECT id, "chatId", duration, "isActive", "freeTimeUsed" FROM product."conversationTimeRecord" ORDER BY id
        """
        assert [(1, 2, 0, 0, 45), (11, 1, 60, 0, 45)] == connection.execute(records).fetchall()
        times = """SELECT "timestamp"::text FROM product."conversationTimeRecord" WHERE id = 11"""
        assert [("2026-01-01 00:00:00",)] == connection.execute(times).fetchall()


def test_mistakes_are_told_and_change_nothing(old: URL, database_url: URL, tmp_path: Path) -> None:
    here = {"TALKTIME_DATABASE_URL": written(database_url)}
    missing = run("import", "--source", written(old), **here)
    assert (1, True) == (missing.returncode, "the old table 'user' is not there" in missing.stderr)
    nowhere = run("import", "--source", NOWHERE, **here)
    assert (75, True) == (nowhere.returncode, "the old database does not answer" in nowhere.stderr)
    no_url = run("import", "--source", "mysql://host/db", **here)
    assert (2, True) == (no_url.returncode, "must be a postgresql:// URL" in no_url.stderr)
    mapping = tmp_path / "names.toml"
    mapping.write_text("[records]\n")
    wrong = run("import", "--source", written(old), "--mapping", mapping, **here)
    assert (2, True) == (wrong.returncode, "sections that mean nothing: records" in wrong.stderr)
    no_file = run("import", "--source", written(old), "--mapping", tmp_path / "none.toml", **here)
    assert (2, True) == (no_file.returncode, "cannot read the mapping" in no_file.stderr)
    with connect(old) as connection:
        connection.execute("CREATE TABLE chat (id text)")
    partly = run("export-legacy", "--target", written(old), **here)
    assert (1, True) == (partly.returncode, "is not there" in partly.stderr)
