"""what audits found, for operators to see.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand."""
    op.create_table(
        "reconciler_audit",
        sa.Column("audit_id", sa.Text(), nullable=False),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("took_us", sa.BigInteger(), nullable=False),
        sa.Column("accounts", sa.BigInteger(), nullable=False),
        sa.Column("differing", sa.BigInteger(), nullable=False),
        sa.Column("differences", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("audit_id", name="pk_reconciler_audit"),
    )
    op.create_index("ix_reconciler_audit_ended", "reconciler_audit", ["ended_at"], unique=False)
    op.execute("GRANT SELECT, INSERT, DELETE ON reconciler_audit TO talktime_app")


def downgrade() -> None:
    """Take back."""
    op.drop_table("reconciler_audit")
