"""The commands for operators as people run them, and the words they use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import jwt
import pendulum
import pytest
from sqlalchemy.engine import URL

from talktime.keys import ServiceKey
from talktime.meter.state import RateCard, Tariff
from talktime.meter.units import parse_credits
from talktime.store.ledger import LedgerEntry
from talktime.terminal import (
    card_in_words,
    clock_text,
    credited_in_words,
    credits_in_words,
    duration_in_words,
    key_line,
    tariff_in_words,
    utc_text,
    wait_in_words,
)
from tests.database import connect
from tests.program import NOWHERE, TALKTIME, environment, on_terminal, run, written

S = 1_000_000
NOON = 1_767_268_800_000_000  # 2026-01-01T12:00:00Z


@pytest.fixture
def talktime(database_url: URL) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command on the test's database."""

    def talktime(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run(*arguments, TALKTIME_DATABASE_URL=written(database_url), TZ="Europe/Berlin")

    return talktime


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a command did its work without a word of complaint, and return the one line that it printed."""
    assert (0, "") == (done.returncode, done.stderr)
    [line] = done.stdout.splitlines()
    return line


def refused(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Check that a command failed, and return the one line that says why."""
    assert (code, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert line.startswith("talktime: ")
    return line.removeprefix("talktime: ")


# --- service keys -----------------------------------------------------------------------------------------------------


def test_a_new_key_is_alone_on_standard_output_and_kept_as_a_hash(
    talktime: Callable[..., subprocess.CompletedProcess[str]], database_url: URL
) -> None:
    done = talktime("key", "new", "shop")
    assert 0 == done.returncode
    assert re.fullmatch(r"tt_[A-Za-z0-9_-]{43}\n", done.stdout)
    assert "shown only now" in done.stderr
    assert done.stdout.strip() not in done.stderr
    with connect(database_url) as connection:
        row = connection.execute("SELECT name, octet_length(digest), revoked_at FROM service_key").fetchone()
    assert ("shop", 32, None) == row


def test_keys_are_listed_in_lines_for_programs_with_the_local_time(
    talktime: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert (0, "") == (talktime("key", "list").returncode, talktime("key", "list").stdout)
    for name in ("b", "a"):
        assert 0 == talktime("key", "new", name).returncode
    assert "'b' is revoked for ever" in said_by(talktime("key", "revoke", "b"))
    revoked, in_force = talktime("key", "list").stdout.splitlines()
    when = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+0[12]:00"
    assert re.fullmatch(rf"b\t{when}\t{when}", revoked)
    assert re.fullmatch(rf"a\t{when}\t", in_force)
    # What is revoked stays so, since when it first was.
    assert 0 == talktime("key", "revoke", "b").returncode
    assert revoked == talktime("key", "list").stdout.splitlines()[0]


def test_keys_are_a_table_on_a_terminal(
    talktime: Callable[..., subprocess.CompletedProcess[str]], database_url: URL
) -> None:
    url = {"TALKTIME_DATABASE_URL": written(database_url)}
    with on_terminal("key", "list", **url) as terminal:
        terminal.wait_for("There is no key; `talktime key new NAME` makes one.")
    talktime("key", "new", "shop")
    with on_terminal("key", "list", **url) as terminal:
        terminal.wait_for(r"name .* made .* revoked(?s:.*)shop .* [AP]M \((a few|\d+) seconds? ago\)")


def test_a_key_cannot_be_made_twice_nor_revoked_if_there_is_none(
    talktime: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    talktime("key", "new", "shop")
    assert "'shop'" in refused(talktime("key", "new", "shop"))
    talktime("key", "revoke", "shop")
    assert "'shop'" in refused(talktime("key", "new", "shop"))
    assert "there is no key named 'stop'" == refused(talktime("key", "revoke", "stop"))
    for name in ("", "a b", "environment", "x" * 65):
        assert f"a key cannot be named {name!r}" in refused(talktime("key", "new", name))


def test_without_a_url_the_embedded_database_of_the_home_is_meant(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert 0 == run("migrate", "--home", home).returncode
    assert run("key", "new", "shop", "--home", home).stdout.startswith("tt_")
    assert run("key", "list", TALKTIME_HOME=str(home)).stdout.startswith("shop\t")


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_is_signed_with_the_secret_of_the_home(tmp_path: Path) -> None:
    user = said_by(run("token", "u1", "--home", tmp_path))
    secret = (tmp_path / "token_secret").read_text().strip()
    claims = jwt.decode(user, secret, algorithms=["HS256"], audience="talktime", issuer="talktime")
    assert ("u1", 3600) == (claims["sub"], claims["exp"] - claims["iat"])
    assert "role" not in claims
    advisor = said_by(run("token", "a1", "--advisor", "--seconds", "60", "--home", tmp_path))
    claims = jwt.decode(advisor, secret, algorithms=["HS256"], audience="talktime", issuer="talktime")
    assert ("a1", "advisor", 60) == (claims["sub"], claims["role"], claims["exp"] - claims["iat"])


def test_a_token_is_signed_as_the_settings_say(tmp_path: Path) -> None:
    secret = "x" * 32
    product = {
        "TALKTIME_TOKEN_SECRET": secret,
        "TALKTIME_TOKEN_ISSUER": "https://shop.example",
        "TALKTIME_TOKEN_AUDIENCE": "meter",
    }
    token = said_by(run("token", "u1", "--home", tmp_path, **product))
    claims = jwt.decode(token, secret, algorithms=["HS256"], audience="meter", issuer="https://shop.example")
    assert "u1" == claims["sub"]
    assert not list(tmp_path.iterdir())


def test_no_token_is_made_where_the_host_product_signs_them(tmp_path: Path) -> None:
    product = {
        "TALKTIME_TOKEN_JWKS": str(tmp_path / "jwks.json"),
        "TALKTIME_TOKEN_ALGORITHM": "RS256",
        "TALKTIME_TOKEN_ISSUER": "https://shop.example",
    }
    assert refused(run("token", "u1", "--home", tmp_path, **product))


# --- credits ----------------------------------------------------------------------------------------------------------


def test_credits_are_added_and_taken_and_told_with_the_new_balance(
    talktime: Callable[..., subprocess.CompletedProcess[str]], database_url: URL
) -> None:
    assert "u1: grant of 25 credits added to the balance, which is now 25 credits (ledger entry 1)" == said_by(
        talktime("credit", "u1", "25")
    )
    assert "u1: refund of 0.5 credits taken from the balance, which is now 24.5 credits (ledger entry 2)" == said_by(
        talktime("credit", "u1", "0.5", "--kind", "refund", "--reason", "a bad line")
    )
    with connect(database_url) as connection:
        rows = connection.execute("SELECT kind, amount, memo FROM ledger_entry ORDER BY number").fetchall()
    assert [("grant", 25 * S, ""), ("refund", -S // 2, "a bad line")] == rows


def test_a_repeated_key_changes_nothing_and_says_so(
    talktime: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    credit = ("credit", "u1", "5", "--key", "order 1")
    assert "now 5 credits" in said_by(talktime(*credit))
    assert "now 7 credits" in said_by(talktime("credit", "u1", "2"))
    again = said_by(talktime(*credit))
    assert again.startswith("u1: nothing changed, for this key made the grant of 5 credits on ")
    assert again.endswith(" (ledger entry 1); the balance is 7 credits")
    assert "different request" in refused(talktime("credit", "u1", "6", "--key", "order 1"))


def test_more_than_there_is_cannot_be_taken(talktime: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    talktime("credit", "u1", "1")
    assert "the balance is 1.000000" == refused(talktime("credit", "u1", "1.000001", "--kind", "correction"))


# --- cards ------------------------------------------------------------------------------------------------------------


def test_a_card_is_changed_in_part(talktime: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "a1: 1 credit a minute, the first 3 minutes free, charged exactly (the default card)" == said_by(
        talktime("advisor", "a1")
    )
    assert "a1: 1.5 credits a minute, the first 3 minutes free, charged exactly" == said_by(
        talktime("advisor", "a1", "--credits-per-minute", "1.5")
    )
    assert "a1: 1.5 credits a minute, no free time, in blocks of 60 s, then 6 s" == said_by(
        talktime("advisor", "a1", "--free-seconds", "0", "--first-seconds", "60", "--increment-seconds", "6")
    )
    assert "a1: 1.5 credits a minute, no free time, in blocks of 60 s, then 6 s" == said_by(talktime("advisor", "a1"))


# --- trouble ----------------------------------------------------------------------------------------------------------

COMMANDS = [["key", "list"], ["credit", "u1", "5"], ["advisor", "a1"], ["watch", "u1", "c1"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_database_is_told_in_one_line(command: list[str]) -> None:
    assert "the database is not available" == refused(run(*command, TALKTIME_DATABASE_URL=NOWHERE), 75)


def test_a_database_without_tables_is_told_in_one_line(empty_database_url: URL) -> None:
    done = run("key", "new", "shop", TALKTIME_DATABASE_URL=written(empty_database_url))
    assert "run `talktime migrate`" in refused(done, 75)


def test_a_credit_whose_outcome_is_unknown_says_how_to_repeat_it(
    talktime: Callable[..., subprocess.CompletedProcess[str]], database_url: URL
) -> None:
    talktime("credit", "u1", "5")
    with connect(database_url) as connection, connection.transaction():
        connection.execute("SELECT FROM account WHERE user_id = 'u1' FOR UPDATE")
        line = refused(talktime("credit", "u1", "5"), 75)
    found = re.search(r"to repeat this without doing it twice, add --key (\S+)$", line)
    assert found
    assert "now 10 credits" in said_by(talktime("credit", "u1", "5", "--key", found[1]))


def test_output_that_nobody_reads_is_no_error(
    talktime: Callable[..., subprocess.CompletedProcess[str]], database_url: URL
) -> None:
    talktime("key", "new", "shop")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [TALKTIME, "key", "list"],
            env=environment(TALKTIME_DATABASE_URL=written(database_url)),
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (0, "") == (done.returncode, done.stderr)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("us", "text"),
    [(0, "0:00:00"), (S - 1, "0:00:00"), (S, "0:00:01"), (61 * S, "0:01:01"), (360_000 * S + 5, "100:00:00")],
)
def test_a_clock_shows_the_seconds_that_have_passed(us: int, text: str) -> None:
    assert text == clock_text(us)


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0 seconds"),
        (S, "1 second"),
        (S // 2, "0.5 seconds"),
        (90 * S, "1 minute 30 seconds"),
        (86_400 * S, "1 day"),
        (90 * S + 1, "90.000001 seconds"),
    ],
)
def test_a_duration_is_said_exactly(us: int, text: str) -> None:
    assert text == duration_in_words(us)


@pytest.mark.parametrize(("us", "text"), [(-1, "0 seconds"), (1, "1 second"), (S + 1, "2 seconds")])
def test_a_wait_is_said_in_seconds_begun(us: int, text: str) -> None:
    assert text == wait_in_words(us)


@pytest.mark.parametrize(
    ("amount", "text"),
    [("0", "0 credits"), ("1", "1 credit"), ("10", "10 credits"), ("1.50", "1.5 credits"), ("-1", "-1 credits")],
)
def test_credits_are_said_without_idle_zeros(amount: str, text: str) -> None:
    assert text == credits_in_words(parse_credits(amount))


@pytest.mark.parametrize(
    ("first_s", "increment_s", "text"),
    [
        (0, 0, "charged exactly"),
        (60, 60, "in blocks of 60 s"),
        (0, 60, "in blocks of 60 s"),
        (60, 6, "in blocks of 60 s, then 6 s"),
        (60, 0, "the first 60 s charged as a whole, then exactly"),
    ],
)
def test_blocks_are_said_as_in_telephony(first_s: int, increment_s: int, text: str) -> None:
    tariff = Tariff(S, first_s * S, increment_s * S)
    assert f"1 credit a minute, {text}" == tariff_in_words(tariff)
    assert f"1 credit a minute, the first 2 seconds free, {text}" == card_in_words(RateCard(tariff, 2 * S))


def test_instants_are_written_as_the_api_does_and_keys_with_the_local_time() -> None:
    assert ("2026-01-01T12:00:00.000001Z", "-") == (utc_text(NOON + 1), utc_text(None))
    with pendulum.tz.test_local_timezone(pendulum.timezone("Asia/Tokyo")):
        assert "k\t2026-01-01T21:00:00+09:00\t" == key_line(ServiceKey("k", NOON, None))


def test_a_credit_that_was_made_before_says_when() -> None:
    entry = LedgerEntry(
        user_id="u", number=3, kind="grant", amount=S, balance_after=S, happened_at=NOON, recorded_at=NOON, memo=""
    )
    again = credited_in_words(entry, 2 * S, again=True)
    assert "u: nothing changed, for this key made the grant of 1 credit on Thu, Jan 1, 2026 " in again
    assert again.endswith(" (ledger entry 3); the balance is 2 credits")
