"""The parts that send requests: readings, heartbeats one by one and in batches, and the memory of many at once."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.bench.bench import Bench
from tests.bench.crowd import crowd
from tests.bench.figures import Figure, Target
from tests.bench.http_load import OK
from tests.bench.programs import BenchmarkFailed
from tests.bench.reconciling import reconcile
from tests.bench.rounds import S_US, Part, alternate
from tests.bench.service import BATCH_PATH, batch_body, serving_bare, write_requests

BEATING_MAX = 50_000
BEATS_MAX = 10_000
BATCHES_MAX = 20
BATCH_CLIENTS = 2
"""While one batch waits for the database, the other is read."""
CROWDS = 3
MB = 1_000_000
NOT_FOUND = 404


def measure_readings(bench: Bench) -> Part:
    """Readings by users' tokens and by a service key, against bare answers, and against pgbench's SELECT."""
    with (
        bench.api() as api,
        serving_bare("bare route", api.one_reading(), bench.folder) as (bare, bare_address),
        serving_bare("server alone", api.one_reading(), bench.folder) as (server, server_address),
    ):
        polling = bench.polling(api)
        users = api.population.some_users(len(json.loads(polling.requests.read_text())))
        pgbench = bench.pgbench(len(users))
        by_service = [api.reading(user_id, api.key) for user_id in users]
        part = alternate(
            {
                "bare route": bench.load("bare route", bare, bare_address, polling.requests).run,
                "reading": polling.run,
                "reading by a service": bench.load("reading by a service", api.program, api.address, by_service).run,
                "server alone": bench.load("server alone", server, server_address, polling.requests).run,
                "pgbench SELECT": lambda: pgbench.run("SELECT"),
            },
            bench.options.rounds,
            bench.progress,
        )
        part.notes["answer_bytes"] = len(api.one_reading())
    part.notes["users"] = len(users)
    part.figures = [
        _reading_against(part, "bare route", Target(at_least=0.45, aim=0.6)),
        _reading_against(part, "bare route", side="reading by a service"),
        _reading_against(part, "server alone"),
        _reading_against(part, "pgbench SELECT"),
    ]
    return part


def _reading_against(part: Part, baseline: str, target: Target | None = None, *, side: str = "reading") -> Figure:
    names = {
        "reading": "reading with the user's token, metrics on",
        "reading by a service": "reading with a service key",
    }
    return Figure(
        name=names[side],
        unit="/s",
        runs=part.rates(side),
        baseline=baseline,
        baseline_runs=part.rates(baseline),
        target=target,
    )


def measure_heartbeats(bench: Bench) -> Part:
    """Heartbeats, one in a request, against pgbench's single-row UPDATE."""
    with bench.api() as api:
        requests = [api.heartbeat(user_id) for user_id in api.population.some_users(BEATING_MAX)]
        pgbench = bench.pgbench(len(requests))
        load = bench.load("heartbeat", api.program, api.address, requests)
        begins = _begins(bench, len(requests))
        part = alternate(
            {
                "heartbeat": lambda: load.run(begin=next(begins)),
                "pgbench UPDATE": lambda: pgbench.run("UPDATE"),
            },
            bench.options.rounds,
            bench.progress,
        )
    part.figures = [
        Figure(
            name="heartbeat, one in a request",
            unit="/s",
            runs=part.rates("heartbeat"),
            baseline="pgbench UPDATE",
            baseline_runs=part.rates("pgbench UPDATE"),
            target=Target(at_least=0.6, aim=0.8),
        )
    ]
    return part


def _begins(bench: Bench, requests: int) -> Iterator[int]:
    """Say with which request each round begins: each with another, so that not always the same chats come first."""
    rounds = bench.options.rounds + 1  # and the warm-up
    return (number * requests // rounds for number in range(rounds))


def measure_batch(bench: Bench) -> Part:
    """Heartbeats through the batch route against pgbench's single-row UPDATE.

    Raises:
        BenchmarkFailed: there is no such route, or it does not answer each beat.
    """
    beats = max(1, min(BEATS_MAX, bench.population.users // BATCH_CLIENTS))
    users = bench.population.some_users(beats * BATCHES_MAX)
    slices = [users[first : first + beats] for first in range(0, len(users) - beats + 1, beats)]
    with bench.api() as api:
        status, body = api.ask("POST", BATCH_PATH, batch_body(slices[0]))
        if status == NOT_FOUND:
            message = f"not there: POST {BATCH_PATH} answers 404"
            raise BenchmarkFailed(message)
        if status != OK or len(results := json.loads(body)["results"]) != beats:
            message = f"POST {BATCH_PATH} with {beats} beats answered {status}: {body[:600].decode(errors='replace')}"
            raise BenchmarkFailed(message)
        requests = [api.batch(of_slice) for of_slice in slices]
        pgbench = bench.pgbench(len(requests) * beats)
        begins = _begins(bench, len(requests))
        load = bench.load("batch", api.program, api.address, requests, clients=BATCH_CLIENTS)
        part = alternate(
            {
                "beats in batches": lambda: load.run(each=beats, begin=next(begins)),
                "pgbench UPDATE": lambda: pgbench.run("UPDATE"),
            },
            bench.options.rounds,
            bench.progress,
        )
    part.notes |= {"beats_in_a_request": beats, "clients": BATCH_CLIENTS, "first_result": results[0]}
    part.figures = [
        Figure(
            name=f"heartbeats, {beats:,} in a request",
            unit="/s",
            runs=part.rates("beats in batches"),
            baseline="pgbench UPDATE",
            baseline_runs=part.rates("pgbench UPDATE"),
            target=Target(at_least=3),
        )
    ]
    return part


def measure_memory(bench: Bench) -> Part:
    """Memory of an API process with many readings in flight, and of a pass over all chats."""
    part = Part()
    in_flight = bench.options.in_flight
    with bench.api() as api:
        users = api.population.some_users(in_flight)
        requests = [api.reading(user_id, token) for user_id, token in zip(users, api.tokens(users), strict=True)]
        path = write_requests(bench.folder / "requests of a crowd.json", requests)
        for number in range(1, CROWDS + 1):
            run = crowd(api, path, in_flight, bench.folder)
            part.rounds.append({"in flight": run})
            bench.progress.say(
                f"time {number} of {CROWDS}: {run['sent']:,} in flight, answered {run['statuses']},"
                f" {run['memory_peak_bytes'] / MB:,.0f} MB"
            )
            if run["failure"]:
                part.failures.append(f"{in_flight} requests in flight: not all were answered 200: {run['failure']}")
    made = reconcile(bench.population, bench.folder, processes=1)
    part.rounds.append({"pass": made})
    [process] = made["processes"]
    bench.progress.say(f"a pass in {made['elapsed_us'] / S_US:,.1f} s: {process['memory_peak_bytes'] / MB:,.0f} MB")
    part.figures = [
        Figure(
            name=f"memory of an API process, {in_flight:,} requests in flight",
            unit="MB",
            runs=[round_["in flight"]["memory_peak_bytes"] / MB for round_ in part.rounds if "in flight" in round_],
            target=Target(below=300),
        ),
        Figure(
            name=f"memory of a pass over {bench.population.users:,} chats",
            unit="MB",
            runs=[process["memory_peak_bytes"] / MB],
            target=Target(below=200),
        ),
    ]
    return part
