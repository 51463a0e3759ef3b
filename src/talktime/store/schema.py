"""Bringing a database to the newest schema, with the Alembic migrations that lie beside the packages."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, OperationalError

from talktime.errors import DatabaseUnavailable, SchemaError


def upgrade(url: URL) -> None:
    """Migrate the database at `url` to the newest schema; nothing happens if it has it. Synchronous.

    Raises:
        DatabaseUnavailable: it cannot be reached.
        SchemaError: it cannot be migrated, by this role or from the revision that it has.
    """
    config = Config()
    # A package, not a folder: found from a checkout, an editable install and a wheel alike.
    config.set_main_option("script_location", "migrations:")
    config.attributes["url"] = url
    try:
        command.upgrade(config, "head")
    except OperationalError as error:
        raise DatabaseUnavailable(_in_a_line(error.orig)) from error
    except DBAPIError as error:
        raise SchemaError(_in_a_line(error.orig)) from error
    except CommandError as error:
        # Most likely written by a newer release.
        raise SchemaError(_in_a_line(error)) from error


def _in_a_line(reason: object) -> str:
    return f"cannot migrate the database: {str(reason).partition(chr(10))[0]}"
