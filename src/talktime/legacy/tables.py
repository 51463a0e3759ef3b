"""The old tables and columns, and the names that they have in a given database.

Names are found by themselves if they differ in case, underscores or a plural ``s`` alone; a mapping names the others::

    [record]                            # table: names a table, if need be with its schema
    table = "billing.chat_time"
    last_heartbeat_time = "pinged_at"   # an old column's name here = its name there
    [chat]
    [user]
    id = "user_no"
    [units]
    time = "seconds"                    # or "milliseconds", "minutes"
    time_zone = "UTC"                   # of timestamps that say none
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from talktime.errors import OldTablesError
from talktime.meter.units import MICRO

if TYPE_CHECKING:
    from pathlib import Path

RECORD, CHAT, USER = "record", "chat", "user"

TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    USER: ("user", ("id", "credits")),
    CHAT: ("chat", ("id", "user_id", "advisor_id", "duration")),
    RECORD: (
        "conversation_time_record",
        (
            *("id", "user_id", "advisor_id", "chat_id", "duration", "credits_used", "free_time_used"),
            *("total_free_time_allocation", "is_active", "timestamp", "last_heartbeat_time"),
        ),
    ),
}
"""Of each old table its usual name and its columns."""

UNITS = {"seconds": MICRO, "milliseconds": MICRO // 1000, "minutes": 60 * MICRO}


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a mapping file says; by default nothing."""

    tables: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    second_us: int = MICRO
    time_zone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Found:
    """An old table as it is there: its schema and name, and the name of each column by the usual one."""

    schema: str
    name: str
    columns: Mapping[str, str]


def load_mapping(path: Path) -> Mapped:
    """Read a mapping file.

    Raises:
        OldTablesError: it cannot be read, or says something that means nothing.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot read the mapping {path}: {error.strerror}"
        raise OldTablesError(message) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"the mapping {path} is no TOML: {error}"
        raise OldTablesError(message) from None
    units = _section(said, "units", ("time", "time_zone"))
    if units.get("time", "seconds") not in UNITS:
        message = f"the mapping's units.time must be {', '.join(UNITS)}, not {units['time']!r}"
        raise OldTablesError(message)
    sections = {name: _section(said, name, ("table", *columns)) for name, (_, columns) in TABLES.items()}
    if said:
        message = f"the mapping has sections that mean nothing: {', '.join(said)}"
        raise OldTablesError(message)
    return Mapped(
        tables={name: section["table"] for name, section in sections.items() if "table" in section},
        columns={
            name: {column: there for column, there in section.items() if column != "table"}
            for name, section in sections.items()
        },
        second_us=UNITS[units.get("time", "seconds")],
        time_zone=units.get("time_zone", "UTC"),
    )


def _section(said: dict[str, object], name: str, allowed: Sequence[str]) -> dict[str, str]:
    section = said.pop(name, {})
    if not isinstance(section, dict) or not all(isinstance(value, str) for value in section.values()):
        message = f"the mapping's [{name}] must hold names in quotes"
        raise OldTablesError(message)
    unknown = sorted(section.keys() - {*allowed})
    if unknown:
        message = f"the mapping's [{name}] knows {', '.join(allowed)}, not {', '.join(unknown)}"
        raise OldTablesError(message)
    return section


def find(mapped: Mapped, there: Mapping[tuple[str, str], Sequence[str]]) -> dict[str, Found]:
    """Find the old tables among those that are there: columns by schema and table.

    Raises:
        OldTablesError: one is not there, or more than one could be meant.
    """
    return {table: _find_table(mapped, table, there) for table in TABLES}


def is_there(mapped: Mapped, table: str, there: Mapping[tuple[str, str], Sequence[str]]) -> bool:
    """Tell whether any of the tables that are there could be meant."""
    return bool(_fitting(mapped, table, there))


def _fitting(mapped: Mapped, table: str, there: Mapping[tuple[str, str], Sequence[str]]) -> list[tuple[str, str]]:
    wanted = mapped.tables.get(table)
    if wanted is not None:
        return [place for place in there if wanted in (place[1], ".".join(place))]
    return [place for place in there if _plain(place[1]).removesuffix("s") == _plain(TABLES[table][0])]


def _find_table(mapped: Mapped, table: str, there: Mapping[tuple[str, str], Sequence[str]]) -> Found:
    usual, columns = TABLES[table]
    wanted = mapped.tables.get(table)
    fitting = _fitting(mapped, table, there)
    if len(fitting) != 1:
        said = f"the old table {wanted or usual!r}"
        names = ", ".join(sorted(".".join(place) for place in (fitting or there)))
        message = (
            f"{said} could be any of {names}: let a mapping name it with its schema"
            if fitting
            else f"{said} is not there; there is {names or 'no table at all'}. A mapping can name it"
        )
        raise OldTablesError(message)
    [place] = fitting
    return Found(*place, {column: _find_column(mapped, table, column, place, there[place]) for column in columns})


def _find_column(mapped: Mapped, table: str, column: str, place: tuple[str, str], there: Sequence[str]) -> str:
    wanted = mapped.columns.get(table, {}).get(column)
    fitting = [name for name in there if (name == wanted if wanted else _plain(name) == _plain(column))]
    if not wanted and column in fitting:
        return column
    if len(fitting) != 1:
        state = f"could be any of {', '.join(fitting)}" if fitting else f"is not there; there is {', '.join(there)}"
        message = f"the column {wanted or column!r} of the old table {'.'.join(place)} {state}. A mapping can name it"
        raise OldTablesError(message)
    return fitting[0]


def _plain(name: str) -> str:
    return re.sub(r"[_\s]", "", name).lower()
