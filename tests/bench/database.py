"""The databases of a benchmark: its own, on the server of TALKTIME_DATABASE_URL or on an embedded one, and dropped.

PostgreSQL's defaults are made for a small machine: a million chats outgrow their 128 MB of buffers, and fill their
1 GB of log so often that checkpoints never end. So the embedded server is set as an operator would set it for such a
load, and is the same for talktime and for what it is compared with. A given server is its operator's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from sqlalchemy.engine import URL, make_url

from talktime.store.database import provide_database
from talktime.store.schema import upgrade
from tests.database import connect

_SHOWN = (
    "server_version",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_level",
    "wal_sync_method",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "max_connections",
    "autovacuum",
    "jit",
    "random_page_cost",
)


_GB = 1 << 30
_BUFFERS_BYTES_MAX = 4 * _GB
_BUFFERS_PART_OF_MEMORY = 4  # a quarter


def operators_settings(memory_bytes: int) -> dict[str, str]:
    """Return what an operator sets for a million chats, on a machine with so much memory."""
    buffers_bytes = min(memory_bytes // _BUFFERS_PART_OF_MEMORY, _BUFFERS_BYTES_MAX)
    return {
        "shared_buffers": f"{buffers_bytes >> 20}MB",
        "max_wal_size": "8GB",
        "checkpoint_timeout": "15min",
    }


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL."""

    url: URL
    is_embedded: bool

    def about(self) -> dict[str, str]:
        """Return its version and the settings that matter here."""
        with connect(self.url) as connection:
            rows = connection.execute(
                "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY(%s)", [list(_SHOWN)]
            ).fetchall()
        return {"server": "embedded" if self.is_embedded else "given", **dict(rows)}

    @contextlib.contextmanager
    def database(self) -> Iterator[URL]:
        """Make a migrated database, and drop it when the block ends."""
        name = sql.Identifier(f"talktime_bench_{secrets.token_hex(4)}")
        with connect(self.url) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
        try:
            url = self.url.set(database=name.as_string().strip('"'))
            upgrade(url)
            yield url
        finally:
            with connect(self.url) as admin:
                admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def caution(about: Mapping[str, str]) -> str:
    """Say so if a server does not make commits wait for the disk; else nothing."""
    off = [f"{name} = off" for name in ("fsync", "synchronous_commit") if about[name] == "off"]
    if not off:
        return ""
    return (
        f"this server has {' and '.join(off)}: no commit waited for the disk, so whatever commits often, talktime's"
        " heartbeats and most baselines, was faster than where commits are safe"
    )


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[Server]:
    """Run the PostgreSQL of a home, set for the load of a benchmark, unless the environment names another one."""
    given = os.environ.get("TALKTIME_DATABASE_URL")
    url = make_url(given).set(drivername="postgresql+psycopg") if given else None
    if url is None:
        _set_up(home)
    with provide_database(url, home) as found:
        yield Server(found, is_embedded=url is None)


def _set_up(home: Path) -> None:
    """Write the settings into a home, and stop its server again: its buffers are made when it starts."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with provide_database(None, home) as url, connect(url) as admin:
        for name, value in operators_settings(memory_bytes).items():
            admin.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value))


def settle(connection: psycopg.Connection, *tables: str) -> None:
    """Do what was put off while tables, or all of them, were filled, so that it does not burden what is measured."""
    connection.execute(f"VACUUM (FREEZE, ANALYZE) {', '.join(tables)}")
    with contextlib.suppress(InsufficientPrivilege):
        connection.execute("CHECKPOINT")
