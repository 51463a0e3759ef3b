"""Alembic's entry: runs each migration in a transaction of its own, for `talktime migrate` and the `alembic` command.

The services run on meanwhile, so whatever a migration locks, it waits for briefly and holds briefly.
"""

from __future__ import annotations

import os
import time

from alembic import context
from sqlalchemy import Connection, create_engine, make_url, pool, text

from talktime.errors import DatabaseUnavailable
from talktime.store.tables import metadata

ANOTHER_SECONDS_MAX = 60
# A table is not waited for long: whatever queues behind it would wait too. And a statement that takes longer is none to
# lock a table for. One that locks nobody out may set a limit of its own.
_LIMITS = "SET lock_timeout = '5s'; SET statement_timeout = '60s'"


def run() -> None:
    """Migrate the database that the caller names, or the one of TALKTIME_DATABASE_URL."""
    url = context.config.attributes.get("url") or make_url(os.environ["TALKTIME_DATABASE_URL"])
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"), poolclass=pool.NullPool, connect_args={"connect_timeout": 5}
    )
    with engine.connect() as connection:
        _wait_for_others(connection)
        connection.execute(text(_LIMITS))
        connection.commit()
        context.configure(
            connection=connection, target_metadata=metadata, compare_type=True, transaction_per_migration=True
        )
        with context.begin_transaction():
            context.run_migrations()


def _wait_for_others(connection: Connection) -> None:
    """Take the lock of migrations, which the session keeps to its end.

    By asking for it again and again: a session that waits for it would have a snapshot, and an index that the other one
    makes concurrently waits for all of those.
    """
    patient_until = time.monotonic() + ANOTHER_SECONDS_MAX
    while not connection.scalar(text("SELECT pg_try_advisory_lock(8317214)")):
        connection.commit()
        if time.monotonic() > patient_until:
            message = "cannot migrate the database: another migration runs"
            raise DatabaseUnavailable(message)
        time.sleep(0.2)


run()
