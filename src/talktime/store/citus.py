"""Distributing the tables on a Citus cluster that an operator has set up.

Users' tables go by `bucket`, all in one co-location group, so that an account and all that belongs to it are on one
node. The rate cards are on every node. All else stays on the coordinator, which every session connects to. Foreign keys
go with the tables, and privileges on columns are granted once more; there are no functions in the schema that would
have to be created again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, pool, text
from sqlalchemy.exc import DBAPIError, OperationalError

from talktime.errors import DatabaseUnavailable, SchemaError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row
    from sqlalchemy.engine import URL

REFERENCE = "advisor"
DISTRIBUTED = (
    *("account", "allowance", "chat", "segment", "ledger_entry"),
    *("opening_account", "opening_allowance", "opening_chat"),
    "event",
)
"""Parents before children: Citus refuses a foreign key to a table that is not distributed yet."""
LOCAL = ("console_session", "reconciler_audit", "reconciler_pass", "service_key")

SETTINGS = (
    # The lock of migrations: one at a time, and neither they nor this beside the other.
    "SET LOCAL lock_timeout = '60s'",
    "SELECT pg_advisory_xact_lock(8317214)",
    # The tables are locked as long as their rows are copied: not at all where somebody works on them.
    "SET LOCAL lock_timeout = '5s'",
    "SET LOCAL statement_timeout = 0",
    # What stays on the coordinator is not to become one of Citus' tables because of what it refers to.
    "SET LOCAL citus.enable_local_reference_table_foreign_keys TO off",
    # One connection to each node for the whole transaction: a child's rows must see their parents, not yet committed.
    "SET LOCAL citus.multi_shard_modify_mode TO 'sequential'",
)

VERSION_MIN = (13, 1)
"""The first that passes on privileges on columns; repeatable reads within a bucket came before (11.2)."""

_VERSION = text("SELECT extversion FROM pg_extension WHERE extname = 'citus'")
_NODES = text("SELECT count(*) FROM pg_dist_node WHERE isactive AND shouldhaveshards AND noderole = 'primary'")
# Method n: a copy on every node (model t), or in no group: a table on the coordinator that Citus knows of.
_PLACES = text("""
SELECT name, partmethod::text AS method, repmodel::text AS model, colocationid AS together,
    column_to_column_name(logicalrelid, partkey) AS by
FROM unnest(CAST(:names AS text[])) AS name JOIN pg_dist_partition ON logicalrelid = to_regclass(name)
WHERE NOT (partmethod = 'n' AND colocationid = 0)
""")
_COLUMN_PRIVILEGES = text("""
SELECT format('GRANT %s (%s) ON %s TO %s', privilege_type, string_agg(quote_ident(attname), ', ' ORDER BY attnum),
    attrelid::regclass, grantee::regrole)
