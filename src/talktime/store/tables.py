"""The schema. The same tables serve plain PostgreSQL and Citus (distribution column `bucket`, `advisor` a reference).

`bucket` leads every key of users' tables, every statement names it, and nothing here has a volatile default, a trigger
or a sequence: ids, numbers and times are made before the INSERT.
"""

from __future__ import annotations

import zlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

BUCKETS = 1024

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def bucket_of(user_id: str) -> int:
    """Return the bucket of a user: a hash that is the same in every process and for ever."""
    return zlib.crc32(user_id.encode()) % BUCKETS


def datetime_of(instant: int) -> datetime:
    """Return an instant as the driver takes it."""
    return EPOCH + timedelta(microseconds=instant)


class Instant(TypeDecorator[int]):
    """``timestamptz`` in the database, microseconds since 1970 (UTC) in Python; exact in every session time zone."""

    impl = TIMESTAMP(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Write microseconds as a datetime."""
        return None if value is None else datetime_of(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Read a datetime as microseconds."""
        if value is None:
            return None
        since = value - EPOCH
        return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

PAGED_SQL = "started_at > '-infinity'"
PENDING_SQL = "state = 'pending'"
LIVE_STATES_SQL = "state IN ('running', 'lapsed', 'paused', 'exhausted')"


def _id(name: str, *, nullable: bool = False) -> Column[str]:
    # Collation C: the order of the index is the order of code points, as in Python, whatever the cluster's locale.
    return Column(name, Text(collation="C"), nullable=nullable)


def _number(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _instant(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, Instant, nullable=nullable)


def _tariff() -> tuple[Column[int], ...]:
    return _number("rate"), _number("first_us"), _number("increment_us")


account = Table(
    "account",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _number("balance"),
    _instant("materialized_through"),
    _number("next_entry"),
    # From when a pass finds something to write: null where nothing runs and nothing can be abandoned. It changes only
    # with a chat's state, so a pass over running chats stays a HOT update.
    _instant("due_at", nullable=True),
    # The number of the next event, null as long as there was none; and since when credits are known to be low, as the
    # last of those events said, null where they are not.
    Column("next_event", BigInteger),
    _instant("low_at", nullable=True),
    PrimaryKeyConstraint("bucket", "user_id"),
    CheckConstraint(f"bucket >= 0 AND bucket < {BUCKETS}", name="bucket"),
    CheckConstraint("balance >= 0", name="balance"),
    Index("ix_account_due", "bucket", "user_id", postgresql_where=text("due_at IS NOT NULL")),
    postgresql_with={"fillfactor": 80},
)

allowance = Table(
    "allowance",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _id("advisor_id"),
    _number("granted_us"),
    _number("used_us"),
    PrimaryKeyConstraint("bucket", "user_id", "advisor_id"),
    ForeignKeyConstraint(["bucket", "user_id"], ["account.bucket", "account.user_id"]),
    CheckConstraint("used_us >= 0 AND used_us <= granted_us", name="used"),
    postgresql_with={"fillfactor": 80},
)

chat = Table(
    "chat",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _id("chat_id"),
    _id("advisor_id"),
    Column("state", Text, nullable=False),
    *_tariff(),
    _number("lease_us"),
    _number("abandon_after_us"),
    _instant("last_heartbeat_at"),
    _instant("started_at"),
    _number("revision"),
    Column("start_key", Text),
    _instant("stopped_at", nullable=True),
    Column("stop_reason", Text),
    _instant("opened_at", nullable=True),
    _number("opened_count_us"),
    _number("count_us"),
    _number("elapsed_us"),
    _number("free_us"),
    _number("cost"),
    # Of a running chat: before this instant none of its user's clocks stops for want of credits. Null where that is not
    # known. It is the same in all of them, and stands here so that a heartbeat needs no other row.
    _instant("exhausts_at", nullable=True),
    PrimaryKeyConstraint("bucket", "user_id", "chat_id"),
    ForeignKeyConstraint(["bucket", "user_id"], ["account.bucket", "account.user_id"]),
    CheckConstraint("state IN ('running', 'lapsed', 'paused', 'exhausted', 'abandoned', 'ended')", name="state"),
    CheckConstraint(
        "stop_reason IN ('lapsed', 'exhausted', 'switched', 'paused', 'ended')",
        name="stop_reason",
    ),
    CheckConstraint("(state = 'running') = (opened_at IS NOT NULL)", name="running_is_open"),
    CheckConstraint("(state = 'running') = (stopped_at IS NULL)", name="running_is_not_stopped"),
    CheckConstraint("(stopped_at IS NULL) = (stop_reason IS NULL)", name="stopped_for_a_reason"),
    CheckConstraint("opened_count_us >= 0 AND count_us >= opened_count_us", name="count"),
    CheckConstraint("free_us >= 0 AND cost >= 0 AND elapsed_us >= free_us", name="totals"),
    CheckConstraint("lease_us > 0 AND abandon_after_us > lease_us", name="lease"),
    Index("ix_chat_live", "bucket", "user_id", "chat_id", postgresql_where=text(LIVE_STATES_SQL)),
    # All chats are in it, but only a statement that says so can use it. Otherwise it would be taken at random, instead
    # of the key, to find a chat by its id: to the planner a user has one chat, and the two cost the same.
    Index("ix_chat_page", "bucket", "user_id", "started_at", "chat_id", postgresql_where=text(PAGED_SQL)),
    # Heartbeats and passes update in place: room on the page keeps those updates HOT.
    postgresql_with={"fillfactor": 70},
)

segment = Table(
    "segment",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _id("chat_id"),
    _instant("started_at"),
    _instant("ended_at"),
    _id("advisor_id"),
    Column("reason", Text, nullable=False),
    *_tariff(),
    _number("count_us"),
    _number("free_us"),
    _number("paid_us"),
    _number("cost"),
    PrimaryKeyConstraint("bucket", "user_id", "chat_id", "started_at"),
    ForeignKeyConstraint(["bucket", "user_id", "chat_id"], ["chat.bucket", "chat.user_id", "chat.chat_id"]),
    CheckConstraint("reason IN ('lapsed', 'exhausted', 'switched', 'paused', 'ended')", name="reason"),
    CheckConstraint("ended_at > started_at", name="not_empty"),
    CheckConstraint("count_us >= 0 AND free_us >= 0 AND paid_us >= 0 AND cost >= 0", name="figures"),
    # For looks at the last hour: segments are appended about as they end, so block ranges tell them apart at no cost.
    Index("ix_segment_ended", "ended_at", postgresql_using="brin"),
)

ledger_entry = Table(
    "ledger_entry",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _number("number"),
    Column("kind", Text, nullable=False),
    _number("amount"),
    _number("balance_after"),
    _instant("happened_at"),
    _instant("recorded_at"),
    Column("memo", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("request_hash", LargeBinary),
    _id("chat_id", nullable=True),
    _instant("segment_started_at", nullable=True),
    PrimaryKeyConstraint("bucket", "user_id", "number"),
    ForeignKeyConstraint(["bucket", "user_id"], ["account.bucket", "account.user_id"]),
    UniqueConstraint("bucket", "user_id", "idempotency_key", name="uq_ledger_entry_idempotency_key"),
    # Whatever else fails, no segment can be charged twice.
    UniqueConstraint("bucket", "user_id", "chat_id", "segment_started_at", name="uq_ledger_entry_segment"),
    CheckConstraint(
        "kind IN ('purchase', 'grant', 'compensation', 'opening', 'refund', 'correction', 'charge')",
        name="kind",
    ),
    CheckConstraint("(kind IN ('purchase', 'grant', 'compensation', 'opening')) = (amount > 0)", name="sign"),
    CheckConstraint("amount <> 0 AND balance_after >= 0", name="figures"),
    CheckConstraint(
        "(kind = 'charge') = (chat_id IS NOT NULL AND segment_started_at IS NOT NULL)"
        " AND (kind IN ('charge', 'opening')) = (idempotency_key IS NULL)"
        " AND (kind IN ('charge', 'opening')) = (request_hash IS NULL)",
        name="source",
    ),
)

# What was taken over from an old system, as it was there: written once, at the import, and never billed again. The
# totals of accounts, allowances and chats begin with it.

opening_account = Table(
    "opening_account",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    # Below zero where the old system let it get there: the balance then begins with 0.
    _number("credits"),
    _instant("imported_at"),
    PrimaryKeyConstraint("bucket", "user_id"),
    ForeignKeyConstraint(["bucket", "user_id"], ["account.bucket", "account.user_id"]),
)

opening_allowance = Table(
    "opening_allowance",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _id("advisor_id"),
    _number("used_us"),
    PrimaryKeyConstraint("bucket", "user_id", "advisor_id"),
    ForeignKeyConstraint(
        ["bucket", "user_id", "advisor_id"], ["allowance.bucket", "allowance.user_id", "allowance.advisor_id"]
    ),
    CheckConstraint("used_us >= 0", name="used"),
)

opening_chat = Table(
    "opening_chat",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _id("chat_id"),
    # The old time record's own id; null where the old system had none for the chat.
    Column("record_id", Text),
    _number("elapsed_us"),
    _number("free_us"),
    _number("cost"),
    PrimaryKeyConstraint("bucket", "user_id", "chat_id"),
    ForeignKeyConstraint(["bucket", "user_id", "chat_id"], ["chat.bucket", "chat.user_id", "chat.chat_id"]),
    CheckConstraint("free_us >= 0 AND cost >= 0 AND elapsed_us >= 0", name="totals"),
)

# What is to be told to the host product, in the order of its numbers: written with what it tells, and deleted once it
# is delivered. `next_try_at` is when it may be sent, also after somebody took it to send it and was never heard of
# again; null where it is not sent any more.
event = Table(
    "event",
    metadata,
    Column("bucket", SmallInteger, nullable=False),
    _id("user_id"),
    _number("number"),
    Column("event_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    _instant("occurred_at"),
    _instant("recorded_at"),
    Column("payload", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", SmallInteger, nullable=False),
    _instant("next_try_at", nullable=True),
    Column("last_error", Text),
    PrimaryKeyConstraint("bucket", "user_id", "number"),
    ForeignKeyConstraint(["bucket", "user_id"], ["account.bucket", "account.user_id"]),
    UniqueConstraint("bucket", "user_id", "event_id", name="uq_event_event_id"),
    CheckConstraint("state IN ('pending', 'dead')", name="state"),
    CheckConstraint("(state = 'pending') = (next_try_at IS NOT NULL)", name="pending_is_tried"),
    CheckConstraint("number > 0 AND attempts >= 0", name="figures"),
    Index("ix_event_pending", "bucket", "user_id", "number", postgresql_where=text(PENDING_SQL)),
)

advisor = Table(
    "advisor",
    metadata,
    _id("advisor_id"),
    *_tariff(),
    _number("free_us"),
    PrimaryKeyConstraint("advisor_id"),
    CheckConstraint("rate >= 0 AND first_us >= 0 AND increment_us >= 0 AND free_us >= 0", name="figures"),
)

service_key = Table(
    "service_key",
    metadata,
    _id("name"),
    # SHA-256: the keys are random, 256 bits, so nothing slower is needed.
    Column("digest", LargeBinary, nullable=False),
    _instant("created_at"),
    _instant("revoked_at", nullable=True),
    PrimaryKeyConstraint("name"),
    UniqueConstraint("digest", name="uq_service_key_digest"),
)

console_session = Table(
    "console_session",
    metadata,
    Column("digest", LargeBinary, nullable=False),
    # Of the key that signed in: without it the session is over too.
    Column("key_digest", LargeBinary, nullable=False),
    _instant("expires_at"),
    PrimaryKeyConstraint("digest"),
)

reconciler_pass = Table(
    "reconciler_pass",
    metadata,
    Column("pass_id", Text, nullable=False),
    _instant("began_at"),
    _number("took_us"),
    _number("lag_us"),
    _number("accounts"),
    _number("chats"),
    _number("failed"),
    PrimaryKeyConstraint("pass_id"),
    Index("ix_reconciler_pass_began", "began_at"),
)

reconciler_audit = Table(
    "reconciler_audit",
    metadata,
    Column("audit_id", Text, nullable=False),
    _instant("ended_at"),
    _number("took_us"),
    _number("accounts"),
    _number("differing"),
    _number("differences"),
    PrimaryKeyConstraint("audit_id"),
    Index("ix_reconciler_audit_ended", "ended_at"),
)
