"""Bringing a database to the newest schema, with the Alembic migrations that lie beside the packages."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from talktime.errors import DatabaseUnavailable


def upgrade(url: URL) -> None:
    """Migrate the database at `url` to the newest schema; nothing happens if it has it. Synchronous.

    Raises:
        DatabaseUnavailable: it cannot be reached.
    """
    config = Config()
    # A package, not a folder: found from a checkout, an editable install and a wheel alike.
    config.set_main_option("script_location", "migrations:")
    config.attributes["url"] = url
    try:
        command.upgrade(config, "head")
    except OperationalError as error:
        message = f"cannot migrate the database: {error.orig}".splitlines()[0]
        raise DatabaseUnavailable(message) from error
