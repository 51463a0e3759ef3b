"""views with the names and columns of the tables that per-minute chat products usually have.

They show what is materialized, each row up to when. Durations are whole seconds that have passed; credits are exact.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

ROLE = "talktime_app"
SCHEMA = "talktime_legacy"

_MAKE_SCHEMA = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'talktime_legacy') THEN
        CREATE SCHEMA talktime_legacy;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN
        RAISE insufficient_privilege USING MESSAGE = format(
            'there is no schema talktime_legacy, and %1$I may not make it: have somebody who may say'
            ' CREATE SCHEMA talktime_legacy AUTHORIZATION %1$I', current_user
        );
END $$
"""

_USER = """
CREATE VIEW talktime_legacy."user" AS
SELECT user_id AS id, (balance / 1000000.0)::numeric(20, 6) AS credits, materialized_through
FROM account
"""

_CHAT = """
CREATE VIEW talktime_legacy.chat AS
SELECT
    chat.chat_id AS id,
    chat.user_id,
    chat.advisor_id,
    (chat.elapsed_us / 1000000)::integer AS duration,
    account.materialized_through
FROM chat JOIN account ON account.bucket = chat.bucket AND account.user_id = chat.user_id
"""

# Old records say what the user has used of the free time with the advisor. One of a chat that has not run since it was
# taken over says what it said.
_RECORD = """
CREATE VIEW talktime_legacy.conversation_time_record AS
SELECT
    coalesce(opening_chat.record_id, chat.user_id || '/' || chat.chat_id) AS id,
    chat.user_id,
    chat.advisor_id,
    chat.chat_id,
    (chat.elapsed_us / 1000000)::integer AS duration,
    (chat.cost / 1000000.0)::numeric(20, 6) AS credits_used,
    (
        CASE
            WHEN chat.elapsed_us = opening_chat.elapsed_us THEN opening_chat.free_us
            ELSE allowance.used_us
        END / 1000000
    )::integer AS free_time_used,
    (allowance.granted_us / 1000000)::integer AS total_free_time_allocation,
    chat.state IN ('running', 'lapsed') AS is_active,
    chat.started_at AS "timestamp",
    chat.last_heartbeat_at AS last_heartbeat_time,
    account.materialized_through
FROM chat
JOIN account ON account.bucket = chat.bucket AND account.user_id = chat.user_id
JOIN allowance
    ON allowance.bucket = chat.bucket
    AND allowance.user_id = chat.user_id
    AND allowance.advisor_id = chat.advisor_id
LEFT JOIN opening_chat
    ON opening_chat.bucket = chat.bucket
    AND opening_chat.user_id = chat.user_id
    AND opening_chat.chat_id = chat.chat_id
"""

VIEWS = ('"user"', "chat", "conversation_time_record")


def upgrade() -> None:
    """Expand."""
    op.execute(_MAKE_SCHEMA)
    for view in (_USER, _CHAT, _RECORD):
        op.execute(view)
    op.execute(f"GRANT USAGE ON SCHEMA {SCHEMA} TO {ROLE}")
    for view in VIEWS:
        op.execute(f"GRANT SELECT ON {SCHEMA}.{view} TO {ROLE}")


def downgrade() -> None:
    """Take back. The schema stays if somebody keeps something else in it."""
    for view in VIEWS:
        op.execute(f"DROP VIEW {SCHEMA}.{view}")
    op.execute(f"REVOKE USAGE ON SCHEMA {SCHEMA} FROM {ROLE}")
    op.execute(
        "DO $$ BEGIN DROP SCHEMA talktime_legacy; EXCEPTION WHEN dependent_objects_still_exist THEN NULL;"
        " WHEN insufficient_privilege THEN NULL; END $$"
    )
