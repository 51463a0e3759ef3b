"""the role that the application works as, with no more privileges than it needs.

The ledger and closed segments can be added to, and never changed or deleted; nor can what is fixed about the rest: whom
a row belongs to, a chat's advisor and first start, the free time granted. `talktime.store.database` takes the role for
each session of a login that may, so nothing has to be configured.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ROLE = "talktime_app"

PRIVILEGES = {
    "account": "SELECT, INSERT, UPDATE (balance, materialized_through, next_entry, due_at)",
    "advisor": "SELECT, INSERT, UPDATE (rate, first_us, increment_us, free_us)",
    "allowance": "SELECT, INSERT, UPDATE (used_us)",
    "chat": "SELECT, INSERT, UPDATE (state, rate, first_us, increment_us, lease_us, abandon_after_us,"
    " last_heartbeat_at, revision, start_key, stopped_at, stop_reason, opened_at, opened_count_us, count_us,"
    " elapsed_us, free_us, cost)",
    "console_session": "SELECT, INSERT, DELETE",
    "ledger_entry": "SELECT, INSERT",
    "reconciler_pass": "SELECT, INSERT, DELETE",
    "segment": "SELECT, INSERT",
    "service_key": "SELECT, INSERT, UPDATE (revoked_at)",
}

# A role belongs to the whole server: another database's migration may have made it, or be making it now.
_MAKE_ROLE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'talktime_app') THEN
        CREATE ROLE talktime_app NOLOGIN;
        IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            GRANT talktime_app TO CURRENT_USER; -- since PostgreSQL 16, making a role is not yet being let into it
        END IF;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;
    WHEN insufficient_privilege THEN
        RAISE insufficient_privilege USING MESSAGE = format(
            'there is no role talktime_app, and %1$I may not make it: have somebody who may say'
            ' CREATE ROLE talktime_app NOLOGIN; GRANT talktime_app TO %1$I', current_user
        );
END $$
"""


def upgrade() -> None:
    """Expand."""
    op.execute(_MAKE_ROLE)
    op.execute(f"GRANT USAGE ON SCHEMA {_schema()} TO {ROLE}")
    for table, privileges in PRIVILEGES.items():
        op.execute(f"GRANT {privileges} ON {table} TO {ROLE}")


def downgrade() -> None:
    """Take back. The role itself stays: other databases of the server may need it."""
    for table in PRIVILEGES:
        op.execute(f"REVOKE ALL ON {table} FROM {ROLE}")
    op.execute(f"REVOKE USAGE ON SCHEMA {_schema()} FROM {ROLE}")


def _schema() -> str:
    connection = op.get_bind()
    name = connection.scalar(sa.text("SELECT current_schema()"))
    return connection.dialect.identifier_preparer.quote_identifier(str(name))
