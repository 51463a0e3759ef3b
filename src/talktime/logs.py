"""What is written to the log: one line, or one JSON object, with the id of the request that it is about.

Of an error, that is its kind and its place, never what it quotes. The words of an exception often hold what the request
held: PostgreSQL's tell the row that broke a rule, a KeyError its key. Logs are read by more people than the database,
so of those words only what names no data is kept.
"""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType

import psycopg

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

log = logging.getLogger("talktime")

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered."""


class LogFormat(StrEnum):
    """How lines are written: for people, or for programs."""

    TEXT = "text"
    JSON = "json"


class DiscreetFormatter(logging.Formatter):
    """Writes a line, and exceptions without their words below it."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Write the line of a record."""
        request_id = REQUEST_ID.get()
        line = super().formatMessage(record)
        return line if request_id is None else f"{line} request_id={request_id}"

    def formatException(  # noqa: N802 - logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """Write an exception, and those that it came from."""
        return "\n".join(_lines_of(ei[1])) if ei[1] is not None else ""


class JsonFormatter(DiscreetFormatter):
    """Writes a JSON object on one line, with the record's `fields` as members, and an exception as one more."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def make_logs_discreet(log_format: LogFormat) -> None:
    """Let all that this process logs go through the formatter."""
    formatter = JsonFormatter() if log_format is LogFormat.JSON else DiscreetFormatter()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


def log_start(state: str, running_since: int | None) -> None:
    """Say what a start has done, once it is committed. Whose it is stays out of the log: the request's id tells."""
    if running_since is None:
        log.info("start: the clock does not run, the chat is %s", state, extra={"fields": {"state": state}})
        return
    at = (_EPOCH + timedelta(microseconds=running_since)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    log.info("start: the clock runs, from %s", at, extra={"fields": {"state": state, "running_since": at}})


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
