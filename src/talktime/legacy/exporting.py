"""The way back: what is materialized, written to the old tables, as the views with the old names show it.

Rows that are there already, by their old ids, get the old columns' new values and keep the rest; others are added; none
is taken away. All of it is one transaction, and a second export changes nothing but what has happened since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from talktime.errors import DatabaseUnavailable, OldTablesError
from talktime.legacy.source import look_up
from talktime.legacy.tables import CHAT, RECORD, TABLES, USER, Found, Mapped, find, is_there
from talktime.meter.units import MICRO
from talktime.store.database import CONNECT_SECONDS_MAX, driver_of

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.store.database import Database

VIEWS = "talktime_legacy"
"""The schema of the views with the old names."""

_TIMES = ("duration", "free_time_used", "total_free_time_allocation")
_CREDITS = ("credits", "credits_used")
_INSTANTS = ("timestamp", "last_heartbeat_time")
_TYPES: Mapping[str, str] = {
    **dict.fromkeys(_TIMES, "integer"),
    **dict.fromkeys(_INSTANTS, "timestamptz"),
    **dict.fromkeys(_CREDITS, "numeric(20, 6)"),
    "is_active": "boolean",
}
"""What the old columns are where they are made here; the others are text."""
_IS_NEW_RECORD = "strpos(id, '/') > 0"
"""A record of a chat that had none in an old system: the view makes its id out of user and chat."""
_MERGES: Mapping[str, Sequence[tuple[str, Sequence[str]]]] = {
    USER: [("true", ("id",))],
    CHAT: [("true", ("user_id", "id"))],
    RECORD: [(f"NOT {_IS_NEW_RECORD}", ("id",)), (_IS_NEW_RECORD, ("user_id", "chat_id"))],
}
"""Which rows are written together, and by which columns those that are there are found."""
_TEXTS = ("text", "character varying", "character")
"""Where the id is something else, a new record gets the one that the old table gives by itself."""

_UPDATE = sql.SQL("UPDATE {old} AS there SET {changes} FROM {brought} AS brought WHERE {same}")
_INSERT = sql.SQL(
    "INSERT INTO {old} ({columns})"
    " SELECT {values} FROM {brought} AS brought WHERE NOT EXISTS (SELECT FROM {old} AS there WHERE {same})"
)


@dataclass(frozen=True, slots=True)
class Exported:
    """How many rows of an old table were there before and got new values, and how many were added."""

    table: str
    updated: int
    added: int


async def export_all(
    database: Database, target_url: URL, mapped: Mapped, *, progress: Callable[[int, int], None]
) -> list[Exported]:
    """Write all that is materialized to the old tables, which are made where none of them is there.

    Raises:
        DatabaseUnavailable: one of the two databases does not answer.
        OldTablesError: only some of the old tables are there, or they do not take what is to be written.
    """
    to = target_url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        async with await psycopg.AsyncConnection.connect(to, connect_timeout=CONNECT_SECONDS_MAX) as target:
            await target.execute("SET DateStyle = 'ISO'")
            tables, types = await _tables(target, mapped)

            async def copy(connection: AsyncConnection) -> None:
                async with target.transaction():  # it is tried again where talktime's own database was lost
                    await _copy(connection, target, progress)

            await database.snapshot(copy, patient=True)
            return [await _merge(target, table, found, types, mapped) for table, found in tables.items()]
    except psycopg.OperationalError as error:
        message = f"the old database does not answer: {str(error).partition(chr(10))[0]}"
        raise DatabaseUnavailable(message) from error
    except psycopg.Error as error:
        message = f"the old tables cannot be written: {str(error).partition(chr(10))[0]}"
        raise OldTablesError(message) from error


async def _tables(
    target: psycopg.AsyncConnection, mapped: Mapped
) -> tuple[dict[str, Found], dict[tuple[str, str, str], str]]:
    there, types = await look_up(target)
    if not any(is_there(mapped, table, there) for table in TABLES):
        for table, (usual, columns) in TABLES.items():
            await target.execute(_making(mapped, table, usual, columns))
        there, types = await look_up(target)
    return find(mapped, there), types


def _making(mapped: Mapped, table: str, usual: str, columns: Sequence[str]) -> sql.Composed:
    names = mapped.columns.get(table, {})
    type_of = dict(_TYPES) if mapped.second_us == MICRO else {**_TYPES, **dict.fromkeys(_TIMES, "numeric")}
    return sql.SQL("CREATE TABLE {} ({})").format(
        sql.Identifier(*mapped.tables.get(table, usual).split(".")),
        sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(names.get(column, column)), sql.SQL(type_of.get(column, "text")))
            for column in columns
        ),
    )


async def _copy(
    connection: AsyncConnection, target: psycopg.AsyncConnection, progress: Callable[[int, int], None]
) -> None:
    """Bring the views' rows over, as text, into tables that live as long as the transaction."""
    source = await driver_of(connection)
    views = {table: sql.Identifier(VIEWS, usual) for table, (usual, _) in TABLES.items()}
    done = total = 0
    for view in views.values():
        counted = await (await source.execute(sql.SQL("SELECT count(*) FROM {}").format(view))).fetchone()
        total += counted[0] if counted else 0
    progress(0, total)
    for table, (_, columns) in TABLES.items():
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        brought = sql.Identifier(_brought(table))
        typed = sql.SQL(", ").join(sql.SQL("{} text").format(sql.Identifier(column)) for column in columns)
        await target.execute(sql.SQL("CREATE TEMP TABLE {} ({}) ON COMMIT DROP").format(brought, typed))
        reading = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(names, views[table])
        writing = sql.SQL("COPY {} FROM STDIN").format(brought)
        async with source.cursor().copy(reading) as rows, target.cursor().copy(writing) as taken:
            async for row in rows:
                await taken.write(row)
                done += 1
                if done % 1000 == 0:
                    progress(done, total)
        await target.execute(sql.SQL("ANALYZE {}").format(brought))
    progress(total, total)


