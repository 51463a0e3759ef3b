"""a chat's row says until when its account's credits last, so that most heartbeats need no other row.

Null where it is not known: chats that run already get theirs from the next pass.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand."""
    op.add_column("chat", sa.Column("exhausts_at", sa.TIMESTAMP(timezone=True), nullable=True))
    op.execute("GRANT UPDATE (exhausts_at) ON chat TO talktime_app")


def downgrade() -> None:
    """Take back."""
    op.drop_column("chat", "exhausts_at")
