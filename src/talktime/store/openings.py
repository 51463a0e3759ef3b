"""What accounts begin with that were taken over from an old system: written once, and read again to be checked.

The totals of a chat, the used free time of a pair and the ledger begin with what the old system had, and these tables
keep it apart. So everything that adds to them need not know, and what was metered here is the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import SmallInteger, bindparam, func, insert, literal_column, select
from sqlalchemy.dialects.postgresql import insert as insert_or_nothing

from talktime.meter.state import Account, RateCard, Tariff
from talktime.store import tables
from talktime.store.accounts import due_at, row_of
from talktime.store.exhaustion import first_exhaustion
from talktime.store.ledger import OPENING, LedgerEntry, insert_history
from talktime.store.statements import USERS, array_literal
from talktime.store.tables import bucket_of

if TYPE_CHECKING:
    from sqlalchemy import Select, Table
    from sqlalchemy.ext.asyncio import AsyncConnection

_account, _allowance, _chat, _entry = tables.account, tables.allowance, tables.chat, tables.ledger_entry
_of_account, _of_pair, _of_chat = tables.opening_account, tables.opening_allowance, tables.opening_chat

_BUCKET = bindparam("in_bucket", type_=SmallInteger)
_IS_OPENING = _entry.c.kind == literal_column(f"'{OPENING}'")


def _of_users(table: Table, *columns: Any) -> Select[Any]:  # noqa: ANN401 - columns, and functions of them
    return select(table.c.user_id, *columns).where(table.c.bucket == _BUCKET, table.c.user_id == USERS)


_IMPORTED = _of_users(_of_account, _of_account.c.credits)
_BOOKED = _of_users(_entry, _entry.c.amount).where(_IS_OPENING)
_CHAT_TOTALS = _of_users(
    _of_chat,
    func.count(),
    func.sum(_of_chat.c.elapsed_us),
    func.sum(_of_chat.c.free_us),
    func.sum(_of_chat.c.cost),
).group_by(_of_chat.c.user_id)


class OpeningChat(NamedTuple):
    """What an old system had of a chat: totals in microseconds and micro-credits, and its time record's id, if any.

    `free_us` can be more than `elapsed_us`, since old records tell what their user used with their advisor.
    """

    record_id: str | None
    elapsed_us: int
    free_us: int
    cost: int

    @property
    def chat_free_us(self) -> int:
        """The free time with which the chat's own total begins: what its duration has room for."""
        return min(self.free_us, self.elapsed_us)


class TakenOver(NamedTuple):
    """An account that begins here, and what it brought along; `used_us` by advisor, `chats` by chat id.

    `credits` are what the old system had, in micro-credits: below zero, the account begins with 0.
    """

    account: Account
    credits: int
    used_us: Mapping[str, int]
    chats: Mapping[str, OpeningChat]


class Opening(NamedTuple):
    """What is stored of what an account brought along: its credits, those in its ledger, and its chats' totals."""

    credits: int
    booked: int
    chats: int
    elapsed_us: int
    free_us: int
    cost: int


async def insert_accounts(connection: AsyncConnection, bucket: int, taken: Sequence[TakenOver]) -> set[str]:
    """Write accounts of one bucket that do not exist yet, as of their own instants; all or nothing of each.

    Returns the ids of those that were written: of one that exists, nothing is.
    """
    rows = [
        {
            "bucket": bucket,
            "user_id": one.account.user_id,
            "balance": one.account.balance,
            "materialized_through": one.account.at,
            "next_entry": 2 if one.credits > 0 else 1,
            "due_at": due_at(one.account),
        }
        for one in taken
    ]
    adding = insert_or_nothing(_account).on_conflict_do_nothing().returning(_account.c.user_id)
    written = set((await connection.execute(adding, rows)).scalars())
    new = [one for one in taken if one.account.user_id in written]
    places = [({"bucket": bucket, "user_id": one.account.user_id}, one) for one in new]
    exhaustions = {one.account.user_id: first_exhaustion(one.account) for one in new}
    inserts = (
        (
            _of_account,
            [{**place, "credits": one.credits, "imported_at": one.account.at} for place, one in places],
        ),
        (
            _allowance,
            [
                {**place, "advisor_id": advisor_id, **allowance._asdict()}
                for place, one in places
                for advisor_id, allowance in one.account.allowances.items()
            ],
        ),
        (
            _of_pair,
            [
                {**place, "advisor_id": advisor_id, "used_us": used_us}
                for place, one in places
                for advisor_id, used_us in one.used_us.items()
            ],
        ),
        (
            _chat,
            [
                row_of(bucket, user_id, chat, exhaustions[user_id])
                for user_id, one in ((one.account.user_id, one) for one in new)
                for chat in one.account.chats.values()
            ],
        ),
        (
            _of_chat,
            [
                {**place, "chat_id": chat_id, **chat._asdict()}
                for place, one in places
                for chat_id, chat in one.chats.items()
            ],
        ),
    )
    for table, values in inserts:
        if values:
            await connection.execute(insert(table), values)
    await insert_history(
        connection, bucket, [one.account for one in new], [_entry_of(one) for one in new if one.credits > 0]
    )
    return written


def _entry_of(taken: TakenOver) -> LedgerEntry:
    at = taken.account.at
    return LedgerEntry(
        user_id=taken.account.user_id,
        number=1,
        kind=OPENING,
        amount=taken.credits,
        balance_after=taken.credits,
        happened_at=at,
        recorded_at=at,
        memo="",
    )


async def load_openings(connection: AsyncConnection, bucket: int, user_ids: Sequence[str]) -> dict[str, Opening]:
    """Read what is stored of what these users brought along; those who were not taken over are left out."""
    place = {"in_bucket": bucket, "of_users": array_literal(user_ids)}
    imported = (await connection.execute(_IMPORTED, place)).all()
    booked = dict((await connection.execute(_BOOKED, place)).tuples().all())
    totals = {row[0]: row[1:] for row in (await connection.execute(_CHAT_TOTALS, place)).all()}
    return {
        user_id: Opening(had, booked.get(user_id, 0), *(int(n) for n in totals.get(user_id, (0, 0, 0, 0))))
        for user_id, had in imported
    }


async def load_opening_chat(connection: AsyncConnection, user_id: str, chat_id: str) -> OpeningChat | None:
    """Read what a chat brought along; None if it began here."""
    query = select(_of_chat.c.record_id, _of_chat.c.elapsed_us, _of_chat.c.free_us, _of_chat.c.cost).where(
        _of_chat.c.bucket == bucket_of(user_id), _of_chat.c.user_id == user_id, _of_chat.c.chat_id == chat_id
    )
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else OpeningChat(*row)


async def load_cards(connection: AsyncConnection) -> dict[str, RateCard]:
    """Read all rate cards."""
    rows = await connection.execute(select(tables.advisor))
    return {row.advisor_id: RateCard(Tariff(row.rate, row.first_us, row.increment_us), row.free_us) for row in rows}
