"""The way to the database fails, its locks are held, or a process is frozen: callers see a success, a refusal or 503.

Never a 500; and when the trouble is over, all goes on without a hand on it, and the books are right.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from sqlalchemy.engine import URL

from tests.database import connect
from tests.faults.books import check_books, close_books
from tests.faults.load import ANSWER_S_MAX, KEY, SETTINGS, Load, Outcome, load, tell
from tests.faults.network import network
from tests.faults.processes import Cluster, Program, cluster, done, passes_after, until
from tests.program import PATIENCE_S, written

CUTS = 10
SILENCED = 10
POOL = 20
CREDIT = {"kind": "purchase", "amount": "1"}


async def has_acknowledged(users: Load, count: int) -> bool:
    """Tell whether so many commands have been acknowledged."""
    return users.count(Outcome.ACKNOWLEDGED) >= count


async def test_connections_cut_delayed_and_swallowed_are_answered_503_and_all_goes_on_by_itself(
    database_url: URL, tmp_path: Path
) -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    async with network(database_url) as way:
        variables = {**SETTINGS, "TALKTIME_DATABASE_URL": written(way.url), "TALKTIME_SERVICE_KEY": KEY}
        async with (
            cluster(tmp_path, variables, reconcilers=1) as running,
            load(running.origins, KEY, seed=seed) as users,
        ):
            cut = 0
            for _ in range(CUTS):
                await asyncio.sleep(chance.uniform(0, 0.6))
                cut += way.cut()
            assert cut > CUTS  # there was something to cut
            resumed = [await until(users.is_served, "commands after the cuts")]
            users.check()

            way.delay_s = 0.15
            before = users.count(Outcome.ACKNOWLEDGED)
            await asyncio.sleep(1)
            way.cut()  # with much on its way
            # Slow is not down: a command takes about ten ways there and back.
            await until(partial(has_acknowledged, users, before + 10), "commands over a slow way")
            way.delay_s = 0.0
            resumed.append(await until(users.is_served, "commands after the delay"))
            users.check()

            way.swallow()
            await asyncio.sleep(2)  # shorter than the service's patience
            way.mend()
            resumed.append(await until(users.is_served, "commands after a silence"))
            before = users.statuses[503]
            way.swallow()
            await until(lambda: done(users.statuses[503] >= before + SILENCED), "503 for those who find silence")
            way.mend()
            resumed.append(await until(users.is_served, "commands after a long silence"))
            users.check()
            await close_books(users, running, database_url)
            tell(f"seed {seed}: {users}; goes on after {', '.join(f'{s:.2f}' for s in resumed)} s")
            await running.end()


# --- locks that are held ----------------------------------------------------------------------------------------------


async def demand(client: httpx.AsyncClient, user_id: str, answers: list[httpx.Response], stop: asyncio.Event) -> None:
    """Ask for a lock on an account, again and again, as callers do who are told to come again."""
    number = 0
    while not stop.is_set():
        path = f"/v1/users/{user_id}/credits"
        answer = await client.post(path, json=CREDIT, headers={"Idempotency-Key": f"{user_id}-{number}"})
        answers.append(answer)
        if answer.status_code == 503:
            await asyncio.sleep(int(answer.headers["retry-after"]))
        else:
            number += 1
            await asyncio.sleep(0.2)


async def test_more_locked_accounts_than_connections_hold_nobody_else_up_for_ever(
    database_url: URL, tmp_path: Path
) -> None:
    held = [f"held-{n}" for n in range(2 * POOL)]
    free = [f"free-{n}" for n in range(5)]
    variables = {"TALKTIME_DATABASE_URL": written(database_url), "TALKTIME_SERVICE_KEY": KEY}
    async with cluster(tmp_path, variables, apis=1, reconcilers=1) as running, callers(running) as client:
        stop = asyncio.Event()
        answers: dict[str, list[httpx.Response]] = {user_id: [] for user_id in held + free}
        for user_id in answers:
            await client.post(f"/v1/users/{user_id}/credits", json=CREDIT, headers={"Idempotency-Key": "first"})
        # So that a pass has something to write, as soon as it gets the lock; in free time, which no entry is made of.
        await client.post(f"/v1/users/{held[0]}/chats/c1/start", json={"advisor_id": "a1"})
        with connect(database_url) as connection:
            with connection.transaction():
                connection.execute("SELECT FROM account WHERE user_id LIKE 'held-%' FOR UPDATE")
                tasks = [asyncio.create_task(demand(client, user, answers[user], stop)) for user in answers]
                began = time.monotonic()
                # Those that are held get their answer, and the others their locks, though all connections are taken.
                await until(partial(all_answered, answers, held, 503), "503 for all that are held")
                await until(partial(all_answered, answers, free, 201, times=3), "locks for all others")
                under_lock = time.monotonic() - began
                assert not [a for user in held for a in answers[user] if a.status_code == 201]
                told = Counter(a.status_code for user in free for a in answers[user])
                passed = partial(passes_after, running.reconcilers[0], len(running.reconcilers[0].output))
            await until(passed, "a pass over what is free again")
            resumed = await until(partial(all_answered, answers, held, 201), "the locks that are free again")
        stop.set()
        await asyncio.gather(*tasks)
        statuses = Counter(a.status_code for one in answers.values() for a in one)
        assert {201, 503} == set(statuses)
        assert {"1"} == {a.headers["retry-after"] for one in answers.values() for a in one if a.status_code == 503}
        with connect(database_url) as connection:
            [(entries,)] = connection.execute("SELECT count(*) FROM ledger_entry").fetchall()
        assert statuses[201] + len(answers) == entries
        await running.audit()
        for program in running.programs:
            assert not program.traces, (program.name, program.traces[:3])
        slowest = max(a.elapsed.total_seconds() for one in answers.values() for a in one)
        tell(
            f"{len(held)} accounts held: all answered within {under_lock:.1f} s, others told {dict(told)};"
            f" after release {resumed:.1f} s; slowest answer {slowest:.1f} s; {dict(statuses)}"
        )
        await running.end()


async def all_answered(
    answers: dict[str, list[httpx.Response]], users: list[str], status: int, *, times: int = 1
) -> bool:
    """Tell whether each of these users has had such an answer so many times."""
    return all(sum(answer.status_code == status for answer in answers[user]) >= times for user in users)


@asynccontextmanager
async def callers(running: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the first API process with as many connections as it wants."""
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=running.apis[0].origin, headers=headers, timeout=ANSWER_S_MAX, limits=limits, trust_env=False
    ) as client:
        yield client


