"""What is written to the log of an error: its kind and its place, never what it quotes.

The words of an exception often hold what the request held: PostgreSQL's tell the row that broke a rule, a KeyError its
key. Logs are read by more people than the database, so of those words only what names no data is kept.
"""

from __future__ import annotations

import logging
import traceback
from types import TracebackType

import psycopg

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


class DiscreetFormatter(logging.Formatter):
    """Writes exceptions without their words."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatException(  # noqa: N802 - logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """Write an exception, and those that it came from."""
        return "\n".join(_lines_of(ei[1])) if ei[1] is not None else ""


def make_logs_discreet() -> None:
    """Let all that this process logs go through the formatter."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(DiscreetFormatter())


def _lines_of(error: BaseException, told: frozenset[int] = frozenset()) -> list[str]:
    told |= {id(error)}
    context = None if error.__suppress_context__ and error.__cause__ is not error else error.__context__
    before = error.__cause__ if error.__cause__ not in (None, error) else context
    sources = [before, *(error.exceptions if isinstance(error, BaseExceptionGroup) else ())]
    lines = []
    for source in sources:
        if source is not None and id(source) not in told:
            lines += [*_lines_of(source, told), "", "from which came:", ""]
    lines.append("Traceback (most recent call last):")  # what people and programs look for in a log
    lines += [line for frame in traceback.format_tb(error.__traceback__) for line in frame.rstrip().splitlines()]
    lines.append(f"{type(error).__module__}.{type(error).__qualname__}{_without_data(error)}")
    return lines


def _without_data(error: BaseException) -> str:
    """Return of an exception's words what names no data."""
    if isinstance(error, psycopg.Error):
        diag = error.diag
        said = [error.sqlstate, diag.severity_nonlocalized, diag.table_name, diag.column_name, diag.constraint_name]
        return "".join(f" {word}" for word in said if word)
    if isinstance(error, OSError) and error.strerror:
        return f": {error.strerror}"
    return ""
