"""Engine and transactions: retries, time limits, and driver errors translated in this one place."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from talktime.errors import DatabaseUnavailable, LockTimeout
from talktime.store.embedded import embedded_postgres

T = TypeVar("T")

log = logging.getLogger(__name__)

ATTEMPTS = 4
TRANSACTION_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 5
POOL_WAIT_SECONDS_MAX = 5
# A lock is waited for less long than a connection of the pool, so that those who wait for one account cannot keep
# all others from theirs; and a process that was frozen in a transaction does not hold its locks for ever.
# Instants come back as text, which the driver reads in this style alone, whatever the server's is.
_SESSION = "SET lock_timeout = '2s'; SET idle_in_transaction_session_timeout = '20s'; SET DateStyle = 'ISO'"

APPLICATION_ROLE = "talktime_app"
"""The role with no more privileges than the application needs; a migration makes it, and says which they are."""

# Since PostgreSQL 16 a member of a role need not be allowed to take it. The role is the server's, its privileges are
# this database's: where that has not been migrated yet, or no longer is, there are none.
_MAY_TAKE_ROLE = """
SELECT pg_has_role(oid, CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END)
    AND has_table_privilege(oid, to_regclass('account'), 'INSERT')
FROM pg_roles WHERE rolname = %s
"""
# The schemas that the login sees: "$user" in a search path would mean the role from now on.
_KEEP_SCHEMAS = """
SELECT set_config('search_path', array_to_string(ARRAY(
    SELECT quote_ident(name) FROM unnest(current_schemas(false)) name
), ', '), false)
"""

_DEADLOCK_OR_SERIALIZATION = ("40P01", "40001")
# Connection trouble (08), resources such as disk and connections (53), operator intervention (57), system errors
# (58), a database that turned read-only behind a failover, and a transaction that idled for too long.
_UNAVAILABLE = ("08", "53", "57", "58", "25006", "25P03")
_LOCK_NOT_AVAILABLE = "55P03"
_NOT_MIGRATED = ("42P01", "42703")
_NOT_ALLOWED = "42501"


@contextmanager
def provide_database(url: URL | None, home: Path) -> Iterator[URL]:
    """Yield the URL of the database to use: the one given, else that of the embedded PostgreSQL of `home`."""
    if url is not None:
        yield url
        return
    with embedded_postgres(home) as embedded_url:
        yield make_url(embedded_url)


class Database:
    """A pool of connections to one PostgreSQL."""

    def __init__(self, url: URL | str, *, pool_size: int = 20) -> None:
        self.engine = create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            hide_parameters=True,  # ids, memos and keys stay out of the log
            # Whatever the server's default is: the locking order is made for this one.
            isolation_level="READ COMMITTED",
            pool_timeout=POOL_WAIT_SECONDS_MAX,
            connect_args={"connect_timeout": CONNECT_SECONDS_MAX, "application_name": "talktime"},
        )
        self._told_of_role = False
        event.listen(self.engine.sync_engine, "connect", self._prepare_session)

    async def close(self) -> None:
        """Close all connections."""
        await self.engine.dispose()

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` in one READ COMMITTED transaction and commit it.

        A deadlock, a serialization failure, or a connection that was found dead before COMMIT is tried again, with
        nothing written by the failed attempt; so `work` may run several times.

        Raises:
            DatabaseUnavailable: no answer. If the connection was lost at COMMIT the outcome is unknown: the caller
                repeats the request, which its idempotency makes safe.
        """
        return await self._run(work, None)

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work`, which reads with a single statement, without the cost of a transaction around it."""
        return await self._run(work, "AUTOCOMMIT")

    async def snapshot(self, work: Callable[[AsyncConnection], Awaitable[T]], *, patient: bool = False) -> T:
        """Run `work`, whose statements all see one and the same snapshot, without a time limit if `patient`.

        It only reads.
        """
        return await self._run(work, "REPEATABLE READ", patient=patient)

    async def _run(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        isolation: str | None,
        *,
        patient: bool = False,
    ) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            committing = False
            try:
                async with (
                    asyncio.timeout(None if patient else TRANSACTION_SECONDS_MAX),
                    self.engine.connect() as connection,
                ):
                    if isolation is not None:
                        await connection.execution_options(isolation_level=isolation)
                    result = await work(connection)
                    committing = isolation is None  # what only read can be read again
                    await connection.commit()
                    return result
            except DBAPIError as error:
                again = _is_conflict(error) or (error.connection_invalidated and not committing)
                if not again or attempt == ATTEMPTS:
                    translated = _translated(error)
                    if translated is error:
                        raise
                    raise translated from error
            except (TimeoutError, PoolTimeoutError, OSError) as error:
                message = "the database did not answer in time"
                raise DatabaseUnavailable(message) from error
            await asyncio.sleep(random.uniform(0, 0.02) * attempt)  # noqa: S311 - spreads retries, guards nothing
        raise AssertionError

    def _prepare_session(self, connection: DBAPIConnection, _: object) -> None:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(_SESSION)
        cursor.execute(_MAY_TAKE_ROLE, (APPLICATION_ROLE,))
        found = cursor.fetchone()
        if found is not None and found[0]:
            cursor.execute(_KEEP_SCHEMAS)
            cursor.execute(f"SET ROLE {APPLICATION_ROLE}")
        elif not self._told_of_role:
            self._told_of_role = True
            log.warning(
                "working with the login's own privileges: it may not take the role %s, or `talktime migrate` is to be"
                " run on this database",
                APPLICATION_ROLE,
            )
        cursor.close()
        connection.autocommit = False


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""


def _is_conflict(error: DBAPIError) -> bool:
    return _sqlstate(error) in _DEADLOCK_OR_SERIALIZATION


def _translated(error: DBAPIError) -> Exception:
    state = _sqlstate(error)
    if state == _LOCK_NOT_AVAILABLE:
        return LockTimeout("somebody else holds this account for too long")
    if state in _NOT_MIGRATED:
        return DatabaseUnavailable("the database lacks talktime's present tables: run `talktime migrate`")
    if state == _NOT_ALLOWED:
        log.error("the login lacks a privilege: %s", str(error.orig).partition("\n")[0])
        return DatabaseUnavailable("the database does not allow this login what talktime needs")
    lost = error.connection_invalidated or (isinstance(error.orig, psycopg.OperationalError) and not state)
    if lost or state.startswith(_UNAVAILABLE) or state in _DEADLOCK_OR_SERIALIZATION:
        # The client is told no more; the operator is. The driver's words hold no password.
        log.warning("the database is not available: %s", str(error.orig).partition("\n")[0])
        return DatabaseUnavailable("the database is not available")
    return error
