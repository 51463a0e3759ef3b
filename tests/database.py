"""The databases that tests run on: one server a session, one migrated template on it, one clone of that for each test.

So every test has real commits and real concurrency, and none sees another's rows. ``TALKTIME_TEST_DATABASE`` says which
server is used:

- ``container``: a container of the image ``TALKTIME_TEST_IMAGE`` (the official ``postgres:17`` unless set); an error,
  never another server, where it cannot be started
- ``embedded``: talktime's own embedded PostgreSQL, in a temporary home
- ``auto`` (default): the container where a Docker engine answers and has the image or can pull it, else embedded
- ``postgresql://...``: a running server, and a role on it that may create databases; its settings stay as they are.
  If its database is the coordinator's of a Citus cluster (citus.py), all tables of all tests are distributed
"""

from __future__ import annotations

import gc
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import docker.errors
import psycopg
from psycopg import sql
from sqlalchemy.engine import URL, make_url

from talktime.store.embedded import embedded_postgres
from talktime.store.schema import upgrade
from tests.citus import Cluster, cluster_of, on_workers

# No reaper container: it would need a second image, and `with` removes what it would. To be set before the import.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.docker_client import DockerClient

# Nothing in a test's database needs to outlive a power cut. Commits still wait for the WAL, as in production.
FAST = {"fsync": "off", "full_page_writes": "off"}
# What `clock` shows first.
SIMULATED_START_US = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL: a URL to its maintenance database, and what was chosen and why, in words."""

    url: URL
    description: str


@contextmanager
def running_server(choice: str, image: str) -> Iterator[Server]:
    """Run the PostgreSQL that `choice`, a value of ``TALKTIME_TEST_DATABASE``, asks for."""
    reason = "as asked"
    if choice == "auto":
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            obstacle = _container_obstacle(image)
            gc.collect()  # the socket that docker leaves open where nobody answers
        choice = "embedded" if obstacle else "container"
        reason = obstacle or "a Docker engine answers and has the image"
    if choice == "container":
        with _container(image) as url:
            yield Server(url, f"a container of {image} ({reason})")
    elif choice == "embedded":
        with _embedded() as url:
            yield Server(url, f"the embedded PostgreSQL ({reason})")
    elif choice.startswith("postgres"):
        url = make_url(choice).set(drivername="postgresql+psycopg")
        yield Server(url, f"{url!r} ({reason})")
    else:
        message = f"TALKTIME_TEST_DATABASE must be auto, container, embedded or a postgresql:// URL, not {choice!r}"
        raise ValueError(message)


def _container_obstacle(image: str) -> str | None:
    """Say why no container of `image` can be started, or None if nothing is in the way. Pulls the image if need be."""
    try:
        client = DockerClient().client
    except (docker.errors.DockerException, OSError):
        return "no Docker engine answers"
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        try:
            client.images.pull(image)
        except (docker.errors.DockerException, OSError):
            return f"the Docker engine has no image {image} and cannot pull it"
    finally:
        client.close()
    return None


@contextmanager
def _container(image: str) -> Iterator[URL]:
    # The maintenance database exists in every cluster, so none is created for the user's name.
    container = PostgresContainer(image, username="postgres", password="test", dbname="postgres", driver="psycopg")
    settings = {**FAST, "max_connections": "200"}
    with container.with_command([word for item in settings.items() for word in ("-c", "=".join(item))]):
        yield make_url(container.get_connection_url())


@contextmanager
def _embedded() -> Iterator[URL]:
    with tempfile.TemporaryDirectory(prefix="talktime-") as home, embedded_postgres(Path(home)) as text:
        url = make_url(text)
        with connect(url) as admin:
            for name, value in FAST.items():
                admin.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value))
            admin.execute("SELECT pg_reload_conf()")
        yield url


def connect(url: URL) -> psycopg.Connection:
    """Open a psycopg connection of its own, outside SQLAlchemy, that commits each statement."""
    text = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(text, autocommit=True)


@dataclass(slots=True)
class Databases:
    """Databases made for one run. Their names carry a token of the run, so that several runs can share a server."""

    server: URL
    admin: psycopg.Connection
    prefix: str = field(default_factory=lambda: f"talktime_test_{secrets.token_hex(4)}_")
    numbers: Iterator[int] = field(default_factory=count)
    cluster: Cluster | None = field(init=False)

    def __post_init__(self) -> None:
        self.cluster = cluster_of(self.admin)

    @property
    def on_citus(self) -> bool:
        """Whether the tables of databases that are not empty are distributed."""
        return self.cluster is not None

    @property
    def template(self) -> str:
        """The name of the migrated database that nobody may connect to."""
        return f"{self.prefix}template"

    def create_template(self) -> None:
        """Migrate a database once, for all clones."""
        upgrade(self._create(self.template, "template1"))
        self._run("ALTER DATABASE {} ALLOW_CONNECTIONS false", self.template)

    def create(self, *, empty: bool = False) -> URL:
        """Create a database: a clone of the template, or one without any table, which is on no cluster."""
        url = self._create(f"{self.prefix}{next(self.numbers)}", "template1" if empty else self.template)
        if self.cluster is not None and not empty:
            self.cluster.join(url)
        return url

    def drop(self, url: URL) -> None:
        """Drop a database, its connections with it."""
        assert url.database
        self._drop(url.database)

    def drop_all(self) -> None:
        """Drop what this run made and has not dropped yet, the template too."""
        query = "SELECT datname FROM pg_database WHERE starts_with(datname, %s)"
        for (name,) in self.admin.execute(query, [self.prefix]).fetchall():
            self._drop(name)

    def _create(self, name: str, template: str) -> URL:
        # Copying files takes half the time of the default, which logs every page.
        self._run("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, template)
        return self.server.set(database=name)

    def _drop(self, name: str) -> None:
        self._run("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)
        if self.cluster is not None:
            self.cluster.drop(name)

    def _run(self, statement: str, *names: str) -> None:
        self.admin.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@contextmanager
def provided_databases(server: URL) -> Iterator[Databases]:
    """Prepare the template on `server`; leave nothing behind."""
    with connect(server) as admin:
        databases = Databases(server, admin)
        try:
            databases.create_template()
            yield databases
        finally:
            databases.drop_all()


# A sequence, because setval is seen at once by every transaction, open ones too, and is never rolled back. As doubles,
# which multiplying an interval means, microseconds are exact until the year 2255.
# One statement, in which Citus passes nothing on: on a cluster it is run on every node.
_SIMULATION = """
DO $do$
BEGIN
    SET LOCAL citus.enable_ddl_propagation TO off;
    CREATE SCHEMA simulated;
    CREATE SEQUENCE simulated.instant MINVALUE 0 START {start};
    CREATE FUNCTION simulated.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql
        AS $$ SELECT timestamptz 'epoch' + last_value * interval '1 microsecond' FROM simulated.instant $$;
    GRANT USAGE ON SCHEMA simulated TO PUBLIC;
    GRANT SELECT ON simulated.instant TO PUBLIC;