# --- a process that is frozen -----------------------------------------------------------------------------------------


def open_transactions(url: URL) -> list[int]:
    """Return the backends that wait for their client in the middle of a transaction in which they hold locks."""
    query = (
        "SELECT pid FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE datname = current_database()"
        " AND state = 'idle in transaction' AND relation = 'account'::regclass AND mode = 'RowShareLock'"
    )
    with connect(url) as connection:
        return [int(pid) for (pid,) in connection.execute(query).fetchall()]


async def freeze_in_a_transaction(api: Program, url: URL) -> list[int]:
    """Freeze an API process at a moment at which it holds an account's lock; return the backends that wait for it."""
    for _ in range(1_000):
        await asyncio.sleep(0.01)
        api.signal(signal.SIGSTOP)
        if pids := await asyncio.to_thread(settled_transactions, url):
            return pids
        api.signal(signal.SIGCONT)
    pytest.fail("it was never in the middle of a transaction")


def settled_transactions(url: URL) -> list[int]:
    """Return the open transactions that are still open when all that was under way in PostgreSQL is done."""
    if not open_transactions(url):
        return []
    time.sleep(0.1)
    return open_transactions(url)


async def test_a_frozen_process_holds_nobody_up_for_ever_and_doubles_nothing_when_it_goes_on(
    database_url: URL, tmp_path: Path
) -> None:
    seed = random.randrange(10**9)
    variables = {**SETTINGS, "TALKTIME_DATABASE_URL": written(database_url), "TALKTIME_SERVICE_KEY": KEY}
    async with cluster(tmp_path, variables, reconcilers=1) as running, load(running.origins, KEY, seed=seed) as users:
        await asyncio.sleep(2)
        frozen = running.apis[0]
        pids = await freeze_in_a_transaction(frozen, database_url)
        try:
            answers = users.count(Outcome.ACKNOWLEDGED)
            freed = await until(partial(are_gone, database_url, pids), "the locks of a frozen process")
            # The callers of the frozen process wait for it, and the others' locks are free.
            for user_id in users.users:
                served = partial(users.is_served_by, users.clients[1], user_id)
                await until(served, f"a lock on the account of {user_id}", patience_s=PATIENCE_S)
            users.check()
            await check_books(users, database_url)
            await running.audit()
        finally:
            frozen.signal(signal.SIGCONT)
        thawed = await until(partial(users.is_served_by, users.clients[0]), "the process that was frozen")
        await asyncio.sleep(1)
        users.check()
        assert users.count(Outcome.ACKNOWLEDGED) > answers
        await close_books(users, running, database_url)
        took = f"locks free after {freed:.1f} s, served {thawed:.2f} s"
        tell(f"seed {seed}: {len(pids)} transactions open; {took}; {users}")
        await running.end()


async def are_gone(url: URL, pids: list[int]) -> bool:
    """Tell whether none of these backends is there any more."""
    return not set(pids) & set(await asyncio.to_thread(open_transactions, url))
