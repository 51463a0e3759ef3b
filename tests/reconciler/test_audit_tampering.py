"""Every kind of tampering that the rest of what is stored betrays is found, and named; and what cannot be is listed."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from reconciler.differences import LISTED_MAX
from tests.database import SIMULATED_START_US, connect, simulated_clock
from tests.reconciler.rich_history import build, found_in, keep, restore
from tests.support import S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import URL

    from reconciler.differences import Findings
    from tests.database import Databases

SECOND = "interval '1s'"


@pytest.fixture(scope="module")
def history(databases: Databases) -> Iterator[URL]:
    """A database with a rich, legal history."""
    url = databases.create()
    with simulated_clock(url) as clock:
        asyncio.run(build(url, clock))
    keep(url)
    yield url
    databases.drop(url)


@pytest.fixture
def legal(history: URL) -> Iterator[URL]:
    """The same, to be tampered with."""
    yield history
    restore(history)


def _chat(change: str, chat_id: str) -> str:
    return f"UPDATE chat SET {change} WHERE user_id = 'u' AND chat_id = '{chat_id}'"


def _segment(change: str, chat_id: str, which: str = "<") -> str:
    """The first segment of a chat, or (">") the last."""
    extreme = "min" if which == "<" else "max"
    return (
        f"UPDATE segment SET {change} WHERE user_id = 'u' AND chat_id = '{chat_id}' AND started_at ="
        f" (SELECT {extreme}(started_at) FROM segment WHERE user_id = 'u' AND chat_id = '{chat_id}')"
    )


def _entry(change: str, number: int) -> str:
    return f"UPDATE ledger_entry SET {change} WHERE user_id = 'u' AND number = {number}"


def _account(change: str) -> str:
    return f"UPDATE account SET {change} WHERE user_id = 'u'"


def _allowance(change: str, advisor_id: str) -> str:
    return f"UPDATE allowance SET {change} WHERE user_id = 'u' AND advisor_id = '{advisor_id}'"


# An overlap in which no figure of time or money is wrong by itself: the first segment of "left" seems to have run while
# the second did.
_OVERLAP = _segment(f"started_at = started_at + 6 * {SECOND}, ended_at = ended_at + 6 * {SECOND}", "left")

TAMPERINGS = [
    # account
    (_account("balance = balance + 1"), "balance"),
    (_account(f"materialized_through = materialized_through - {SECOND}"), "chat 'running': elapsed_us"),
    (_account("materialized_through = '2026-01-01'"), "materialized_through"),
    (_account("materialized_through = materialized_through + interval '1h'"), "chat 'lapsed': state"),
    (_account("next_entry = next_entry + 1"), "next_entry"),
    (_account(f"due_at = due_at + {SECOND}"), "due_at"),
    (_account("due_at = NULL"), "due_at"),
    # allowance
    (_allowance("granted_us = granted_us + 1", "blocks"), "allowance with advisor 'blocks': granted_us"),
    (_allowance("granted_us = 5", "exact"), "allowance with advisor 'exact': granted_us"),
    (_allowance("used_us = used_us - 1", "blocks"), "allowance with advisor 'blocks': used_us"),
    (_allowance("used_us = used_us + 1", "free"), "allowance with advisor 'free': used_us"),
    ("DELETE FROM allowance WHERE user_id = 'u' AND advisor_id = 'free'", "allowance with advisor 'free': granted_us"),
    (
        "INSERT INTO allowance SELECT bucket, user_id, 'nobody', 0, 0 FROM account WHERE user_id = 'u'",
        "allowance with advisor 'nobody'",
    ),
    # chat: who and in which state
    (_chat("advisor_id = 'exact'", "ended"), "chat 'ended': segment of .*: advisor"),
    (_chat("state = 'paused'", "lapsed"), "chat 'lapsed': last_heartbeat_at"),
    (_chat("state = 'ended'", "lapsed"), "chat 'lapsed': revision"),
    (_chat("state = 'exhausted'", "lapsed"), "chat 'lapsed': stop_reason"),
    (_chat("state = 'abandoned'", "lapsed"), "chat 'lapsed': state"),
    (_chat("state = 'abandoned'", "left"), "chat 'left': state"),
    (_chat("state = 'lapsed'", "left"), "chat 'left': stop_reason"),
    (_chat("state = 'paused'", "abandoned"), "chat 'abandoned': state"),
    (_chat("state = 'ended'", "abandoned"), "chat 'abandoned': revision"),
    (_chat("state = 'paused'", "ended"), "chat 'ended': stop_reason"),
    (_chat("state = 'paused'", "exhausted"), "chat 'exhausted': stop_reason"),
    # chat: its price and its count
    (_chat("rate = rate + 1", "running"), "chat 'running': cost"),
    (_chat("rate = rate + 1", "left"), "chat 'left': count_us"),
    (_chat("first_us = 1", "left"), "chat 'left': count_us"),
    (_chat("increment_us = 1", "left"), "chat 'left': count_us"),
    (_chat("count_us = count_us + 1", "left"), "chat 'left': count_us"),
    (_chat("count_us = 0", "left"), "chat 'left': revision"),
    (_chat("count_us = count_us + 1", "running"), "chat 'running': open segment: free_us"),
    (_chat("count_us = 5, opened_count_us = 5", "running"), "chat 'running': open segment: count_us"),
    (_chat("count_us = 8000000, opened_count_us = 1", "left"), "chat 'left': opened_count_us"),
    # chat: signs of life and settings
    (_chat(f"lease_us = lease_us + {S}", "lapsed"), "chat 'lapsed': last_heartbeat_at"),
    (_chat("lease_us = 1", "running"), "chat 'running': state"),
    (_chat("abandon_after_us = 15000001", "lapsed"), "chat 'lapsed': state"),
    (_chat(f"abandon_after_us = {900 * S}", "abandoned"), "chat 'abandoned': state"),
    (_chat(f"last_heartbeat_at = last_heartbeat_at + {SECOND}", "lapsed"), "chat 'lapsed': last_heartbeat_at"),
    (_chat(f"last_heartbeat_at = last_heartbeat_at - {SECOND}", "lapsed"), "chat 'lapsed': last_heartbeat_at"),
    (_chat(f"last_heartbeat_at = last_heartbeat_at - 20 * {SECOND}", "left"), "chat 'left': last_heartbeat_at"),
    (_chat(f"last_heartbeat_at = last_heartbeat_at - 7 * {SECOND}", "running"), "chat 'running': last_heartbeat_at"),
    (_chat(f"last_heartbeat_at = last_heartbeat_at - 20 * {SECOND}", "ended"), "chat 'ended': last_heartbeat_at"),
    (_chat("last_heartbeat_at = '2026-01-01'", "exhausted"), "chat 'exhausted': last_heartbeat_at"),
    # chat: when it began, ran and stopped
    (_chat(f"started_at = started_at + {SECOND}", "left"), "chat 'left': started_at"),
    (_chat(f"started_at = started_at - {SECOND}", "left"), "chat 'left': revision"),
    (_chat("started_at = started_at + interval '1d'", "refused"), "chat 'refused': stopped_at"),
    (_chat("revision = revision - 1", "left"), "chat 'left': revision"),
    (_chat("revision = 0", "running"), "chat 'running': revision"),
    (_chat(f"stopped_at = stopped_at + {SECOND}", "left"), "chat 'left': stopped_at"),
    (_chat(f"stopped_at = stopped_at - {SECOND}", "left"), "chat 'left': stopped_at"),
    (_chat(f"stopped_at = stopped_at + {SECOND}", "ended"), "chat 'ended': stopped_at"),
    (_chat(f"stopped_at = stopped_at + {SECOND}", "lapsed"), "chat 'lapsed': stopped_at"),
    (_chat(f"stopped_at = stopped_at - {SECOND}", "lapsed"), "chat 'lapsed': stopped_at"),
    (_chat("stopped_at = '2026-01-02'", "refused"), "chat 'refused': stopped_at"),
    (_chat("stop_reason = 'switched'", "left"), "chat 'left': revision"),
    (_chat("stop_reason = 'lapsed'", "refused"), "chat 'refused': stop_reason"),
    (_chat("stop_reason = 'lapsed'", "ended"), "chat 'ended': stop_reason"),
    (_chat("stop_reason = 'exhausted'", "left"), "chat 'left': stop_reason"),
    (_chat("exhausts_at = exhausts_at + interval '1us'", "running"), "chat 'running': exhausts_at"),
    (_account("balance = balance - 1"), "chat 'running': exhausts_at"),
    (_chat(f"opened_at = opened_at + {SECOND}", "running"), "chat 'running': elapsed_us"),
    (_chat("opened_at = opened_at - interval '5min'", "running"), "chat 'running': started_at"),
    # chat: its totals
    (_chat("elapsed_us = elapsed_us + 1", "left"), "chat 'left': elapsed_us"),
    (_chat("free_us = free_us - 1", "senior"), "chat 'senior': free_us"),
    (_chat("cost = cost + 1", "left"), "chat 'left': cost"),
    (_chat("cost = cost + 1", "running"), "chat 'running': cost"),
    # segment
    (_segment(f"started_at = started_at - {SECOND}", "left", ">"), "chat 'left': segment of .*: free and paid time"),
    (_segment(f"ended_at = ended_at + {SECOND}", "left"), "chat 'left': segment of .*: free and paid time"),
    (_OVERLAP, "chat 'left': segment of .*: begin"),
    (_segment("advisor_id = 'exact'", "free"), "chat 'free': segment of .*: advisor"),
    (_segment("reason = 'exhausted'", "left"), "chat 'left': segment of .*: reason"),
    (_segment("reason = 'exhausted'", "free"), "chat 'free': segment of .*: reason"),
    (_segment("reason = 'paused'", "ended"), "chat 'ended': revision"),
    (_segment("reason = 'switched'", "left", ">"), "chat 'left': revision"),
    (_segment("reason = 'paused'", "lapsed"), "chat 'lapsed': stop_reason"),
    (_segment("rate = rate + 1", "senior"), "chat 'senior': segment of .*: cost"),
    (_segment("rate = 1", "free"), "chat 'free': revision"),
    (_segment("first_us = 0, increment_us = 1", "left"), "chat 'left': segment of .*: count_us"),
    (_segment("first_us = 60000000", "senior"), "chat 'senior': segment of .*: cost"),
    (_segment("increment_us = 60000000", "senior"), "chat 'senior': segment of .*: cost"),
    (_segment("count_us = 1", "left"), "chat 'left': segment of .*: count_us"),
    (_segment("count_us = count_us + 1", "left", ">"), "chat 'left': segment of .*: count_us"),
    (_segment("count_us = 0", "left", ">"), "chat 'left': revision"),
    (_segment("free_us = free_us + 1, paid_us = paid_us - 1", "senior"), "chat 'senior': segment of .*: free_us"),
    (_segment("paid_us = paid_us + 1", "left"), "chat 'left': segment of .*: free and paid time"),
    (_segment("cost = cost + 1", "left"), "chat 'left': segment of .*: cost"),
    ("DELETE FROM segment WHERE user_id = 'u' AND chat_id = 'free'", "chat 'free': elapsed_us"),
    ("DELETE FROM segment WHERE user_id = 'u' AND chat_id = 'senior'", "ledger entry 3: amount"),
    # ledger_entry
    (_entry("number = 99", 12), "ledger entry 99: number"),
    (
        "DELETE FROM ledger_entry WHERE user_id = 'u' AND number = 3",
        "chat 'senior': segment of .*: charge in the ledger",
    ),
    ("DELETE FROM ledger_entry WHERE user_id = 'u' AND number = 3", "ledger entry 4: number"),
    ("DELETE FROM ledger_entry WHERE user_id = 'u' AND number = 8", "balance at .*"),
    ("DELETE FROM ledger_entry WHERE user_id = 'u' AND number = 12", "next_entry"),
    (_entry("kind = 'compensation'", 8), "ledger entry 8: request_hash"),
    (_entry("amount = amount + 1", 8), "ledger entry 8: request_hash"),
    (_entry("amount = amount + 1", 8), "balance"),
    (_entry("amount = amount + 1", 3), "ledger entry 3: amount"),
    (_entry("balance_after = balance_after + 1", 3), "ledger entry 3: balance_after"),
    (_entry(f"happened_at = happened_at - {SECOND}", 3), "ledger entry 3: happened_at"),
    (_entry(f"happened_at = happened_at - {SECOND}", 8), "ledger entry 8: happened_at"),
    (_entry("happened_at = '2026-01-01 00:05', recorded_at = '2026-01-01 00:05'", 1), "ledger entry 2: happened_at"),
    (_entry("happened_at = '2026-01-01 00:05', recorded_at = '2026-01-01 00:05'", 1), "balance at .*"),
    (_entry(f"recorded_at = recorded_at - 6 * {SECOND}", 4), "ledger entry 4: recorded_at"),
    (_entry("recorded_at = '2026-01-01 00:00:10'", 3), "ledger entry 3: recorded_at"),
    (_entry("recorded_at = '2026-01-01 00:00:35'", 3), "ledger entry 4: recorded_at"),
    (_entry("recorded_at = '2026-01-01 00:05'", 4), "ledger entry 5: recorded_at"),
    (_entry("recorded_at = '2027-01-01'", 11), "materialized_through"),
    (_entry("memo = 'another'", 1), "ledger entry 1: request_hash"),
    (_entry("memo = 'another'", 3), "ledger entry 3: memo"),
    (_entry("request_hash = sha256('')", 1), "ledger entry 1: request_hash"),
    (_entry("chat_id = 'left'", 1), "ledger entry 1: chat_id"),
    (_entry("segment_started_at = happened_at", 1), "ledger entry 1: segment_started_at"),
    (_entry("chat_id = 'ghost'", 3), "ledger entry 3: amount"),
    (_entry("chat_id = 'zzz'", 3), "chat 'senior': segment of .*: charge in the ledger"),
    (_entry(f"segment_started_at = segment_started_at + {SECOND}", 3), "ledger entry 3: amount"),
    (_entry(f"segment_started_at = segment_started_at - {SECOND}", 3), "ledger entry 3: amount"),
]


def _tamper(url: URL, *changes: str) -> Findings:
    """Change rows behind the product's back, and return what is found in the account of `u`."""
    with connect(url) as connection, connection.transaction():
        connection.execute("SET session_replication_role = replica")  # foreign keys are not what is tried here
        for change in changes:
            assert connection.execute(change).rowcount == 1, change
    [findings] = asyncio.run(found_in(url))
    assert findings.user_id == "u"
    return findings


