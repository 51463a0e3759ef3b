"""the ledger's lines that were there before its rules were widened are looked at, while others are added.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand."""
    op.execute("SET LOCAL statement_timeout = '60min'")  # it locks nobody out
    for name in ("kind", "sign", "source"):
        op.execute(f"ALTER TABLE ledger_entry VALIDATE CONSTRAINT ck_ledger_entry_{name}")


def downgrade() -> None:
    """Take back nothing: a rule that holds for all lines is no other rule."""
