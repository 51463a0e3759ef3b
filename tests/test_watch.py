"""`talktime watch`: what it shows at which time, and the program on a terminal of its own."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise

import pendulum
import psycopg
import pytest
from sqlalchemy.engine import URL

from talktime import operations
from talktime.meter.reading import Reading, Shown, show
from talktime.meter.state import ChatState, CreditKind, Policy, RateCard, Scope, StopReason, Tariff
from talktime.meter.units import MICRO
from talktime.watch import ServerTime, View, Watched, line, outage_in_words, runs_out_in_words
from tests.database import Databases, connect
from tests.program import PATIENCE_S, TALKTIME, Terminal, environment, on_terminal, run, written
from tests.support import open_service

S = MICRO
NOON = 1_767_268_800_000_000  # 2026-01-01T12:00:00Z

# Free for 2 seconds, then a credit a second, until the lease ends after 15.
RUNNING = Reading(
    user_id="u1",
    chat_id="c1",
    advisor_id="a1",
    state=ChatState.RUNNING,
    revision=1,
    as_of=NOON,
    server_time=NOON,
    elapsed_us=0,
    free_used_us=0,
    free_left_us=2 * S,
    credits_used=0,
    balance=25 * S,
    tariff=Tariff(60 * S),
    count_us=0,
    accrues_until=NOON + 15 * S,
    paid_from=NOON + 2 * S,
    free_until=NOON + 2 * S,
    exhausts_at=NOON + 27 * S,
    started_at=NOON,
    stopped_at=None,
    stop_reason=None,
    materialized_through=NOON,
)
PAUSED = RUNNING._replace(
    state=ChatState.PAUSED,
    revision=2,
    as_of=NOON + S,
    server_time=NOON + S,
    elapsed_us=S,
    free_used_us=S,
    free_left_us=S,
    accrues_until=None,
    paid_from=None,
    free_until=None,
    exhausts_at=None,
    stopped_at=NOON + S,
    stop_reason=StopReason.PAUSED,
)


def view_at(at: int, reading: Reading = RUNNING) -> View:
    return View(reading, at, show(reading, at), answered=True)


def looked(watched: Watched, monotonic: int) -> View:
    view = watched.look(monotonic)
    assert view
    return view


# --- the time ---------------------------------------------------------------------------------------------------------


def test_the_time_of_the_first_answer_is_that_of_its_middle() -> None:
    clock = ServerTime()
    clock.sample(100, 300, NOON)
    assert NOON == clock.now(200)
    assert NOON + 1_000 == clock.now(1_200)


def test_a_quick_answer_mends_the_time_and_a_slow_one_does_not_spoil_it() -> None:
    clock = ServerTime()
    clock.sample(0, S, NOON + 900_000)  # answered late: the middle is off by 400 ms
    assert NOON + 1_400_000 == clock.now(S)
    clock.sample(S, S + 2_000, NOON + S + 1_000)
    mended = clock.now(2 * S)
    assert abs(NOON + 2 * S - mended) <= 1_000
    clock.sample(2 * S, 5 * S, NOON + 2 * S + 10_000)
    assert abs(NOON + 5 * S - clock.now(5 * S)) <= 1_500


def test_a_database_whose_clock_was_set_is_believed() -> None:
    clock = ServerTime()
    clock.sample(0, 2_000, NOON)
    clock.sample(S, S + 2_000, NOON - 3_600 * S)
    assert NOON - 3_600 * S == clock.now(S + 1_000)


def test_clocks_that_drift_are_followed() -> None:
    clock = ServerTime()
    for second in range(0, 36_000, 5):  # for ten hours, 50 us a second too fast
        clock.sample(second * S, second * S + 2_000, NOON + second * (S + 50) + 1_000)
    assert abs(NOON + 36_000 * (S + 50) - clock.now(36_000 * S)) < 3_000


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_nothing_is_shown_before_the_first_reading() -> None:
    assert Watched().look(0) is None


def test_what_is_shown_goes_on_from_the_reading() -> None:
    watched = Watched()
    watched.take(RUNNING, 0, 0)
    view = looked(watched, 5 * S)
    assert (ChatState.RUNNING, Shown(5 * S, 0, 3 * S, 22 * S)) == (view.state, view.shown)


def test_the_clock_stops_where_the_lease_ends_and_is_lapsed_there() -> None:
    assert ChatState.RUNNING is view_at(NOON + 15 * S - 1).state
    for at in (NOON + 15 * S, NOON + 60 * S):
        view = view_at(at)
        assert (ChatState.LAPSED, 15 * S, None) == (view.state, view.shown.elapsed_us, view.ticks_in)


def test_the_clock_stops_where_the_credits_run_out_and_is_exhausted_there() -> None:
    poor = RUNNING._replace(balance=S, accrues_until=NOON + 3 * S, exhausts_at=NOON + 3 * S)
    assert ChatState.RUNNING is view_at(NOON + 3 * S - 1, poor).state
    view = view_at(NOON + 9 * S, poor)
    assert (ChatState.EXHAUSTED, Shown(3 * S, 0, S, 0)) == (view.state, view.shown)


@pytest.mark.parametrize(
    ("after_us", "ticks_in"),
    [(0, S), (1, S - 1), (S - 1, 1), (S, S), (14 * S + 1, S - 1)],
)
def test_the_next_tick_is_at_the_next_whole_second_shown(after_us: int, ticks_in: int) -> None:
    assert ticks_in == view_at(NOON + after_us).ticks_in


def test_the_last_tick_is_where_the_clock_stops() -> None:
    assert 300_000 == view_at(NOON + S + 200_000, RUNNING._replace(accrues_until=NOON + S + 500_000)).ticks_in


def test_a_clock_that_stands_still_does_not_tick() -> None:
    assert view_at(NOON + 9 * S, PAUSED).ticks_in is None


def test_what_is_shown_does_not_go_back_when_the_time_is_mended() -> None:
    watched = Watched()
    watched.take(RUNNING, 0, 0)
    ahead = looked(watched, 6 * S)
    later = RUNNING._replace(
        as_of=NOON + 5 * S, server_time=NOON + 5 * S, elapsed_us=5 * S, free_left_us=0, credits_used=3 * S
    )
    later = later._replace(balance=22 * S, count_us=3 * S, paid_from=NOON + 5 * S, free_until=None)
    watched.take(later, 6 * S, 6 * S)  # it is only five seconds later there
    held = looked(watched, 6 * S + 100_000)
    assert ahead.shown == held.shown
    assert 7 * S == looked(watched, 8 * S).shown.elapsed_us


def test_a_command_from_elsewhere_may_set_it_back() -> None:
    watched = Watched()
    watched.take(RUNNING, 0, 0)
    assert 3 * S == looked(watched, 3 * S).shown.elapsed_us
    watched.take(PAUSED, 3 * S, 3 * S)
    view = looked(watched, 3 * S)
    assert (ChatState.PAUSED, S) == (view.state, view.shown.elapsed_us)


def test_an_older_reading_is_dropped() -> None:
    watched = Watched()
    watched.take(PAUSED, 0, 0)
    watched.take(RUNNING, 0, 0)
    assert PAUSED is looked(watched, 0).reading


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_berlin() -> Iterator[None]:
    with pendulum.tz.test_local_timezone(pendulum.timezone("Europe/Berlin")):
        yield


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (view_at(NOON), "in 27 seconds, at 2026-01-01 13:00:27"),
        (view_at(NOON + 1), "in 27 seconds, at 2026-01-01 13:00:27"),
        (view_at(NOON + 15 * S), "not while the clock stands still"),
        (view_at(NOON, PAUSED), "not while the clock stands still"),
        (view_at(NOON, RUNNING._replace(exhausts_at=None)), "never"),
    ],
)
def test_when_credits_run_out_is_said_in_words(view: View, text: str, in_berlin: None) -> None:
    assert text == runs_out_in_words(view)


def test_an_outage_says_how_far_the_reading_reaches(in_berlin: None) -> None:
    assert "the database does not answer; shown until 2026-01-01 13:00:15" == outage_in_words(RUNNING)
    assert "the database does not answer; shown as of 2026-01-01 13:00:01" == outage_in_words(PAUSED)


def test_a_line_holds_names_and_values() -> None:
    assert (
        "at=2026-01-01T12:00:05.000000Z\tstate=running\telapsed_us=5000000\tfree_left_us=0\tcredits_used=3.000000\t"
        "balance=22.000000\taccrues_until=2026-01-01T12:00:15.000000Z\texhausts_at=2026-01-01T12:00:27.000000Z"
        == line(view_at(NOON + 5 * S))
    )


# --- the program ------------------------------------------------------------------------------------------------------


def start(url: URL, *, lease_s: int = 60) -> None:
    """Start a chat at a credit a second after 2 free seconds, with 60 credits."""

    async def work() -> None:
        policy = Policy(Scope.ADVISOR, lease_s * S, 300 * S)
        async with open_service(url, policy=policy, card=RateCard(Tariff(60 * S), 2 * S)) as service:
            await operations.credit(service, "u1", kind=CreditKind.GRANT, amount=60 * S, memo="", key="k")
            await operations.start(service, "u1", "c1", advisor_id="a1", key=None)

    asyncio.run(work())


def pause(url: URL) -> None:
    async def work() -> None:
        async with open_service(url) as service:
            await operations.pause(service, "u1", "c1")

    asyncio.run(work())


def watching(url: URL, *options: str) -> AbstractContextManager[Terminal]:
    return on_terminal("watch", "u1", "c1", *options, TALKTIME_DATABASE_URL=written(url))


def test_it_ticks_each_second_and_stops_at_the_end_of_the_lease(database_url: URL) -> None:
    start(database_url, lease_s=8)
    # It asks once at the beginning: what follows, the stop too, it knows by itself.
    with watching(database_url, "--every", "60") as terminal:
        terminal.wait_for(r"time +0:00:0[0-4]\b")
        began = int(re.findall(r"time +0:00:0(\d)", terminal.text)[0])
        seen = [terminal.wait_for(rf"time +0:00:0{second}\b") for second in range(began + 1, 9)]
        gaps = [later - earlier for earlier, later in pairwise(seen)]
        assert all(0.6 < gap < 1.4 for gap in gaps), gaps
        assert abs(seen[-1] - seen[0] - len(gaps)) < 0.4
        terminal.wait_for(r"lapsed[^$]*time +0:00:08[^$]*credits used +6\.000000[^$]*balance +54\.000000")
        text = terminal.text
        terminal.shown.clear()
        time.sleep(2)
        terminal.read()
        assert [] == terminal.shown
        assert 0 == terminal.end()
        assert "u1 c1 with a1" in text
        assert "60 credits a minute, charged exactly" in text
        assert re.search(r"credits run out +in (5\d seconds|1 minute)", text)
        assert "Traceback" not in text


def test_it_shows_a_command_from_elsewhere_with_the_next_reading(database_url: URL) -> None:
    start(database_url)
    with watching(database_url, "--every", "0.5") as terminal:
        terminal.wait_for("running")
        pause(database_url)
        terminal.wait_for("paused")
        assert 0 == terminal.end()


def test_it_goes_on_while_the_database_does_not_answer(database_url: URL, databases: Databases) -> None:
    start(database_url)
    with watching(database_url, "--every", "0.5") as terminal:
        terminal.wait_for(r"free time left +0:00:00")
        databases.admin.execute(f"ALTER DATABASE {database_url.database} ALLOW_CONNECTIONS false")
        terminate(databases.admin, database_url)
        terminal.wait_for("the database does not answer; shown until ")
        shown = re.findall(r"time +0:00:(\d\d)", terminal.text)[-1]
        terminal.wait_for(rf"time +0:00:{int(shown) + 2:02d}(?s:.*)the database does not answer")
        databases.admin.execute(f"ALTER DATABASE {database_url.database} ALLOW_CONNECTIONS true")
        assert "Traceback" not in terminal.text
        time.sleep(2)
        terminal.read()
        terminal.shown.clear()
        terminal.wait_for("time +0:00:")
        assert "the database does not answer" not in terminal.text
        assert 0 == terminal.end()


def terminate(admin: psycopg.Connection, url: URL) -> None:
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [url.database])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_pipe_it_writes_a_line_for_each_reading_until_a_signal(database_url: URL, number: signal.Signals) -> None:
    start(database_url)
    process = subprocess.Popen(
        [TALKTIME, "watch", "u1", "c1", "--every", "0.3"],
        env=environment(TALKTIME_DATABASE_URL=written(database_url)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        lines = [dict(part.split("=") for part in process.stdout.readline().split("\t")) for _ in range(4)]
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert (0, "") == (process.returncode, errors)
    elapsed = [int(line["elapsed_us"]) for line in lines]
    assert all(200_000 < b - a < 2 * S for a, b in pairwise(elapsed)), elapsed
    assert {"state", "at", "balance", "credits_used", "free_left_us"} <= set(lines[0])


def test_once_prints_a_reading_and_ends(database_url: URL) -> None:
    start(database_url)
    done = run("watch", "u1", "c1", "--once", TALKTIME_DATABASE_URL=written(database_url))
    assert (0, "") == (done.returncode, done.stderr)
    with connect(database_url) as connection:
        row = connection.execute("SELECT count(*) FROM chat").fetchone()
    assert (1,) == row
    [only] = done.stdout.splitlines()
    assert "\tstate=" in only


def test_a_chat_that_is_not_there_is_told_in_one_line(database_url: URL) -> None:
    done = run("watch", "u1", "c1", TALKTIME_DATABASE_URL=written(database_url))
    assert (1, "", "talktime: user 'u1' has no chat 'c1'\n") == (done.returncode, done.stdout, done.stderr)