@pytest.mark.parametrize(("change", "what"), TAMPERINGS)
def test_tampering_is_found_and_named(legal: URL, change: str, what: str) -> None:
    findings = _tamper(legal, change)
    assert any(re.fullmatch(what, d.what) for d in findings.listed), "\n".join(findings.lines())


def test_nothing_differs_before(legal: URL) -> None:
    assert [] == asyncio.run(found_in(legal))


def test_a_row_in_another_bucket_is_found(legal: URL) -> None:
    with connect(legal) as connection:
        connection.execute("SET session_replication_role = replica")
        for table in ("account", "allowance", "chat", "segment", "ledger_entry"):
            connection.execute(f"UPDATE {table} SET bucket = bucket + 1 WHERE user_id = 'u'")
    [findings] = asyncio.run(found_in(legal))
    assert ["bucket"] == [difference.what for difference in findings.listed]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_chat("exhausts_at = NULL", "running"), id="it is not known"),
        pytest.param(_chat("exhausts_at = exhausts_at - interval '1us'", "running"), id="beats look closer, no more"),
        pytest.param(_chat("start_key = 'other'", "abandoned"), id="a key says nothing of what came with it"),
        pytest.param(_entry("idempotency_key = 'other'", 1), id="nor does this one"),
        pytest.param(_chat("revision = revision + 1", "left"), id="refreshes and lost answers count too"),
        pytest.param(
            _allowance("granted_us = 99000000", "free"), id="no tick was paid yet, and the card may have been"
        ),
        pytest.param(_chat(f"lease_us = {99 * S}", "left"), id="a setting, and no lease ended under it"),
        pytest.param(_chat("abandon_after_us = 399000000", "left"), id="a setting, and nothing came of it yet"),
        pytest.param(
            _chat(f"last_heartbeat_at = last_heartbeat_at - {SECOND}", "running"), id="between the start and the lease"
        ),
        pytest.param(_entry(f"recorded_at = recorded_at + {SECOND}", 4), id="a pass may have come later"),
        pytest.param(
            _segment(f"started_at = started_at + {SECOND}, ended_at = ended_at + {SECOND}", "free")
            + "; "
            + _chat(f"stopped_at = stopped_at + {SECOND}", "free"),
            id="free time, moved as a whole into a gap",
        ),
    ],
)
def test_what_the_rest_does_not_tell_is_not_found(legal: URL, change: str) -> None:
    with connect(legal) as connection:
        connection.execute(change)
    assert [] == asyncio.run(found_in(legal))


