"""the first schema.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Expand."""
    op.create_table(
        "account",
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("balance", sa.BigInteger(), nullable=False),
        sa.Column("materialized_through", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("next_entry", sa.BigInteger(), nullable=False),
        sa.Column("due_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("balance >= 0", name=op.f("ck_account_balance")),
        sa.CheckConstraint("bucket >= 0 AND bucket < 1024", name=op.f("ck_account_bucket")),
        sa.PrimaryKeyConstraint("bucket", "user_id", name=op.f("pk_account")),
        postgresql_with={"fillfactor": 80},
    )
    op.create_index(
        "ix_account_due",
        "account",
        ["bucket", "user_id"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "advisor",
        sa.Column("advisor_id", sa.Text(collation="C"), nullable=False),
        sa.Column("rate", sa.BigInteger(), nullable=False),
        sa.Column("first_us", sa.BigInteger(), nullable=False),
        sa.Column("increment_us", sa.BigInteger(), nullable=False),
        sa.Column("free_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "rate >= 0 AND first_us >= 0 AND increment_us >= 0 AND free_us >= 0",
            name=op.f("ck_advisor_figures"),
        ),
        sa.PrimaryKeyConstraint("advisor_id", name=op.f("pk_advisor")),
    )
    op.create_table(
        "allowance",
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("advisor_id", sa.Text(collation="C"), nullable=False),
        sa.Column("granted_us", sa.BigInteger(), nullable=False),
        sa.Column("used_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("used_us >= 0 AND used_us <= granted_us", name=op.f("ck_allowance_used")),
        sa.ForeignKeyConstraint(
            ["bucket", "user_id"],
            ["account.bucket", "account.user_id"],
            name=op.f("fk_allowance_account"),
        ),
        sa.PrimaryKeyConstraint("bucket", "user_id", "advisor_id", name=op.f("pk_allowance")),
        postgresql_with={"fillfactor": 80},
    )
    op.create_table(
        "chat",
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("chat_id", sa.Text(collation="C"), nullable=False),
        sa.Column("advisor_id", sa.Text(collation="C"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("rate", sa.BigInteger(), nullable=False),
        sa.Column("first_us", sa.BigInteger(), nullable=False),
        sa.Column("increment_us", sa.BigInteger(), nullable=False),
        sa.Column("lease_us", sa.BigInteger(), nullable=False),
        sa.Column("abandon_after_us", sa.BigInteger(), nullable=False),
        sa.Column("last_heartbeat_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("start_key", sa.Text(), nullable=True),
        sa.Column("stopped_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("opened_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("opened_count_us", sa.BigInteger(), nullable=False),
        sa.Column("count_us", sa.BigInteger(), nullable=False),
        sa.Column("elapsed_us", sa.BigInteger(), nullable=False),
        sa.Column("free_us", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "(state = 'running') = (opened_at IS NOT NULL)",
            name=op.f("ck_chat_running_is_open"),
        ),
        sa.CheckConstraint(
            "(state = 'running') = (stopped_at IS NULL)",
            name=op.f("ck_chat_running_is_not_stopped"),
        ),
        sa.CheckConstraint(
            "state IN ('running', 'lapsed', 'paused', 'exhausted', 'abandoned', 'ended')",
            name=op.f("ck_chat_state"),
        ),
        sa.CheckConstraint(
            "stop_reason IN ('lapsed', 'exhausted', 'switched', 'paused', 'ended')",
            name=op.f("ck_chat_stop_reason"),
        ),
        sa.CheckConstraint(
            "(stopped_at IS NULL) = (stop_reason IS NULL)",
            name=op.f("ck_chat_stopped_for_a_reason"),
        ),
        sa.CheckConstraint(
            "free_us >= 0 AND cost >= 0 AND elapsed_us >= free_us",
            name=op.f("ck_chat_totals"),
        ),
        sa.CheckConstraint("lease_us > 0 AND abandon_after_us > lease_us", name=op.f("ck_chat_lease")),
        sa.CheckConstraint(
            "opened_count_us >= 0 AND count_us >= opened_count_us",
            name=op.f("ck_chat_count"),
        ),
        sa.ForeignKeyConstraint(
            ["bucket", "user_id"],
            ["account.bucket", "account.user_id"],
            name=op.f("fk_chat_account"),
        ),
        sa.PrimaryKeyConstraint("bucket", "user_id", "chat_id", name=op.f("pk_chat")),
        postgresql_with={"fillfactor": 70},
    )
    op.create_index(
        "ix_chat_live",
        "chat",
        ["bucket", "user_id", "chat_id"],
        unique=False,
        postgresql_where=sa.text("state IN ('running', 'lapsed', 'paused', 'exhausted')"),
    )
    op.create_index(
        "ix_chat_started",
        "chat",
        ["bucket", "user_id", "started_at", "chat_id"],
        unique=False,
    )
    op.create_table(
        "ledger_entry",
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("balance_after", sa.BigInteger(), nullable=False),
        sa.Column("happened_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("recorded_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("memo", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("request_hash", sa.LargeBinary(), nullable=True),
        sa.Column("chat_id", sa.Text(collation="C"), nullable=True),
        sa.Column("segment_started_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(kind = 'charge') = (chat_id IS NOT NULL AND segment_started_at IS NOT NULL)"
            " AND (kind = 'charge') = (idempotency_key IS NULL)"
            " AND (kind = 'charge') = (request_hash IS NULL)",
            name=op.f("ck_ledger_entry_source"),
        ),
        sa.CheckConstraint(
            "(kind IN ('purchase', 'grant', 'compensation')) = (amount > 0)",
            name=op.f("ck_ledger_entry_sign"),
        ),
        sa.CheckConstraint(
            "kind IN ('purchase', 'grant', 'compensation', 'refund', 'correction', 'charge')",
            name=op.f("ck_ledger_entry_kind"),
        ),
        sa.CheckConstraint("amount <> 0 AND balance_after >= 0", name=op.f("ck_ledger_entry_figures")),
        sa.ForeignKeyConstraint(
            ["bucket", "user_id"],
            ["account.bucket", "account.user_id"],
            name=op.f("fk_ledger_entry_account"),
        ),
        sa.PrimaryKeyConstraint("bucket", "user_id", "number", name=op.f("pk_ledger_entry")),
        sa.UniqueConstraint(
            "bucket",
            "user_id",
            "chat_id",
            "segment_started_at",
            name="uq_ledger_entry_segment",
        ),
        sa.UniqueConstraint(
            "bucket",
            "user_id",
            "idempotency_key",
            name="uq_ledger_entry_idempotency_key",
        ),
    )
    op.create_table(
        "segment",
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("chat_id", sa.Text(collation="C"), nullable=False),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("advisor_id", sa.Text(collation="C"), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("rate", sa.BigInteger(), nullable=False),
        sa.Column("first_us", sa.BigInteger(), nullable=False),
        sa.Column("increment_us", sa.BigInteger(), nullable=False),
        sa.Column("count_us", sa.BigInteger(), nullable=False),
        sa.Column("free_us", sa.BigInteger(), nullable=False),
        sa.Column("paid_us", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "reason IN ('lapsed', 'exhausted', 'switched', 'paused', 'ended')",
            name=op.f("ck_segment_reason"),
        ),
        sa.CheckConstraint(
            "count_us >= 0 AND free_us >= 0 AND paid_us >= 0 AND cost >= 0",
            name=op.f("ck_segment_figures"),
        ),
        sa.CheckConstraint("ended_at > started_at", name=op.f("ck_segment_not_empty")),
        sa.ForeignKeyConstraint(
            ["bucket", "user_id", "chat_id"],
            ["chat.bucket", "chat.user_id", "chat.chat_id"],
            name=op.f("fk_segment_chat"),
        ),
        sa.PrimaryKeyConstraint("bucket", "user_id", "chat_id", "started_at", name=op.f("pk_segment")),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("segment")
    op.drop_table("ledger_entry")
    op.drop_index("ix_chat_started", table_name="chat")
    op.drop_index(
        "ix_chat_live",
        table_name="chat",
        postgresql_where=sa.text("state IN ('running', 'lapsed', 'paused', 'exhausted')"),
    )
    op.drop_table("chat")
    op.drop_table("allowance")
    op.drop_table("advisor")
    op.drop_index(
        "ix_account_due",
        table_name="account",
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.drop_table("account")