FROM unnest(CAST(:names AS text[])) AS name JOIN pg_attribute ON attrelid = to_regclass(name), aclexplode(attacl)
WHERE grantee <> 0
GROUP BY attrelid, privilege_type, grantee
ORDER BY attrelid::regclass::text
""")
_LEFT_BEHIND = text("""
SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE pg_relation_size(to_regclass(name)) > 0
""")
_NAMES = {"names": [REFERENCE, *DISTRIBUTED]}


def statement_for(name: str) -> str:
    """Return the statement that distributes a table."""
    if name == REFERENCE:
        return f"SELECT create_reference_table('{name}')"
    # A group of their own: another application's tables may be distributed by a smallint too.
    together_with = "none" if name == DISTRIBUTED[0] else DISTRIBUTED[0]
    return f"SELECT create_distributed_table('{name}', 'bucket', colocate_with => '{together_with}')"


def obstacle(version: str | None, nodes: int) -> str | None:
    """Say why nothing can be distributed on such a database; None if it can."""
    if version is None:
        return "the database has no extension citus; on every node: CREATE EXTENSION citus"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < VERSION_MIN:
        return f"citus {version} is too old, 13.1 or newer is needed"
    if nodes == 0:
        return "no node of the cluster may hold shards; on the coordinator: SELECT citus_add_node(host, port)"
    return None


def require_cluster(url: URL) -> None:
    """Check that the tables of a database can be distributed; changes nothing. Synchronous, as all of this module.

    Raises:
        DatabaseUnavailable: it cannot be reached.
        SchemaError: it is no Citus cluster, or not one that is ready.
    """
    with _transaction(url, "cannot distribute the tables") as connection:
        version = connection.scalar(_VERSION)
        nodes = 0 if version is None else connection.scalar(_NODES)
        reason = obstacle(version, nodes or 0)
    if reason is not None:
        message = f"cannot distribute the tables: {reason}"
        raise SchemaError(message)


def distribute(url: URL) -> list[str]:
    """Distribute the tables of a migrated database that are not distributed yet, with their rows; all or none.

    Returns the names of those. The rows that were copied are removed from the coordinator afterwards, in a transaction
    of its own; where that fails, the next call does it.

    Raises:
        DatabaseUnavailable: no answer, from the coordinator or from a node.
        SchemaError: it cannot be done, and why.
    """
    require_cluster(url)
    with _transaction(url, "cannot distribute the tables") as connection:
        done = distribute_missing(connection)
    with _transaction(url, "the tables are distributed, but their old rows are still on the coordinator") as connection:
        remove_left_behind(connection)
    return done


def distribute_missing(connection: Connection) -> list[str]:
    """Distribute the tables that are not distributed yet, in a transaction that the caller commits."""
    for setting in SETTINGS:
        connection.execute(text(setting))
    found = _places(connection)
    missing = [name for name in _NAMES["names"] if name not in found]
    privileges = connection.execute(_COLUMN_PRIVILEGES, {"names": missing}).scalars().all()
    for name in missing:
        connection.execute(text(statement_for(name)))
    # A table's privileges go along when it is distributed; those on its columns are passed on when they are granted.
    for privilege in privileges:
        connection.execute(text(privilege))
    if found.keys() | missing != _places(connection).keys():
        message = "cannot distribute the tables: Citus does not know of them afterwards"
        raise SchemaError(message)
    return missing


def remove_left_behind(connection: Connection) -> None:
    """Remove what distributed tables held before: Citus copied it, and left it, unseen, on the coordinator's disk."""
    connection.execute(text("SET LOCAL lock_timeout = '5s'"))
    left_behind = set(connection.execute(_LEFT_BEHIND, _NAMES).scalars())
    # Children go with their parents.
    for name in (REFERENCE, DISTRIBUTED[0]):
        if left_behind & ({name} if name == REFERENCE else {*DISTRIBUTED}):
            connection.execute(text(f"SELECT truncate_local_data_after_distributing_table('{name}')"))


def _places(connection: Connection) -> dict[str, Row[Any]]:
    """Return how the tables are distributed that are, and accept no other way than this module's."""
    found = {row.name: row for row in connection.execute(_PLACES, _NAMES)}
    root = found.get(DISTRIBUTED[0])
    for name, row in found.items():
        if name == REFERENCE:
            as_it_should = (row.method, row.model) == ("n", "t")
        else:
            as_it_should = root is not None and (row.method, row.by, row.together) == ("h", "bucket", root.together)
        if not as_it_should:
            message = f"cannot distribute the tables: {name} is distributed already, but in another way"
            raise SchemaError(message)
    return found


@contextmanager
def _transaction(url: URL, failed: str) -> Iterator[Connection]:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"), poolclass=pool.NullPool, connect_args={"connect_timeout": 5}
    )
    try:
        with engine.begin() as connection:
            yield connection
    except OperationalError as error:
        raise DatabaseUnavailable(_in_a_line(failed, error)) from error
    except DBAPIError as error:
        raise SchemaError(_in_a_line(failed, error)) from error


def _in_a_line(failed: str, error: DBAPIError) -> str:
    # All of it, for Citus says in details and hints what is to be done.
    return f"{failed}: {' '.join(str(error.orig).split())}"