def _brought(table: str) -> str:
    return f"talktime_{table}"


async def _merge(
    target: psycopg.AsyncConnection,
    table: str,
    found: Found,
    types: Mapping[tuple[str, str, str], str],
    mapped: Mapped,
) -> Exported:
    type_of = {usual: types[found.schema, found.name, name] for usual, name in found.columns.items()}
    updated = added = 0
    for which, keys in _MERGES[table]:
        given = [
            usual for usual in found.columns if which != _IS_NEW_RECORD or usual != "id" or type_of["id"] in _TEXTS
        ]
        parts = {
            "old": sql.Identifier(found.schema, found.name),
            "brought": sql.SQL("(SELECT * FROM {} WHERE {})").format(sql.Identifier(_brought(table)), sql.SQL(which)),
            "same": sql.SQL(" AND ").join(
                sql.SQL("there.{}::text = brought.{}").format(sql.Identifier(found.columns[key]), sql.Identifier(key))
                for key in keys
            ),
            "columns": sql.SQL(", ").join(sql.Identifier(found.columns[usual]) for usual in given),
            "values": sql.SQL(", ").join(_value(usual, type_of[usual], mapped) for usual in given),
            "changes": sql.SQL(", ").join(
                sql.SQL("{} = {}").format(sql.Identifier(found.columns[usual]), _value(usual, type_of[usual], mapped))
                for usual in found.columns
                if usual not in (*keys, "id")
            ),
        }
        updated += (await target.execute(_UPDATE.format(**parts))).rowcount
        added += (await target.execute(_INSERT.format(**parts))).rowcount
    return Exported(f"{found.schema}.{found.name}", updated, added)


def _value(usual: str, kind: str, mapped: Mapped) -> sql.Composed:
    """Return a value that was brought over as the old column takes it."""
    text, type_ = sql.SQL("brought.{}").format(sql.Identifier(usual)), sql.SQL(kind)
    if usual in _TIMES:
        return sql.SQL("({}::numeric * {} / {})::{}").format(text, MICRO, mapped.second_us, type_)
    if usual in _INSTANTS and kind == "timestamp without time zone":
        return sql.SQL("{}::timestamptz AT TIME ZONE {}").format(text, sql.Literal(mapped.time_zone))
    if usual == "is_active" and kind != "boolean":
        return sql.SQL("{}::boolean::integer::{}").format(text, type_)
    if usual in _CREDITS:
        return sql.SQL("{}::numeric::{}").format(text, type_)
    return sql.SQL("{}::{}").format(text, type_)
