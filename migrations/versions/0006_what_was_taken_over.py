"""what an old system's users, pairs and chats brought along, kept apart from what is metered here.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

CREDITS = "'purchase', 'grant', 'compensation'"
OTHERS = "'refund', 'correction', 'charge'"
TABLES = ("opening_account", "opening_allowance", "opening_chat")


def upgrade() -> None:
    """Expand."""
    op.create_table(
        "opening_account",
        sa.Column("bucket", sa.SmallInteger, nullable=False),
        _id("user_id"),
        sa.Column("credits", sa.BigInteger, nullable=False),
        sa.Column("imported_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "user_id", name="pk_opening_account"),
        _key_to("opening_account", "account", "bucket", "user_id"),
    )
    op.create_table(
        "opening_allowance",
        sa.Column("bucket", sa.SmallInteger, nullable=False),
        _id("user_id"),
        _id("advisor_id"),
        sa.Column("used_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("bucket", "user_id", "advisor_id", name="pk_opening_allowance"),
        _key_to("opening_allowance", "allowance", "bucket", "user_id", "advisor_id"),
        sa.CheckConstraint("used_us >= 0", name=op.f("ck_opening_allowance_used")),
    )
    op.create_table(
        "opening_chat",
        sa.Column("bucket", sa.SmallInteger, nullable=False),
        _id("user_id"),
        _id("chat_id"),
        sa.Column("record_id", sa.Text),
        sa.Column("elapsed_us", sa.BigInteger, nullable=False),
        sa.Column("free_us", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("bucket", "user_id", "chat_id", name="pk_opening_chat"),
        _key_to("opening_chat", "chat", "bucket", "user_id", "chat_id"),
        sa.CheckConstraint("free_us >= 0 AND cost >= 0 AND elapsed_us >= 0", name=op.f("ck_opening_chat_totals")),
    )
    for table in TABLES:
        op.execute(f"GRANT SELECT, INSERT ON {table} TO talktime_app")
    _ledger_kinds(CREDITS + ", 'opening'", OTHERS)


def downgrade() -> None:
    """Take back; refused by the constraints where somebody was taken over."""
    _ledger_kinds(CREDITS, OTHERS)
    for table in TABLES:
        op.drop_table(table)


def _id(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(collation="C"), nullable=False)


def _key_to(table: str, parent: str, *columns: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(columns, [f"{parent}.{column}" for column in columns], name=f"fk_{table}_{parent}")


def _ledger_kinds(added: str, others: str) -> None:
    """Let the ledger have these kinds of lines; checking what is there keeps nobody from adding to it."""
    without_request = "kind IN ('charge', 'opening')" if "opening" in added else "kind = 'charge'"
    checks = {
        "kind": f"kind IN ({added}, {others})",
        "sign": f"(kind IN ({added})) = (amount > 0)",
        "source": "(kind = 'charge') = (chat_id IS NOT NULL AND segment_started_at IS NOT NULL)"
        f" AND ({without_request}) = (idempotency_key IS NULL)"
        f" AND ({without_request}) = (request_hash IS NULL)",
    }
    for name, check in checks.items():
        op.execute(f"ALTER TABLE ledger_entry DROP CONSTRAINT ck_ledger_entry_{name}")
        op.execute(f"ALTER TABLE ledger_entry ADD CONSTRAINT ck_ledger_entry_{name} CHECK ({check}) NOT VALID")
    for name in checks:
        op.execute(f"ALTER TABLE ledger_entry VALIDATE CONSTRAINT ck_ledger_entry_{name}")
