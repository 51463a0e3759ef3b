"""What Prometheus sees: of the whole, from any process; of this process; and of several as one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from httpx import AsyncClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.engine import URL

from reconciler.sweep import sweep_and_record
from talktime import operating
from talktime.api import outside
from talktime.store.database import Database
from tests.api.requests import BEATS, CHAT, CREDIT, START
from tests.api.server import json_of, serving
from tests.database import Clock, connect
from tests.program import running, written
from tests.support import S

Seen = dict[str, float]


@pytest.fixture
async def client(database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncClient]:
    """A client of a service that looks anew for everybody, on simulated time."""
    monkeypatch.setattr(outside, "KEPT_S", 0)
    async with serving(database_url) as client:
        yield client


def read(exposition: str) -> Seen:
    """Return the samples by name, with the value of each label behind it."""
    return {
        " ".join([sample.name, *(sample.labels[name] for name in sorted(sample.labels))]): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


async def look(client: AsyncClient) -> Seen:
    answer = await client.get("/metrics")
    assert 200 == answer.status_code
    return read(answer.text)


async def start(client: AsyncClient, *users: str) -> None:
    for user in users:
        path = f"/v1/users/{user}"
        json_of(await client.post(f"{path}/credits", json=CREDIT, headers={"Idempotency-Key": "k"}), 201)
        json_of(await client.post(f"{path}/chats/c1/start", json=START))


# --- the whole --------------------------------------------------------------------------------------------------------


async def test_the_work_that_waits_is_seen_and_gone_after_a_pass(
    client: AsyncClient, database_url: URL, clock: Clock
) -> None:
    await start(client, "u1")
    clock.tick(4 * S)
    await start(client, "u2")
    clock.tick(6 * S)
    seen = await look(client)
    assert (10, 16) == (seen["talktime_reconcile_lag_seconds"], seen["talktime_unmaterialized_seconds"])
    assert (1, 0) == (seen["talktime_database_up"], seen["talktime_clock_behind_seconds"])
    database = Database(database_url)
    await sweep_and_record(database, asyncio.Event())
    await database.close()
    seen = await look(client)
    assert (0, 0) == (seen["talktime_reconcile_lag_seconds"], seen["talktime_unmaterialized_seconds"])
    clock.tick(500 * S)
    assert 500 == (await look(client))["talktime_reconcile_lag_seconds"]


async def test_chats_that_wait_to_be_abandoned_are_no_work(
    client: AsyncClient, database_url: URL, clock: Clock
) -> None:
    await start(client, "u1")
    json_of(await client.post(f"{CHAT}/pause"))
    clock.tick(299 * S)
    assert 0 == (await look(client))["talktime_reconcile_lag_seconds"]
    clock.tick(3 * S)
    assert 2 == (await look(client))["talktime_reconcile_lag_seconds"]


async def test_the_last_pass_and_the_last_one_without_failure_are_seen(
    client: AsyncClient, database_url: URL, clock: Clock
) -> None:
    seen = await look(client)
    assert 0 == seen["talktime_reconciler_last_pass_timestamp_seconds"]
    assert 0 == seen["talktime_reconciler_last_success_timestamp_seconds"]
    assert "talktime_reconciler_last_pass_duration_seconds" not in seen
    database = Database(database_url)
    began = clock.now
    for after_s, failed in ((0, 0), (15, 2)):
        await operating.record_pass(
            database,
            began_at=began + after_s * S,
            took_us=3 * S,
            lag_us=S,
            accounts=7 + after_s,
            chats=9 + after_s,
            failed=failed,
        )
    await database.close()
    seen = {name.removeprefix("talktime_reconciler_last_"): value for name, value in (await look(client)).items()}
    assert pytest.approx(began / S + 18) == seen["pass_timestamp_seconds"]
    assert pytest.approx(began / S + 3) == seen["success_timestamp_seconds"]
    assert (3, 22, 24, 2) == (
        seen["pass_duration_seconds"],
        seen["pass_accounts"],
        seen["pass_chats"],
        seen["pass_failed_accounts"],
    )


async def test_the_last_audit_is_seen(client: AsyncClient, database_url: URL, clock: Clock) -> None:
    seen = await look(client)
    assert 0 == seen["talktime_audit_timestamp_seconds"]
    assert "talktime_audit_differences" not in seen
    database = Database(database_url)
    for differences in (5, 4):
        clock.tick(S)
        await operating.record_audit(database, took_us=2 * S, accounts=100, differing=3, differences=differences)
    await database.close()
    seen = {name.removeprefix("talktime_audit_"): value for name, value in (await look(client)).items()}
    assert pytest.approx(clock.now / S) == seen["timestamp_seconds"]
    assert (2, 100, 3, 4) == (
        seen["duration_seconds"],
        seen["accounts"],
        seen["differing_accounts"],
        seen["differences"],
    )


async def test_a_clock_that_stepped_back_is_seen_as_far_as_readings_stand_still(
    client: AsyncClient, clock: Clock
) -> None:
    await start(client, "u1")
    clock.tick(-7 * S)
    seen = await look(client)
    assert (7, 0) == (seen["talktime_clock_behind_seconds"], seen["talktime_reconcile_lag_seconds"])
    reading = json_of(await client.get(CHAT))
    assert reading["as_of"] > reading["server_time"]
    clock.tick(7 * S)
    assert 0 == (await look(client))["talktime_clock_behind_seconds"]


async def test_without_a_database_that_is_what_is_seen_beside_the_process_itself(
    client: AsyncClient, database_url: URL
) -> None:
    with connect(database_url) as connection:
        connection.execute("DROP TABLE reconciler_audit")
    seen = await look(client)
    assert 0 == seen["talktime_database_up"]
    assert not [name for name in seen if name.startswith(("talktime_reconcile", "talktime_audit", "talktime_clock"))]
    assert seen["talktime_pool_connections_max"]
    assert seen["process_open_fds"]


async def test_the_database_is_asked_once_for_all_who_look_at_about_the_same_time(
    database_url: URL, clock: Clock
) -> None:
    async with serving(database_url) as client:
        await start(client, "u1")
        both = await asyncio.gather(look(client), look(client))
        clock.tick(9 * S)
        late = await look(client)
    assert [0, 0, 0] == [seen["talktime_reconcile_lag_seconds"] for seen in (*both, late)]


# --- a process --------------------------------------------------------------------------------------------------------


async def test_the_sizes_of_batches_are_seen(client: AsyncClient) -> None:
    await start(client, "u1", "u2")
    await asyncio.gather(*(client.get(f"/v1/users/{user}/chats/c1") for user in ("u1", "u2", "u1")))
    await client.post(f"{CHAT}/heartbeat")
    json_of(await client.post("/v1/heartbeats", json={"beats": BEATS["beats"] * 7}))
    seen = await look(client)
    assert 2 <= seen["talktime_batch_size_sum readings"] <= 3
    assert 1 <= seen["talktime_batch_size_count readings"] <= 3
    assert (1, 1) == (seen["talktime_batch_size_sum heartbeats"], seen["talktime_batch_size_count heartbeats"])
    assert 7 == seen["talktime_batch_size_sum many_heartbeats"]
    assert (0, 1) == (
        seen["talktime_batch_size_bucket many_heartbeats 5.0"],
        seen["talktime_batch_size_bucket many_heartbeats 10.0"],
    )


async def test_who_waits_for_a_connection_or_in_a_batch_is_seen_and_whoever_looks_waits_for_nobody(
    client: AsyncClient, database_url: URL
) -> None:
    await start(client, "u1")
    seen = await look(client)
    size = int(seen["talktime_pool_connections_max"])
    assert (0, 0) == (seen["talktime_pool_connections_in_use"], seen["talktime_pool_waiting"])
    with connect(database_url) as holder, holder.transaction():
        holder.execute("LOCK TABLE chat IN ACCESS EXCLUSIVE MODE")
        asking = [asyncio.create_task(client.get("/v1/users/u1/account")) for _ in range(size + 3)]
        asking.append(asyncio.create_task(client.get(CHAT)))
        async with asyncio.timeout(10):
            while (seen := await look(client))["talktime_pool_waiting"] != 3:
                pass
        assert size == seen["talktime_pool_connections_in_use"]
        assert (1, 0) == (seen["talktime_batch_waiting readings"], seen["talktime_batch_waiting heartbeats"])
        assert 1 == seen["talktime_database_up"]
    await asyncio.gather(*asking)
    seen = await look(client)
    assert (0, 0, 0) == (
        seen["talktime_pool_connections_in_use"],
        seen["talktime_pool_waiting"],
        seen["talktime_batch_waiting readings"],
    )


async def test_no_label_holds_an_id(client: AsyncClient) -> None:
    await start(client, "someone")
    await client.get("/v1/users/someone/chats/something-else")
    await client.get("/v1/nowhere/someone")
    exposition = (await client.get("/metrics")).text
    assert "/v1/users/{user_id}/chats/{chat_id}" in exposition
    assert [] == [name for name in ("someone", "something", "c1", "a1") if name in exposition]


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_that_share_a_folder_answer_for_all_of_them(database_url: URL, tmp_path: Path) -> None:
    folder = tmp_path / "meters"
    folder.mkdir()
    variables = {
        "PROMETHEUS_MULTIPROC_DIR": str(folder),
        "TALKTIME_DATABASE_URL": written(database_url),
        "TALKTIME_SERVICE_KEY": "a-service-key-for-tests",
    }
    size, alive = "talktime_pool_connections_max", "talktime_requests_total GET /livez 200"
    with running(tmp_path / "1", "serve", "--port", "0", **variables) as one:
        with running(tmp_path / "2", "serve", "--port", "0", **variables) as other:
            for service in (one, other, other):
                service.client.get("/livez")
            seen, there = (read(service.client.get("/metrics").text) for service in (one, other))
            assert (3, 3) == (seen[alive], there[alive])
            pool = Database(database_url).pool.size
            assert 2 * pool == seen[size] == there[size]
            assert 1 == seen["talktime_database_up"] == there["talktime_database_up"]
            assert 0 == other.end()
        seen = read(one.client.get("/metrics").text)
        assert (3, pool) == (seen[alive], seen[size])
        one.end(signal.SIGKILL)
    with running(tmp_path / "3", "serve", "--port", "0", **variables) as third:
        third.client.get("/livez")
        seen = read(third.client.get("/metrics").text)
        assert (4, pool) == (seen[alive], seen[size])
