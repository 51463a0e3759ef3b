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
from tests.faults.books import Books, check_books, check_closed_books
from tests.faults.load import ANSWER_S_MAX, SETTINGS, Credit, Load, Outcome, load, tell
from tests.faults.network import network
from tests.faults.processes import Cluster, Program, cluster, until
from tests.program import PATIENCE_S, written

KEY = "a-key-from-the-environment"
CUTS = 10
POOL = 20
CREDIT = {"kind": "purchase", "amount": "1"}


async def close_books(users: Load, running: Cluster, url: URL) -> Books:
    """End a load, and check that all went on as if nothing had been."""
    await users.finish()
    await users.settle()
    await users.ask_all()
    books = await check_books(users, url)
    check_closed_books(users, books)
    await running.audit()
    for program in running.programs:
        assert [] == program.ends, program.output[-2_000:]
        assert "Traceback" not in program.output, program.output[-5_000:]
    tell(f"{users}; answers {dict(users.statuses)}; segments {len(books.segments)}")
    return books


async def goes_on(users: Load) -> bool:
    """Tell whether every API process takes a command."""
    return all(await asyncio.gather(*(users.is_served_by(client) for client in users.clients)))


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
            resumed = [await until(lambda: goes_on(users), "commands after the cuts")]
            users.check()

            way.delay_s = 0.3
            before = users.count(Outcome.ACKNOWLEDGED)
            await asyncio.sleep(3)
            way.cut()  # with much on its way
            # Slow is not down: a command takes about ten ways there and back.
            await until(partial(has_acknowledged, users, before + 10), "commands over a slow way")
            way.delay_s = 0.0
            resumed.append(await until(lambda: goes_on(users), "commands after the delay"))
            users.check()

            for seconds in (2, 14):  # shorter than the service's patience, and longer
                before = users.statuses[503]
                way.swallow()
                await asyncio.sleep(seconds)
                way.mend()
                resumed.append(await until(lambda: goes_on(users), "commands after the silence"))
                users.check()
            assert users.statuses[503] > before
            tell(f"seed {seed}; goes on after {', '.join(f'{s:.2f}' for s in resumed)} s")
            await close_books(users, running, database_url)
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
        assert "Traceback" not in running.apis[0].output
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
                took = await until(partial(pays, users, user_id), f"a lock on the account of {user_id}")
                assert took < PATIENCE_S
            users.check()
            await check_books(users, database_url)
            await running.audit()
        finally:
            frozen.signal(signal.SIGCONT)
        thawed = await until(partial(users.is_served_by, users.clients[0]), "the process that was frozen")
        await asyncio.sleep(1)
        users.check()
        tell(f"seed {seed}: {len(pids)} transactions open; locks free after {freed:.1f} s, served {thawed:.2f} s")
        assert users.count(Outcome.ACKNOWLEDGED) > answers
        await close_books(users, running, database_url)
        await running.end()


async def are_gone(url: URL, pids: list[int]) -> bool:
    """Tell whether none of these backends is there any more."""
    return not set(pids) & set(await asyncio.to_thread(open_transactions, url))


async def pays(users: Load, user_id: str) -> bool:
    """Tell whether the process that is not frozen gets a lock on an account."""
    credit = users.credits.setdefault((user_id, "thaw"), Credit(user_id, "thaw", "grant", 1_000_000))
    body = {"kind": "grant", "amount": "1", "memo": "thaw"}
    answer = await users.ask(users.clients[1], "POST", f"/v1/users/{user_id}/credits", key="thaw", body=body)
    credit.entry = answer.body if answer.outcome is Outcome.ACKNOWLEDGED else None
    return answer.outcome is Outcome.ACKNOWLEDGED
