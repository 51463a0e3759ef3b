"""The databases of a benchmark: its own, on the server of TALKTIME_DATABASE_URL or on an embedded one, and dropped."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql
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


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL, as it is set for daily use."""

    url: URL
    is_embedded: bool

    def about(self) -> dict[str, str]:
        """Return its version and the settings that matter here, none of which a benchmark changes."""
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


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[Server]:
    """Run the PostgreSQL of a home, unless the environment names another one."""
    given = os.environ.get("TALKTIME_DATABASE_URL")
    url = make_url(given).set(drivername="postgresql+psycopg") if given else None
    with provide_database(url, home) as found:
        yield Server(found, is_embedded=url is None)
