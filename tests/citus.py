"""Databases on a Citus cluster: what ``TALKTIME_TEST_DATABASE`` means if it is the URL of a coordinator.

The URL's own database has the extension and the nodes. A test's database is a clone of the template as on any server,
that is then made a cluster of its own, since extension and nodes belong to a database: with an equal one on every
worker, and the tables distributed. All of it goes through the coordinator, so that no worker need be reached from here.
The role must be a superuser, and must be let in by the workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql
from sqlalchemy.engine import URL

from talktime.store.citus import distribute

# Each test makes all shards anew: as few as show that there are several.
SHARDS = 4


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the coordinator knows it."""

    host: str
    port: int
    group: int
    has_shards: bool


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes of the coordinator that `admin` is connected to; itself, if it is among them, is group 0."""

    admin: psycopg.Connection
    nodes: tuple[Node, ...]

    def join(self, url: URL) -> None:
        """Make a cluster of its own of a migrated database on the coordinator, and distribute its tables."""
        assert url.database
        workers = [node for node in self.nodes if node.group]
        on_workers(self.admin, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(url.database)))
        text = url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(text, autocommit=True) as own:
            own.execute("CREATE EXTENSION citus")
            for node in workers:
                # Not yet among the nodes of this database.
                query = "SELECT success, result FROM master_run_on_worker(ARRAY[%s], ARRAY[%s::int], ARRAY[%s], false)"
                _all_done(own.execute(query, [node.host, node.port, "CREATE EXTENSION citus"]).fetchall())
            for node in self.nodes:
                place = [node.host, node.port]
                own.execute(f"SELECT citus_{'add_node' if node.group else 'set_coordinator_host'}(%s, %s)", place)
                own.execute("SELECT citus_set_node_property(%s, %s, 'shouldhaveshards', %s)", [*place, node.has_shards])
        distribute(url.update_query_dict({"options": f"-c citus.shard_count={SHARDS}"}))

    def drop(self, name: str) -> None:
        """Drop a database on all workers."""
        on_workers(self.admin, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def cluster_of(admin: psycopg.Connection) -> Cluster | None:
    """Return the cluster whose coordinator a connection leads to; None on any other server."""
    if not admin.execute("SELECT FROM pg_extension WHERE extname = 'citus'").fetchall():
        return None
    nodes = admin.execute(
        "SELECT nodename, nodeport, groupid, shouldhaveshards FROM pg_dist_node"
        " WHERE isactive AND noderole = 'primary' ORDER BY groupid"
    ).fetchall()
    return Cluster(admin, tuple(Node(*node) for node in nodes))


def on_workers(connection: psycopg.Connection, statement: sql.Composable) -> None:
    """Run a statement on all workers that the connection's database knows, outside its transaction."""
    text = statement.as_string(connection)
    _all_done(connection.execute("SELECT success, result FROM run_command_on_workers(%s)", [text]).fetchall())


def _all_done(answers: list[tuple[bool, str]]) -> None:
    failed = [result for success, result in answers if not success]
    if failed:
        message = f"a worker failed: {'; '.join(failed)}"
        raise RuntimeError(message)
