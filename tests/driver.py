"""What the product sends to its database, seen where it leaves: in the driver's asynchronous connections and cursors.

SQLAlchemy's own events would miss what is sent past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from psycopg import AsyncConnection, AsyncCursor, AsyncServerCursor

Parameters: TypeAlias = dict[str, Any] | list[dict[str, Any]] | None

OnStatement: TypeAlias = Callable[[AsyncConnection[Any], str, Parameters], None]
"""Is called before a statement is sent, with its connection, its text and its parameters: of many, a list."""
OnEnd: TypeAlias = Callable[[AsyncConnection[Any]], None]
"""Is called before a transaction ends."""

_on_statement: list[OnStatement] = []
_on_end: list[OnEnd] = []


@contextmanager
def watched(on_statement: OnStatement, on_end: OnEnd | None = None) -> Iterator[None]:
    """Call these from now on until the end of the block."""
    on_ends = [] if on_end is None else [on_end]
    _on_statement.append(on_statement)
    _on_end.extend(on_ends)
    try:
        yield
    finally:
        _on_statement.remove(on_statement)
        for listener in on_ends:
            _on_end.remove(listener)


def _watch_statements(cursor: type[Any], name: str) -> None:
    send = getattr(cursor, name)

    async def watched_send(self: Any, query: Any, params: Any = None, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - the driver's
        # What sets up a session, or the driver asks for itself, is none.
        if isinstance(query, str) and query.startswith(("SELECT", "INSERT", "UPDATE", "DELETE")):
            for listener in _on_statement:
                listener(self.connection, query, params)
        if query in ("COMMIT", "ROLLBACK"):
            _tell_end(self.connection)
        return await send(self, query, params, *args, **options)

    setattr(cursor, name, watched_send)


def _watch_ends(name: str) -> None:
    end = getattr(AsyncConnection, name)

    async def watched_end(self: AsyncConnection[Any]) -> None:
        _tell_end(self)
        await end(self)

    setattr(AsyncConnection, name, watched_end)


def _tell_end(connection: AsyncConnection[Any]) -> None:
    for listener in _on_end:
        listener(connection)


for _cursor, _name in ((AsyncCursor, "execute"), (AsyncCursor, "executemany"), (AsyncServerCursor, "execute")):
    _watch_statements(_cursor, _name)
for _name in ("commit", "rollback"):
    _watch_ends(_name)