SINCE = [
    # A line of the ledger: when it was written.
    (_entry("balance_after = balance_after + 1", 4), "ledger entry 4: balance_after", 38),
    # A segment: its end; a missing charge: the same.
    (_segment("cost = cost + 1", "senior"), "chat 'senior': segment of .*: cost", 18),
    ("DELETE FROM ledger_entry WHERE user_id = 'u' AND number = 3", "chat 'senior': segment of .*: charge .*", 18),
    # A total: where the parts still added up to it, or its beginning.
    (_chat("elapsed_us = 4000000", "left"), "chat 'left': elapsed_us", 374),
    (_chat("elapsed_us = 4000001", "left"), "chat 'left': elapsed_us", 370),
    (_allowance("used_us = 9999999", "blocks"), "allowance with advisor 'blocks': used_us", 1),
    (_allowance("used_us = 7000000", "blocks"), "allowance with advisor 'blocks': used_us", 11),
    # The balance: the last line that was right.
    (_account("balance = balance + 1"), "balance", 402),
    (_entry("amount = amount + 1", 8), "balance", 51),
    # Fixed at the pair's first start.
    (_allowance("granted_us = granted_us + 1", "blocks"), "allowance with advisor 'blocks': granted_us", 1),
]


@pytest.mark.parametrize(("change", "what", "seconds"), SINCE)
def test_a_difference_says_since_when(legal: URL, change: str, what: str, seconds: int) -> None:
    findings = _tamper(legal, change)
    [since] = [d.since for d in findings.listed if re.fullmatch(what, d.what)]
    assert SIMULATED_START_US + seconds * S == since
    assert min(d.since for d in findings.listed) == findings.since


