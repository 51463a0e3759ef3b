"""events that are to be told to the host product, written with what they tell.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand. The new columns are null, so no row of accounts is rewritten."""
    op.add_column("account", sa.Column("next_event", sa.BigInteger, nullable=True))
    op.add_column("account", sa.Column("low_at", sa.TIMESTAMP(timezone=True), nullable=True))
    op.create_table(
        "event",
        sa.Column("bucket", sa.SmallInteger, nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("event_id", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("occurred_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("recorded_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.SmallInteger, nullable=False),
        sa.Column("next_try_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("bucket", "user_id", "number", name="pk_event"),
        sa.ForeignKeyConstraint(["bucket", "user_id"], ["account.bucket", "account.user_id"], name="fk_event_account"),
        sa.UniqueConstraint("bucket", "user_id", "event_id", name="uq_event_event_id"),
        sa.CheckConstraint("state IN ('pending', 'dead')", name=op.f("ck_event_state")),
        sa.CheckConstraint("(state = 'pending') = (next_try_at IS NOT NULL)", name=op.f("ck_event_pending_is_tried")),
        sa.CheckConstraint("number > 0 AND attempts >= 0", name=op.f("ck_event_figures")),
    )
    op.create_index(
        "ix_event_pending", "event", ["bucket", "user_id", "number"], postgresql_where=sa.text("state = 'pending'")
    )
    op.execute("GRANT UPDATE (next_event, low_at) ON account TO talktime_app")
    op.execute(
        "GRANT SELECT, INSERT, DELETE, UPDATE (state, attempts, next_try_at, last_error) ON event TO talktime_app"
    )


def downgrade() -> None:
    """Take back, with what has not been told yet."""
    op.drop_table("event")
    op.drop_column("account", "low_at")
    op.drop_column("account", "next_event")
