"""Engine and transactions: retries, time limits, and driver errors translated in this one place."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import psycopg
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, QueuePool

from talktime.errors import DatabaseUnavailable, LockTimeout
from talktime.store.embedded import embedded_postgres

T = TypeVar("T")

log = logging.getLogger(__name__)
# It warns of what its errors tell: that a connection was lost.
logging.getLogger("psycopg").setLevel(logging.ERROR)

ATTEMPTS = 4
TRANSACTION_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 5
POOL_WAIT_SECONDS_MAX = 5
# A lock is waited for less long than a connection of the pool, so that those who wait for one account cannot keep
# all others from theirs; and a process that was frozen in a transaction does not hold its locks for ever.
# Instants come back as text, which the driver reads in this style alone, whatever the server's is.
_SESSION = "SET lock_timeout = '2s'; SET idle_in_transaction_session_timeout = '20s'; SET DateStyle = 'ISO'"
# Idle is only who has had an answer. A process that was frozen, or whose machine died, before it had sent all of its
# statements is waited for without end, but for this limit, which PostgreSQL has had since 17.
_LIMIT_TRANSACTIONS = """
SELECT set_config('transaction_timeout', '30s', false) WHERE current_setting('server_version_num')::int >= 170000
"""
_LIMIT_THIS_ONE_NOT = """
SELECT set_config('transaction_timeout', '0', true) WHERE current_setting('server_version_num')::int >= 170000
"""

APPLICATION_ROLE = "talktime_app"
"""The role with no more privileges than the application needs; a migration makes it, and says which they are."""

# Since PostgreSQL 16 a member of a role need not be allowed to take it. The role is the server's, its privileges are
# this database's: where that has not been migrated yet, or no longer is, there are none. And Citus logs in to its nodes
# as the role that a session has, which this one cannot do.
_MAY_TAKE_ROLE = """
SELECT pg_has_role(oid, CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END)
    AND has_table_privilege(oid, to_regclass('account'), 'INSERT')
    AND (rolcanlogin OR NOT %s)