END $do$
"""
_SHOW_SIMULATED = "ALTER DATABASE {database} SET search_path = simulated, pg_catalog, public"


@dataclass(frozen=True, slots=True)
class Clock:
    """The simulated clock of one database, in microseconds since the epoch. It stands still until it is moved."""

    connection: psycopg.Connection
    on_citus: bool = False

    @property
    def now(self) -> int:
        """What the clock shows."""
        row = self.connection.execute("SELECT last_value FROM simulated.instant").fetchone()
        assert row
        return int(row[0])

    def set(self, us: int) -> None:
        """Move the clock to an instant, also an earlier one; on a cluster, one node after the other."""
        if self.on_citus:
            on_workers(self.connection, sql.SQL("SELECT setval('simulated.instant', {})").format(us))
        self.connection.execute("SELECT setval('simulated.instant', %s)", [us])

    def tick(self, us: int) -> None:
        """Move the clock on."""
        self.set(self.now + us)


@contextmanager
def simulated_clock(url: URL) -> Iterator[Clock]:
    """Put a settable clock_timestamp() before PostgreSQL's own, for all connections opened from now on.

    The product calls it unqualified and need not know.
    """
    assert url.database
    with connect(url) as connection:
        simulation = sql.SQL(_SIMULATION).format(start=sql.Literal(SIMULATED_START_US))
        on_citus = cluster_of(connection) is not None
        if on_citus:
            on_workers(connection, simulation)
        connection.execute(simulation)
        connection.execute(sql.SQL(_SHOW_SIMULATED).format(database=sql.Identifier(url.database)))
        yield Clock(connection, on_citus)
