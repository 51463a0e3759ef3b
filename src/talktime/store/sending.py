"""How the statements that are sent all the time get to the driver: built with SQLAlchemy, and sent past it.

What SQLAlchemy does for a statement and for each value in it costs as much as the rest of a batch. So the text is made
once, several statements go in one go where none waits for another (a pipeline), and instants come as integers straight
from PostgreSQL's binary format.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from psycopg import AsyncPipeline
from psycopg.adapt import Loader
from psycopg.generators import send as flushed
from psycopg.pq import Format
from sqlalchemy.dialects.postgresql import psycopg as dialect

from talktime.store.tables import EPOCH

if TYPE_CHECKING:
    from collections.abc import Generator

    from psycopg import AsyncConnection as Driver
    from psycopg import AsyncCursor
    from psycopg._pipeline_base import BasePipeline
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql import ClauseElement

_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy's dialects come without types
_YEAR_2000_US = (datetime(2000, 1, 1, tzinfo=UTC) - EPOCH).days * 86_400 * 1_000_000


class _InstantLoader(Loader):
    """Reads ``timestamptz`` as microseconds since 1970: PostgreSQL sends those since 2000, as a 64-bit integer."""

    format = Format.BINARY

    def load(self, data: bytes | bytearray | memoryview) -> int:
        """Return the instant."""
        return int.from_bytes(data, "big", signed=True) + _YEAR_2000_US


def _end_with_sync(pipeline: BasePipeline) -> Generator[Any, Any, None]:
    """End a pipeline with its Sync, and nothing after that.

    The driver's own way sends a Flush behind it. To PostgreSQL that is the next command: it turns off the time limit of
    a session that idles in a transaction, and as it has no answer, nothing turns that on again. A process that was
    frozen then, or whose machine died, would hold its locks for ever.
    """
    try:
        pipeline._enqueue_sync()  # noqa: SLF001 - the driver has no other door; its version is pinned, and a test looks
        yield from pipeline._communicate_gen()  # noqa: SLF001 - as above
    finally:
        yield from flushed(pipeline.pgconn)
        yield from pipeline._fetch_gen(flush=False)  # noqa: SLF001 - as above


# For every pipeline: the driver makes some by itself, to send a statement with many rows.
AsyncPipeline._exit_gen = _end_with_sync  # type: ignore[method-assign, assignment] # noqa: SLF001 - as above


@cache
def text_of(statement: ClauseElement) -> str:
    """Return a statement as the driver takes it; to be called with those that are built once."""
    return str(statement.compile(dialect=_DIALECT))


async def driver_of(connection: AsyncConnection) -> Driver[Any]:
    """Return the driver's connection, in the transaction that `connection` is in, or begins with this."""
    if not connection.in_transaction():
        await connection.begin()
    return cast("Driver[Any]", (await connection.get_raw_connection()).driver_connection)


async def send(driver: Driver[Any], statement: ClauseElement, values: Mapping[str, Any]) -> AsyncCursor[Any]:
    """Send a statement. Instants among the values are datetimes, those in its rows microseconds."""
    cursor = driver.cursor(binary=True)
    cursor.adapters.register_loader("timestamptz", _InstantLoader)
    return await cursor.execute(text_of(statement), values)
