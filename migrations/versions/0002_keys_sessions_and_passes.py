"""service keys, console sessions, and a record of passes.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand."""
    op.create_table(
        "console_session",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("key_digest", sa.LargeBinary(), nullable=False),
        sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_console_session")),
    )
    op.create_table(
        "reconciler_pass",
        sa.Column("pass_id", sa.Text(), nullable=False),
        sa.Column("began_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("took_us", sa.BigInteger(), nullable=False),
        sa.Column("lag_us", sa.BigInteger(), nullable=False),
        sa.Column("accounts", sa.BigInteger(), nullable=False),
        sa.Column("chats", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("pass_id", name=op.f("pk_reconciler_pass")),
    )
    op.create_index("ix_reconciler_pass_began", "reconciler_pass", ["began_at"], unique=False)
    op.create_table(
        "service_key",
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_service_key")),
        sa.UniqueConstraint("digest", name="uq_service_key_digest"),
    )
    op.create_index("ix_segment_ended", "segment", ["ended_at"], unique=False, postgresql_using="brin")


def downgrade() -> None:
    """Take back."""
    op.drop_index("ix_segment_ended", table_name="segment", postgresql_using="brin")
    op.drop_table("service_key")
    op.drop_index("ix_reconciler_pass_began", table_name="reconciler_pass")
    op.drop_table("reconciler_pass")
    op.drop_table("console_session")
