"""The database's disk is full: writes are answered 503, and when there is room again, all goes on by itself.

Full where the tables are, PostgreSQL refuses what needs a new page and serves the rest. Full where its log (WAL) is, it
gives up altogether and cannot even recover until there is room.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker.errors
import pytest
from psycopg import OperationalError
from sqlalchemy.engine import URL, make_url
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.docker_client import DockerClient

from tests.database import connect
from tests.faults.books import check_books, close_books
from tests.faults.load import KEY, SETTINGS, Outcome, load, tell
from tests.faults.processes import cluster, done, until
from tests.program import fresh_home, run, written

IMAGE = os.environ.get("TALKTIME_TEST_IMAGE") or "postgres:17"
FULL_S = 2
CHUNK = b"\0" * (1 << 16)


# --- where the tables are ---------------------------------------------------------------------------------------------


def engine_obstacle() -> str | None:
    """Say why no container can be started, or None."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        try:
            client = DockerClient().client
            client.images.get(IMAGE)
            client.close()
        except docker.errors.ImageNotFound:
            return f"the Docker engine has no image {IMAGE}"
        except (docker.errors.DockerException, OSError):
            return "no Docker engine answers"
        finally:
            gc.collect()  # the socket that docker leaves open where nobody answers
    return None


@contextmanager
def small_tablespace() -> Iterator[tuple[URL, Any]]:
    """Yield a migrated database whose tables lie on a file system of their own of 24 MB, and its container."""
    container = PostgresContainer(IMAGE, username="postgres", password="test", dbname="postgres", driver="psycopg")
    with container.with_tmpfs_mount("/small", "size=24m,mode=1777") as started:
        wrapped = started.get_wrapped_container()
        assert 0 == wrapped.exec_run(["mkdir", "-m", "700", "/small/tables"], user="postgres").exit_code
        server = make_url(started.get_connection_url())
        with connect(server) as admin:
            admin.execute("CREATE TABLESPACE small LOCATION '/small/tables'")
            admin.execute("CREATE DATABASE talktime TABLESPACE small")
        url = server.set(database="talktime")
        migrated = run("migrate", TALKTIME_DATABASE_URL=written(url))
        assert 0 == migrated.returncode, migrated.stderr
        yield url, wrapped


async def test_where_there_is_no_room_for_tables_writes_are_answered_503_and_reads_go_on(tmp_path: Path) -> None:
    if obstacle := engine_obstacle():
        pytest.skip(f"a file system of its own for the tables: {obstacle}")
    seed = random.randrange(10**9)
    with small_tablespace() as (url, container):
        variables = {**SETTINGS, "TALKTIME_DATABASE_URL": written(url), "TALKTIME_SERVICE_KEY": KEY}
        async with (
            cluster(tmp_path, variables, reconcilers=1) as running,
            load(running.origins, KEY, seed=seed, pace_s=0.05) as users,
        ):
            await asyncio.sleep(1)
            fill = ["dd", "if=/dev/zero", "of=/small/filler", "bs=8k"]
            assert 1 == (await asyncio.to_thread(container.exec_run, fill, user="postgres")).exit_code
            await until(lambda: done(users.statuses[503] > 0 or bool(users.wrong)), "the disk to be full")
            told, read = users.statuses[503], users.count(Outcome.ACKNOWLEDGED, reads=True)
            await asyncio.sleep(FULL_S)
            assert users.statuses[503] > told
            assert users.count(Outcome.ACKNOWLEDGED, reads=True) > read
            users.check()
            await check_books(users, url)
            await running.audit()
            answers = dict(users.statuses)
            assert 0 == (await asyncio.to_thread(container.exec_run, ["rm", "/small/filler"])).exit_code
            resumed = await until(users.is_served, "commands after there was room")
            await asyncio.sleep(1)
            told = users.statuses[503]
            await asyncio.sleep(1)
            assert told == users.statuses[503]
            await close_books(users, running, url)
            tell(f"seed {seed}: {users}; while it was full {answers}; goes on after {resumed:.2f} s")
            await running.end()


# --- where the log is -------------------------------------------------------------------------------------------------


@contextmanager
def small_log() -> Iterator[Path]:
    """Yield a migrated home in which PostgreSQL's log lies on a file system of its own of 64 MB."""
    with tempfile.TemporaryDirectory(prefix="talktime-") as folder, fresh_home(Path(folder)) as home:
        assert 0 == run("migrate", "--home", home).returncode
        log = home / "postgres" / "pg_wal"
        owner = log.stat()
        content = Path(folder, "content")
        shutil.copytree(log, content)
        options = f"size=64m,mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", log], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"a file system of its own for the log: {mounted.stderr.strip()}")
        try:
            shutil.copytree(content, log, dirs_exist_ok=True)
            for path in (log, *log.rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid)
            yield home
        finally:
            subprocess.run(["umount", "--lazy", log], check=True)


def fill(folder: Path) -> Path:
    """Fill a file system to its last byte; return the file that did it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(CHUNK)
    assert 0 == os.statvfs(folder).f_bavail
    return filler


def exhaust_log(url: URL) -> None:
    """Have PostgreSQL go on to its next file of log, as a day's work would, until there is none."""
    with suppress(OperationalError):
        while True:
            with connect(url) as connection:
                connection.execute("SELECT pg_switch_wal()")


async def test_where_there_is_no_room_for_the_log_all_is_answered_503_and_goes_on_by_itself(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system of its own for the log: only root may mount one")
    seed = random.randrange(10**9)
    with small_log() as home:
        url = make_url(f"postgresql+psycopg://talktime@/talktime?host={home / 'postgres'}&port=5432")
        async with (
            cluster(tmp_path, {**SETTINGS, "TALKTIME_SERVICE_KEY": KEY}, "--home", home) as running,
            load(running.origins, KEY, seed=seed) as users,
        ):
            await asyncio.sleep(1)
            filler = fill(home / "postgres" / "pg_wal")
            await asyncio.to_thread(exhaust_log, url)
            assert "PANIC" in (home / "postgres.log").read_text(errors="replace")
            await asyncio.sleep(FULL_S)
            assert users.statuses[503] > 0
            assert not await users.is_served()
            users.check()
            answers = dict(users.statuses)
            filler.unlink()
            resumed = await until(users.is_served, "commands after there was room")
            await asyncio.sleep(1)
            await close_books(users, running, url)
            tell(f"seed {seed}: {users}; while it was full {answers}; goes on after {resumed:.2f} s")
            await running.end()
