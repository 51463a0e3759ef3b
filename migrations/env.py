"""Alembic's entry: runs the migrations in one transaction, for `talktime migrate` and for the `alembic` command."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import create_engine, make_url, pool, text

from talktime.store.tables import metadata


def run() -> None:
    """Migrate the database that the caller names, or the one of TALKTIME_DATABASE_URL."""
    url = context.config.attributes.get("url") or make_url(os.environ["TALKTIME_DATABASE_URL"])
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"), poolclass=pool.NullPool, connect_args={"connect_timeout": 5}
    )
    with engine.begin() as connection:
        # One migration at a time; another one is waited for, but not for ever.
        connection.execute(text("SET LOCAL lock_timeout = '60s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(8317214)"))
        # None that waits long for a table: whatever queues behind it would wait too.
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        context.configure(connection=connection, target_metadata=metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()


run()
