"""``kill -9`` at random moments under load: nothing that was acknowledged is lost, and nothing happens twice.

Passes are committed without waiting for the disk, so PostgreSQL may forget the latest when it is killed; what anybody
reads must not show it. ``TALKTIME_TEST_KILLS`` says how often each kind of process is killed (default 2).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from psycopg import OperationalError
from sqlalchemy.engine import URL, make_url

from tests.database import connect
from tests.faults.books import check_books, close_books
from tests.faults.load import SETTINGS, Load, load, tell
from tests.faults.processes import Cluster, cluster, passes_after, until
from tests.program import fresh_home, postmaster, run

KILLS = int(os.environ.get("TALKTIME_TEST_KILLS", "2"))
COMPLETE_EVERY = 4
AT_ONCE = 2
KINDS = ("API", "reconciler", "PostgreSQL")


@pytest.fixture
def home() -> Iterator[Path]:
    """A migrated home. Its path is short, since a socket's has to be."""
    with tempfile.TemporaryDirectory(prefix="talktime-") as folder, fresh_home(Path(folder)) as home:
        assert 0 == run("migrate", "--home", home).returncode
        yield home


def url_of(home: Path) -> URL:
    return make_url(f"postgresql+psycopg://talktime@/talktime?host={home / 'postgres'}&port=5432")


def a_backend(url: URL) -> int | None:
    """Return the process id of a backend that serves an API process or a reconciler, if PostgreSQL answers."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'talktime' ORDER BY random() LIMIT 1"
    try:
        with connect(url) as connection:
            row = connection.execute(query).fetchone()
    except OperationalError:
        return None
    return None if row is None else int(row[0])


async def kill(kind: str, home: Path, running: Cluster, users: Load, chance: random.Random) -> float:
    """Kill something, and return how many seconds later it worked again without a hand on it."""
    if kind == "PostgreSQL":
        backend = a_backend(url_of(home)) if chance.random() < 0.3 else None
        # Where it has only just died, and nobody has started it again yet, its number stands there no more.
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(backend or postmaster(home), signal.SIGKILL)
        return await until(users.is_served, "the API")
    if kind == "API":
        number = chance.randrange(len(running.apis))
        await running.apis[number].kill()
        return await until(partial(users.is_served_by, users.clients[number]), "the API")
    program = chance.choice(running.reconcilers)
    await program.kill()
    return await until(partial(passes_after, program, len(program.output)), "a pass")


async def make_key(running: Cluster) -> str:
    code, out, err = await running.run("key", "new", "load")
    assert 0 == code, err
    return out.strip()


@asynccontextmanager
async def under_load(home: Path, folder: Path, seed: int) -> AsyncIterator[tuple[Cluster, Load]]:
    async with cluster(folder, SETTINGS, "--home", home) as running:
        key = await make_key(running)
        async with load(running.origins, key, seed=seed) as users:
            yield running, users


async def test_kill_nine_loses_nothing_that_was_acknowledged_and_doubles_nothing(home: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    plan = list(KINDS) * KILLS
    chance.shuffle(plan)
    took: dict[str, list[float]] = defaultdict(list)
    async with under_load(home, tmp_path, seed) as (running, users):
        recovering: dict[asyncio.Task[float], str] = {}
        for number, kind in enumerate(plan, start=1):
            await asyncio.sleep(chance.uniform(0, 1.5))
            # The next may die while the one before is only just coming up.
            recovering[asyncio.create_task(kill(kind, home, running, users, chance))] = kind
            complete = number % COMPLETE_EVERY == 0
            while len(recovering) >= (1 if complete else AT_ONCE):
                for task in (await asyncio.wait(recovering, return_when=asyncio.FIRST_COMPLETED))[0]:
                    took[recovering.pop(task)].append(task.result())
            users.check()
            if complete:
                await asyncio.gather(check_books(users, url_of(home)), running.audit())
        for task, kind in recovering.items():
            took[kind].append(await task)
        books = await close_books(users, running, url_of(home))
        assert 2 * KILLS == sum(program.kills for program in running.programs)
        # The kills hit: callers found nobody, and those found no database.
        assert {0, 503} <= set(users.statuses)
        failed = [output.strip() for program in running.programs for output in program.failed]
        await running.end()
    tell(f"seed {seed}: {len(plan)} kills; {users}")
    tell(f"credits {len(users.credits)}, segments {len(books.segments)}, ledger entries {len(books.entries)}")
    tell(f"starts that failed with their database, and were repeated: {len(failed)} {sorted(set(failed))}")
    for kind, seconds in sorted(took.items()):
        middle, worst = statistics.median(seconds), max(seconds)
        tell(f"{kind}: {len(seconds)} kills; works again after {middle:.2f} s, at worst {worst:.2f} s")
