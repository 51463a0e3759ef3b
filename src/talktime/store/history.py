"""Everything that is stored of accounts, for those who check it: streamed, so that no account is too large for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import Integer, Select, SmallInteger, Text, and_, bindparam, func, literal_column, select

from talktime.meter.state import Allowance, Chat, Segment
from talktime.store import tables
from talktime.store.accounts import chat_from
from talktime.store.ledger import CHARGE, LedgerEntry, entry_from, segment_from
from talktime.store.openings import OpeningChat

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row, Table
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncResult

T = TypeVar("T")

PAGE_ROWS = 1000
"""So many rows of each stream are in memory at a time."""

_account, _allowance, _chat = tables.account, tables.allowance, tables.chat
_segment, _entry = tables.segment, tables.ledger_entry
_of_account, _of_pair, _of_chat = tables.opening_account, tables.opening_allowance, tables.opening_chat

_BUCKET = bindparam("in_bucket", type_=SmallInteger)
_AFTER = bindparam("after_user", type_=Text)


def _in_batch(table: Table) -> ColumnElement[bool]:
    return and_(
        table.c.bucket == _BUCKET, table.c.user_id > _AFTER, table.c.user_id <= bindparam("last_user", type_=Text)
    )


_ACCOUNTS = (
    select(_account)
    .where(_account.c.bucket == _BUCKET, _account.c.user_id > _AFTER)
    .order_by(_account.c.user_id)
    .limit(bindparam("at_most", type_=Integer))
)
_ALLOWANCES = select(_allowance).where(_in_batch(_allowance)).order_by(_allowance.c.user_id, _allowance.c.advisor_id)
_IS_CHARGE = _entry.c.kind == literal_column(f"'{CHARGE}'")
_CHATS = select(_chat).where(_in_batch(_chat)).order_by(_chat.c.user_id, _chat.c.chat_id)
# No joins: whoever reads them side by side needs two rows in memory, whatever plan the database would choose.
_SEGMENTS = (
    select(_segment).where(_in_batch(_segment)).order_by(_segment.c.user_id, _segment.c.chat_id, _segment.c.started_at)
)
_CHARGES = (
    select(_entry)
    .where(_in_batch(_entry), _IS_CHARGE)
    .order_by(_entry.c.user_id, _entry.c.chat_id, _entry.c.segment_started_at)
)
_ENTRIES = select(_entry).where(_in_batch(_entry)).order_by(_entry.c.user_id, _entry.c.number)
_TIMELINE = (
    select(_segment).where(_in_batch(_segment)).order_by(_segment.c.user_id, _segment.c.started_at, _segment.c.chat_id)
)
_CREDITS = (
    select(_entry.c.user_id, _entry.c.happened_at, _entry.c.amount)
    .where(_in_batch(_entry), ~_IS_CHARGE)
    .order_by(_entry.c.user_id, _entry.c.number)
)
_OPENINGS = select(_of_account).where(_in_batch(_of_account)).order_by(_of_account.c.user_id)
_OPENING_PAIRS = select(_of_pair).where(_in_batch(_of_pair)).order_by(_of_pair.c.user_id, _of_pair.c.advisor_id)
_OPENING_CHATS = select(_of_chat).where(_in_batch(_of_chat)).order_by(_of_chat.c.user_id, _of_chat.c.chat_id)


@dataclass(frozen=True, slots=True)
class AccountRow:
    """A row of `account`; `at` is the instant up to which it was materialized."""

    bucket: int
    user_id: str
    balance: int
    at: int
    next_entry: int
    due_at: int | None


class Rows(Generic[T]):
    """The rows of one statement in the order of a key that begins with the user id, a page in memory at a time."""

    def __init__(
        self,
        result: AsyncResult[Any],
        key: Sequence[str],
        value_of: Callable[[Row[Any]], T],
        before_page: Callable[[], None],
    ) -> None:
        self._result = result
        self._key_of = attrgetter(*key)
        self._value_of = value_of
        self._before_page = before_page
        self._page: list[Row[Any]] = []  # the next row last
        self._ended = False

    async def next(self, key: object) -> T | None:
        """Return the next value if its key is this one, else None and keep it for later."""
        if not self._page and not self._ended:
            self._before_page()
            self._page = [*reversed(await self._result.fetchmany(PAGE_ROWS))]
            self._ended = len(self._page) < PAGE_ROWS
        if not self._page or self._key_of(self._page[-1]) != key:
            return None
        return self._value_of(self._page.pop())


@dataclass(frozen=True, slots=True)
class Histories:
    """All that is stored of a batch of accounts, by user id, each in the order in which it is to be read.

    `chats` are by chat id, each with the instant until which its row says that credits last; `segments`, keyed by user
    and chat, by their beginning; `charges`, the ledger's lines for segments, by chat and segment; `entries`, all of its
    lines, by number. `timeline` are the segments again, in the order in which they began, and `credits` the instants
    and amounts of all entries but charges.

    Of accounts that were taken over, `openings` are the credits that they had and when that was; `opening_pairs`, by
    advisor, the free time used before; `opening_chats`, by chat, the totals.
    """

    allowances: Rows[tuple[str, Allowance]]
    chats: Rows[tuple[Chat, int | None]]
    segments: Rows[Segment]
    charges: Rows[LedgerEntry]
    entries: Rows[LedgerEntry]
    timeline: Rows[Segment]
    credits: Rows[tuple[int, int]]
    openings: Rows[tuple[int, int]]
    opening_pairs: Rows[tuple[str, int]]
    opening_chats: Rows[OpeningChat]


async def load_buckets(connection: AsyncConnection) -> dict[int, int]:
    """Count the accounts in each bucket that has any."""
    rows = await connection.execute(select(_account.c.bucket, func.count()).group_by(_account.c.bucket))
    return dict(sorted((bucket, count) for bucket, count in rows.all()))


async def is_unused(connection: AsyncConnection) -> bool:
    """Tell whether there is neither an account nor a rate card; for one snapshot."""
    card = await connection.scalar(select(tables.advisor.c.advisor_id).limit(1))
    return card is None and not await load_buckets(connection)


async def load_accounts(connection: AsyncConnection, *, bucket: int, after: str, limit: int) -> list[AccountRow]:
    """Read the next accounts of a bucket beyond the user id `after`."""
    found = await connection.execute(_ACCOUNTS, {"in_bucket": bucket, "after_user": after, "at_most": limit})
    return [
        AccountRow(row.bucket, row.user_id, row.balance, row.materialized_through, row.next_entry, row.due_at)
        for row in found.all()
    ]


@asynccontextmanager
async def open_histories(
    connection: AsyncConnection,
    accounts: list[AccountRow],
    *,
    bucket: int,
    after: str,
    before_page: Callable[[], None],
) -> AsyncIterator[Histories]:
    """Read all that is stored of the accounts that `load_accounts` found; in its snapshot, so that all of it agrees.

    `before_page` is called before each look at the database, and may raise to end it all.
    """
    batch = {"in_bucket": bucket, "after_user": after, "last_user": accounts[-1].user_id if accounts else after}
    async with AsyncExitStack() as open_cursors:

        async def rows(query: Select[Any], value_of: Callable[[Row[Any]], T], *key: str) -> Rows[T]:
            stream = connection.stream(query, batch, execution_options={"yield_per": PAGE_ROWS})
            return Rows(await open_cursors.enter_async_context(stream), key, value_of, before_page)

        yield Histories(
            await rows(_ALLOWANCES, lambda row: (row.advisor_id, Allowance(row.granted_us, row.used_us)), "user_id"),
            await rows(_CHATS, lambda row: (chat_from(row), row.exhausts_at), "user_id"),
            await rows(_SEGMENTS, segment_from, "user_id", "chat_id"),
            await rows(_CHARGES, entry_from, "user_id"),
            await rows(_ENTRIES, entry_from, "user_id"),
            await rows(_TIMELINE, segment_from, "user_id"),
            await rows(_CREDITS, lambda row: (row.happened_at, row.amount), "user_id"),
            await rows(_OPENINGS, lambda row: (row.credits, row.imported_at), "user_id"),
            await rows(_OPENING_PAIRS, lambda row: (row.advisor_id, row.used_us), "user_id"),
            await rows(
                _OPENING_CHATS,
                lambda row: OpeningChat(row.record_id, row.elapsed_us, row.free_us, row.cost),
                "user_id",
                "chat_id",
            ),
        )