FROM pg_roles WHERE rolname = %s
"""
_ON_CITUS = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"
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


@dataclass(frozen=True, slots=True)
class PoolState:
    """How many connections a pool has at most, how many of them are in use, and how many wait to get one."""

    size: int
    in_use: int
    waiting: int


class Database:
    """A pool of connections to one PostgreSQL."""

    def __init__(self, url: URL | str, *, pool_size: int = 20) -> None:
        self.engine = self._engine(url, pool_size=pool_size, max_overflow=0, pool_timeout=POOL_WAIT_SECONDS_MAX)
        self._beside = self._engine(url, poolclass=NullPool)
        self._lines: list[Line] = []
        self._waiting = 0
        self._told_of_role = False
        self.on_citus = False
        """Whether the database is a Citus cluster; known from the first connection on."""

    def _engine(self, url: URL | str, **pool: Any) -> AsyncEngine:  # noqa: ANN401 - SQLAlchemy's options
        engine = create_async_engine(
            url,
            hide_parameters=True,  # ids, memos and keys stay out of the log
            # Whatever the server's default is: the locking order is made for this one.
            isolation_level="READ COMMITTED",
            connect_args={"connect_timeout": CONNECT_SECONDS_MAX, "application_name": "talktime"},
            **pool,
        )
        event.listen(engine.sync_engine, "connect", self._prepare_session)
        return engine

    async def close(self) -> None:
        """Close all connections."""
        for line in self._lines:
            await line.close()
        await self._beside.dispose()
        await self.engine.dispose()

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` in one READ COMMITTED transaction and commit it.

        A deadlock, a serialization failure, or a connection that was found dead before COMMIT is tried again, with
        nothing written by the failed attempt; so `work` may run several times.

        Raises:
            DatabaseUnavailable: no answer. If the connection was lost at COMMIT the outcome is unknown: the caller
                repeats the request, which its idempotency makes safe.
        """
        return await self._run(work, self._connect, commits=True)

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work`, which reads with a single statement, without the cost of a transaction around it."""
        return await self._run(work, partial(self._connect, "AUTOCOMMIT"))

    async def snapshot(self, work: Callable[[AsyncConnection], Awaitable[T]], *, patient: bool = False) -> T:
        """Run `work`, whose statements all see one and the same snapshot, without a time limit if `patient`.

        It only reads.
        """
        return await self._run(work, partial(self._connect, "REPEATABLE READ"), patient=patient)

    async def aside(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` as `snapshot` does, on a connection opened for it: it does not wait for one of the pool."""
        return await self._run(work, self._connect_beside)

    def line(self) -> Line:
        """Return a connection beside the pool, for one user who needs it all the time."""
        line = Line(partial(self._run, commits=False), self._beside)
        self._lines.append(line)
        return line

    @property
    def pool(self) -> PoolState:
        """How the pool stands."""
        pool = cast("QueuePool", self.engine.pool)
        return PoolState(size=pool.size(), in_use=pool.checkedout(), waiting=self._waiting)

    @asynccontextmanager
    async def _connect(self, isolation: str | None = None) -> AsyncIterator[AsyncConnection]:
        waits = 1
        self._waiting += waits
        try:
            async with self.engine.connect() as connection:
                self._waiting -= waits
                waits = 0
                if isolation is not None:
                    await connection.execution_options(isolation_level=isolation)
                yield connection
        finally:
            self._waiting -= waits

    @asynccontextmanager
    async def _connect_beside(self) -> AsyncIterator[AsyncConnection]:
        async with self._beside.connect() as connection:
            yield await connection.execution_options(isolation_level="REPEATABLE READ")

    async def _run(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        connect: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
        *,
        commits: bool = False,
        patient: bool = False,
    ) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            committing = False
            try:
                async with asyncio.timeout(None if patient else TRANSACTION_SECONDS_MAX), connect() as connection:
                    try:
                        if patient:
                            await connection.exec_driver_sql(_LIMIT_THIS_ONE_NOT)
                        result = await work(connection)
                    except psycopg.Error as error:
                        raise await _wrapped(connection, error) from error
                    if commits:
                        committing = True  # what only reads can be done again
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
        cursor.execute(_LIMIT_TRANSACTIONS)
        cursor.execute(_ON_CITUS)
        (self.on_citus,) = cursor.fetchone() or (False,)
        cursor.execute(_MAY_TAKE_ROLE, (self.on_citus, APPLICATION_ROLE))
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


class Line:
    """A connection that is kept, and used past SQLAlchemy: what it does for a statement is left out here.

    Statements go to the driver, each by itself unless `work` says BEGIN and COMMIT. One use at a time: others wait.
    """

    def __init__(self, run: Callable[..., Awaitable[Any]], engine: AsyncEngine) -> None:
        self._run = run
        self._engine = engine
        self._kept: AsyncConnection | None = None
        self._use = asyncio.Lock()

    async def run(self, work: Callable[[psycopg.AsyncConnection], Awaitable[T]]) -> T:
        """Run `work`, several times if need be: so doing it twice must be as good as once, also after a COMMIT.

        Raises:
            DatabaseUnavailable: no answer.
        """

        async def direct(connection: AsyncConnection) -> T:
            return await work(
                cast("psycopg.AsyncConnection", (await connection.get_raw_connection()).driver_connection)
            )

        async with self._use:
            result: T = await self._run(direct, self._connect)
            return result

    async def close(self) -> None:
        """Close the connection; the next use opens another."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            await kept.invalidate()
            await kept.close()

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncConnection]:
        try:
            if self._kept is None:
                self._kept = await self._engine.connect()
                await self._kept.execution_options(isolation_level="AUTOCOMMIT")
            yield self._kept
        except BaseException:
            # Whatever went wrong: nobody can tell what state it is in.
            await self.close()
            raise


async def _wrapped(connection: AsyncConnection, error: psycopg.Error) -> DBAPIError:
    """Return an error of a statement that was sent past SQLAlchemy as it would have told it; drop a lost connection."""
    lost = not connection.invalidated and (await driver_of(connection)).closed
    if lost:
        await connection.invalidate()
    return DBAPIError(None, None, error, connection_invalidated=lost)


async def driver_of(connection: AsyncConnection) -> psycopg.AsyncConnection:
    """Return the driver's own connection, for what SQLAlchemy has no words for."""
    return cast("psycopg.AsyncConnection", (await connection.get_raw_connection()).driver_connection)


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