def test_a_difference_is_told_in_credits_and_dates(legal: URL) -> None:
    findings = _tamper(legal, _account("balance = balance + 1"))
    assert [
        "user 'u': balance is 460.000001, derived 460.000000; since 2026-01-01T00:06:42.000000Z",
    ] == findings.lines()
    assert {
        "user_id": "u",
        "since": "2026-01-01T00:06:42.000000Z",
        "differences": [
            {
                "what": "balance",
                "stored": "460.000001",
                "derived": "460.000000",
                "since": "2026-01-01T00:06:42.000000Z",
            }
        ],
        "unlisted": 0,
    } == findings.as_json()


def test_an_account_with_very_many_differences_lists_the_first_and_counts_the_rest(legal: URL) -> None:
    with connect(legal) as connection:
        connection.execute(
            "INSERT INTO ledger_entry SELECT bucket, user_id, 1000 + n, 'grant', 1, 1, happened_at, happened_at, '',"
            " 'n' || n, sha256(''), NULL, NULL FROM ledger_entry, generate_series(1, 500) n"
            " WHERE user_id = 'u' AND number = 1"
        )
    [findings] = asyncio.run(found_in(legal))
    assert LISTED_MAX == len(findings.listed)
    assert findings.count > 1000
    assert findings.count - LISTED_MAX == findings.unlisted == findings.as_json()["unlisted"]
    assert (
        f"user 'u': and {findings.unlisted} more; the first since 2026-01-01T00:00:00.000000Z" == findings.lines()[-1]
    )


def test_small_batches_and_pages_find_the_same(legal: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _tamper(legal, _segment("cost = cost + 1", "left"), _chat("elapsed_us = 0", "ended"))
    monkeypatch.setattr("talktime.store.history.PAGE_ROWS", 1)
    assert [whole] == asyncio.run(found_in(legal, batch_accounts=1))
