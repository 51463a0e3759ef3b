"""The benchmark as it is run: programs that it starts, and a tiny run of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy.engine import URL

from tests.bench.__main__ import main
from tests.bench.bare import APPS
from tests.bench.crowd import crowd
from tests.bench.database import caution, operators_settings, running_server
from tests.bench.pgbench import PgBench, parse
from tests.bench.population import populate
from tests.bench.programs import BenchmarkFailed, halted, memory_bytes, module, started
from tests.bench.service import Load, Share, plan, request, serving, serving_bare, write_requests
from tests.database import Databases, connect
from tests.program import environment, written

TINY = ("--chats", "20", "--rounds", "1", "--seconds", "1")


def test_a_run_prints_a_table_keeps_its_raw_numbers_and_leaves_no_database(
    databases: Databases, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "run.json"
    ended = subprocess.run(
        [*module("tests.bench", "pass", *TINY), "--json", str(path), "--plot"],
        env=environment(TALKTIME_DATABASE_URL=written(databases.server)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 0 == ended.returncode, ended.stderr
    assert "pass, one process" in ended.stdout
    assert "round 1 of 1: set-based SQL" in ended.stderr
    document = json.loads(path.read_text())
    [round_] = document["parts"]["pass"]["rounds"]
    figure, one_connection = document["parts"]["pass"]["figures"]
    assert round_["pass"]["rate"] / round_["set-based SQL"]["rate"] == figure["value"]
    assert "set-based SQL, one connection" == one_connection["baseline"]
    assert one_connection["is_met"] is None
    assert [20] * len(round_["pass"]["passes"]) == [one["chats"] for one in round_["pass"]["passes"]]
    assert document["database"]["synchronous_commit"] == "on"
    assert (document["database"]["fsync"] == "off") == ("this server has fsync = off" in ended.stdout)
    assert caution(document["database"]) == document["caution"]
    assert str(tmp_path) not in path.read_text()
    assert path.with_suffix(".svg").exists()
    left = databases.admin.execute("SELECT datname FROM pg_database WHERE starts_with(datname, 'talktime_bench_')")
    assert [] == left.fetchall()


def test_a_part_that_does_not_exist_is_bad_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["reading"])
    assert 2 == ended.value.code
    assert "there is no part 'reading', only readings, heartbeats" in capsys.readouterr().err


# --- the database -----------------------------------------------------------------------------------------------------


def test_the_embedded_server_is_set_for_the_load_of_a_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TALKTIME_DATABASE_URL", raising=False)
    with running_server(tmp_path / "home") as server:
        about = server.about()
    assert ("embedded", "on", "on") == (about["server"], about["fsync"], about["synchronous_commit"])
    assert ("8GB", "15min") == (about["max_wal_size"], about["checkpoint_timeout"])
    assert "128MB" != about["shared_buffers"]


@pytest.mark.parametrize(("memory_gb", "buffers"), [(2, "512MB"), (16, "4096MB"), (64, "4096MB")])
def test_buffers_are_a_quarter_of_the_memory_up_to_a_limit(memory_gb: int, buffers: str) -> None:
    assert buffers == operators_settings(memory_gb << 30)["shared_buffers"]


@pytest.mark.parametrize(
    ("fsync", "commit", "said"),
    [
        ("on", "on", ""),
        ("on", "remote_apply", ""),
        ("off", "on", "this server has fsync = off:"),
        ("on", "off", "this server has synchronous_commit = off:"),
        ("off", "off", "this server has fsync = off and synchronous_commit = off:"),
    ],
)
def test_a_server_whose_commits_do_not_wait_for_the_disk_is_told_of(fsync: str, commit: str, said: str) -> None:
    warning = caution({"fsync": fsync, "synchronous_commit": commit})
    assert warning.startswith(said)
    assert bool(said) == bool(warning)


def test_the_settings_of_a_given_server_are_left_alone(
    databases: Databases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TALKTIME_DATABASE_URL", written(databases.server))
    with running_server(tmp_path / "home") as server:
        about = server.about()
    assert "given" == about["server"]
    row = databases.admin.execute("SHOW max_wal_size").fetchone()
    assert (about["max_wal_size"],) == row
    assert "8GB" != about["max_wal_size"]
    assert not (tmp_path / "home").exists()


# --- servers under load -----------------------------------------------------------------------------------------------


def test_all_requests_of_a_crowd_are_in_flight_at_once_and_answered(database_url: URL, tmp_path: Path) -> None:
    population = populate(database_url, 10)
    with serving(population, tmp_path) as api:
        users = population.some_users(10)
        requests = [api.reading(user_id, token) for user_id, token in zip(users, api.tokens(users), strict=True)]
        path = write_requests(tmp_path / "requests.json", [*requests, *map(api.heartbeat, users)])
        for _ in range(2):
            run = crowd(api, path, 20, tmp_path)
            assert (20, {"200": 20}, "") == (run["sent"], run["statuses"], run["failure"])
            assert run["memory_peak_bytes"] >= run["memory_connected_bytes"] > 0
    with connect(database_url) as connection:
        beaten = connection.execute("SELECT count(*) FROM chat WHERE last_heartbeat_at > opened_at").fetchone()
    assert (10,) == beaten


@pytest.mark.parametrize("app", APPS)
def test_bare_answers_are_the_bytes_that_were_given_under_the_same_headers(app: str, tmp_path: Path) -> None:
    with serving_bare(app, b'{"balance":"1"}', tmp_path) as (_, address):
        answer = httpx.get(f"http://{address}/v1/users/u1/chats/c1", trust_env=False)
    assert (200, b'{"balance":"1"}') == (answer.status_code, answer.content)
    assert {"content-type": "application/json", "content-length": "15"} == {
        name: value for name, value in answer.headers.items() if name != "date"
    }


def test_a_load_on_the_bare_route_is_counted_over_all_generators(tmp_path: Path) -> None:
    with serving_bare("bare route", b'{"balance":"1"}', tmp_path) as (program, address):
        load = Load(
            name="bare route",
            server=program,
            address=address,
            requests=write_requests(tmp_path / "requests.json", [request("GET", "/v1/users/u1/chats/c1", "host", "")]),
            clients=3,
            generators=2,
            warm_up_us=0,
            us=100_000,
            folder=tmp_path,
        )
        run = load.run(each=3)
        assert 0 < run["answers"] < run["answers_with_warm_up"]
        # Each generator has a time of its own, none longer than this.
        assert run["rate"] >= 2.999 * run["answers"] * 1_000_000 / run["elapsed_us"]
        assert 0 < run["latency_us"]["p50"] <= run["latency_us"]["p99"] <= run["latency_us"]["max"]
        write_requests(load.requests, [request("POST", "/v1/heartbeats", "host", "")])
        with pytest.raises(BenchmarkFailed, match=r"bare route: HTTP/1\.1 404"):
            load.run()


def test_a_load_begins_with_the_request_that_it_is_told(tmp_path: Path) -> None:
    refused, answered = request("POST", "/", "host", ""), request("GET", "/v1/users/u1/chats/c1", "host", "")
    path = write_requests(tmp_path / "requests.json", [refused, answered])
    with serving_bare("bare route", b"{}", tmp_path) as (_, address):
        for begin, status in enumerate(("404", "200")):
            with started("load generator", *module("tests.bench.http_load"), folder=tmp_path) as generator:
                assert {"connected": 1} == generator.ask(30, **plan(address, path, Share(0, 1, 1, begin)))
                assert {"sent": 1} == generator.ask(30)
                assert {status: 1} == generator.answer(30)["statuses"]


def test_pgbench_counts_single_rows(database_url: URL, tmp_path: Path) -> None:
    pgbench = PgBench(url=database_url, rows=50, clients=2, seconds=1, folder=tmp_path)
    pgbench.prepare()
    run = pgbench.run("UPDATE")
    assert run["answers"] > 10
    assert run["rate"] > 10
    with connect(database_url) as connection:
        row = connection.execute(
            "SELECT count(*), (SELECT reloptions FROM pg_class WHERE oid = 'bench_row'::regclass)"
            " = (SELECT reloptions FROM pg_class WHERE oid = 'chat'::regclass) FROM bench_row"
        ).fetchone()
    assert (50, True) == row
    with connect(database_url) as connection:
        connection.execute("DROP TABLE bench_row")
    with pytest.raises(BenchmarkFailed, match="bench_row"):
        pgbench.run("SELECT")


def test_failed_transactions_of_pgbench_are_no_result() -> None:
    output = (
        "number of transactions actually processed: 100\nnumber of failed transactions: 1 (1.000%)\n"
        "latency average = 0.123 ms\ntps = 812.5 (without initial connection time)\n"
    )
    with pytest.raises(BenchmarkFailed, match="or some failed"):
        parse(output)
    assert {"rate": 812.5, "answers": 100, "latency_us": {"mean": 123}} == parse(output.replace("s: 1 (1", "s: 0 (0"))


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('ready', flush=True); sys.exit('out of luck')"
    with started("helper", sys.executable, "-c", code, folder=tmp_path) as program:
        assert "ready" == program.line(30)
        with pytest.raises(BenchmarkFailed, match=r"^helper ended: out of luck$"):
            program.line(30)


def test_a_program_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with (
        started("helper", sys.executable, "-c", "import time; time.sleep(60)", folder=tmp_path) as program,
        pytest.raises(BenchmarkFailed, match="helper said nothing"),
    ):
        program.line(0.1)
    assert program.process.returncode is not None


def test_a_halted_program_stands_still_and_goes_on(tmp_path: Path) -> None:
    code = "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)"
    with started("echo", sys.executable, "-c", code, folder=tmp_path) as program:
        assert {"n": 1} == program.ask(30, n=1)
        with halted(program):
            program.tell(n=2)
            time.sleep(0.2)
            with pytest.raises(BenchmarkFailed, match="said nothing"):
                program.line(0.2)
        assert {"n": 2} == program.answer(30)
        assert memory_bytes(program.pid) > 1_000_000
    assert 0 == memory_bytes(program.pid)
