"""Reads the old tables, user by user, from one snapshot of their database; it never writes there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from talktime.errors import DatabaseUnavailable, OldTablesError
from talktime.legacy.rows import OldChat, OldRecord, OldUser
from talktime.legacy.tables import CHAT, RECORD, USER, Found, Mapped, find
from talktime.store.database import CONNECT_SECONDS_MAX

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

T = TypeVar("T", bound=tuple[Any, ...])

PAGE_ROWS = 2_000

_COLUMNS = """
    SELECT nspname, relname, attname, format_type(atttypid, NULL)
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND attnum > 0 AND NOT attisdropped
        AND nspname <> 'information_schema' AND nspname NOT LIKE 'pg\\_%'
    ORDER BY nspname, relname, attnum
"""
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_IS_ACTIVE = OldRecord._fields.index("is_active")
_INSTANTS = {"timestamp with time zone": "{column}", "timestamp without time zone": "{column} AT TIME ZONE {zone}"}


class OldRows(NamedTuple):
    """All rows of one user."""

    user_id: str
    users: list[OldUser]
    records: list[OldRecord]
    chats: list[OldChat]


@dataclass(frozen=True, slots=True)
class Source:
    """The old tables in one snapshot: how many rows they have, and a way to go through them by user."""

    connection: psycopg.AsyncConnection
    tables: Mapping[str, Found]
    columns: Mapping[str, sql.Composable]
    counts: Mapping[str, int]
    read_at: int
    """When the snapshot was taken, by the old database's clock."""
    nameless: list[OldUser | OldRecord | OldChat]
    """Rows that name no user, for whoever lists what is not taken over; complete once users are read."""

    async def users(self) -> AsyncIterator[OldRows]:
        """Yield all rows of each user, in order of their ids."""
        users = _Rows(await self._cursor(USER, "id"), OldUser, lambda row: row[0])
        records = _Rows(await self._cursor(RECORD, "user_id"), _record, lambda row: row[1])
        chats = _Rows(await self._cursor(CHAT, "user_id"), OldChat, lambda row: row[1])
        self.nameless.extend([*await users.take(None), *await records.take(None), *await chats.take(None)])
        while heads := [
            key for key in (await users.head(), await records.head(), await chats.head()) if key is not None
        ]:
            user_id = min(heads)
            yield OldRows(user_id, await users.take(user_id), await records.take(user_id), await chats.take(user_id))

    async def _cursor(self, table: str, by: str) -> psycopg.AsyncServerCursor[tuple[Any, ...]]:
        found = self.tables[table]
        cursor = self.connection.cursor(f"old_{table}", row_factory=tuple_row)
        cursor.itersize = PAGE_ROWS
        # Users come in the order of code points, as Python sorts them, whatever type their ids have; no user first.
        query = sql.SQL('SELECT {} FROM {} ORDER BY {}::text COLLATE "C" NULLS FIRST').format(
            self.columns[table], sql.Identifier(found.schema, found.name), sql.Identifier(found.columns[by])
        )
        await cursor.execute(query)
        return cursor


class _Rows(Generic[T]):
    """The rows of one table, a page in memory at a time, by user; those without one come first."""

    def __init__(
        self,
        cursor: psycopg.AsyncServerCursor[tuple[Any, ...]],
        make: Callable[..., T],
        user_of: Callable[[tuple[Any, ...]], str | None],
    ) -> None:
        self._cursor = cursor
        self._make = make
        self._user_of = user_of
        self._page: list[tuple[Any, ...]] = []  # the next row last

    async def head(self) -> str | None:
        """Return the user of the next row; None where there is no row, or it has none."""
        await self._fill()
        return self._user_of(self._page[-1]) if self._page else None

    async def take(self, user_id: str | None) -> list[T]:
        """Return the rows of a user, if they are the next."""
        found = []
        while await self.head() == user_id and self._page:
            found.append(self._make(*self._page.pop()))
        return found

    async def _fill(self) -> None:
        if not self._page:
            self._page = [*reversed(await self._cursor.fetchmany(PAGE_ROWS))]


def _record(*row: Any) -> OldRecord:  # noqa: ANN401 - the columns of a row
    is_active = row[_IS_ACTIVE] in ("true", "t", "yes", "y", "on", "1")
    return OldRecord._make((*row[:_IS_ACTIVE], is_active, *row[_IS_ACTIVE + 1 :]))


@asynccontextmanager
async def open_source(url: URL, mapped: Mapped) -> AsyncIterator[Source]:
    """Open the old database, to read from it alone.

    Raises:
        DatabaseUnavailable: it cannot be reached, or was lost.
        OldTablesError: the old tables are not there.
    """
    target = url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        async with await psycopg.AsyncConnection.connect(target, connect_timeout=CONNECT_SECONDS_MAX) as connection:
            await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
            await connection.set_read_only(True)
            read_at = await _number(connection, sql.SQL(_NOW))
            there, types = await look_up(connection)
            tables = find(mapped, there)
            columns = {name: _columns(found, types, mapped) for name, found in tables.items()}
            counts = {name: await _count(connection, found) for name, found in tables.items()}
            yield Source(connection, tables, columns, counts, read_at, [])
    except psycopg.OperationalError as error:
        message = f"the old database does not answer: {str(error).partition(chr(10))[0]}"
        raise DatabaseUnavailable(message) from error
    except psycopg.Error as error:
        message = f"the old tables cannot be read: {str(error).partition(chr(10))[0]}"
        raise OldTablesError(message) from error


async def look_up(
    connection: psycopg.AsyncConnection,
) -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str, str], str]]:
    """Return the columns of all tables and views by schema and name, and the type of each column."""
    there: dict[tuple[str, str], list[str]] = defaultdict(list)
    types: dict[tuple[str, str, str], str] = {}
    for schema, table, column, kind in await (await connection.execute(_COLUMNS)).fetchall():
        there[schema, table].append(column)
        types[schema, table, column] = kind
    return there, types


def _columns(found: Found, types: Mapping[tuple[str, str, str], str], mapped: Mapped) -> sql.Composable:
    """Name the columns: figures and ids as PostgreSQL writes them, exactly; instants in microseconds."""
    return sql.SQL(", ").join(
        _instant(found, name, types[found.schema, found.name, name], mapped)
        if usual in ("timestamp", "last_heartbeat_time")
        else sql.SQL("{}::text").format(sql.Identifier(name))
        for usual, name in found.columns.items()
    )


def _instant(found: Found, name: str, kind: str, mapped: Mapped) -> sql.Composable:
    if kind not in _INSTANTS:
        message = f"the column {name!r} of the old table {found.schema}.{found.name} is no timestamp, but {kind}"
        raise OldTablesError(message)
    column = sql.Identifier(name)
    at = sql.SQL(_INSTANTS[kind]).format(column=column, zone=sql.Literal(mapped.time_zone))
    # Infinite ones, and those before 1970 or past the year 9999, say nothing.
    return sql.SQL(
        "CASE WHEN {at} BETWEEN 'epoch' AND '9999-12-01 00:00:00Z'"
        " THEN (extract(epoch FROM {at}) * 1000000)::bigint END"
    ).format(at=at)


async def _count(connection: psycopg.AsyncConnection, found: Found) -> int:
    table = sql.Identifier(found.schema, found.name)
    return await _number(connection, sql.SQL("SELECT count(*) FROM {}").format(table))


async def _number(connection: psycopg.AsyncConnection, query: sql.SQL | sql.Composed) -> int:
    row = await (await connection.execute(query)).fetchone()
    return 0 if row is None else int(row[0])
