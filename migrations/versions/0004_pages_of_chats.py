"""the index for pages of chats serves for nothing else.

It seemed to serve for a chat's key as well as the primary key does, and was taken for it at random: then finding one
chat walked all of its user's. Now it is partial; all rows are in it, but only a statement that says so can use it.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_COLUMNS = ["bucket", "user_id", "started_at", "chat_id"]


def upgrade() -> None:
    """Make the new index, and drop the old one."""
    op.create_index("ix_chat_page", "chat", _COLUMNS, postgresql_where=text("started_at > '-infinity'"))
    op.drop_index("ix_chat_started", table_name="chat")


def downgrade() -> None:
    """Go back."""
    op.create_index("ix_chat_started", "chat", _COLUMNS)
    op.drop_index("ix_chat_page", table_name="chat")
