"""What was taken over is shown, and audited: totals begin with the openings, and whoever changes one is found out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import URL

from talktime.legacy.rows import OldRecord, OldUser
from talktime.legacy.taking_over import Rules, decide
from talktime.store import openings
from talktime.store.statements import CLOCK
from talktime.store.tables import bucket_of
from tests.api.requests import AUTH
from tests.database import connect
from tests.reconciler.rich_history import found_in
from tests.support import FREE_OF_CHARGE, POLICY, S, open_service
from tests.web.server import console, page_of, text_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


@pytest.fixture
async def moved_in(database_url: URL) -> URL:
    """A user with 25 credits, half of the free time used, and a chat that runs on."""

    async def work(connection: AsyncConnection) -> None:
        now: int = (await connection.execute(CLOCK)).scalar_one()
        old = OldRecord("r", "u", "a", "c", "60", "1.5", "90", "180", is_active=True, recorded_at=now, heartbeat_at=now)
        rules = Rules(POLICY, {}, FREE_OF_CHARGE)
        decided = decide("u", [OldUser("u", "25")], [old], [], rules=rules, read_at=now, now=now)
        assert decided.taken is not None
        await openings.insert_accounts(connection, bucket_of("u"), [decided.taken])

    async with open_service(database_url) as service:
        await service.database.transaction(work)
    return database_url


async def test_what_was_taken_over_is_as_it_should_be(moved_in: URL) -> None:
    assert [] == await found_in(moved_in)


async def test_api_and_console_say_that_it_was_taken_over(moved_in: URL) -> None:
    async with console(moved_in) as client:
        text = text_of(page_of(await client.get("/console/users/u")))
        receipt = text_of(page_of(await client.get("/console/users/u/chats/c")))
        ledger = (await client.get("/v1/users/u/ledger", headers=AUTH)).json()["items"]
        reading = (await client.get("/v1/users/u/chats/c", headers=AUTH)).json()
    assert "Taken over" in text
    assert "+25.00" in text
    # 90 free seconds of the pair are more than this chat ran, so all of it was free.
    assert "Taken over, from before: 1 minute 1:00 0:00 1.50 All of the chat: " in receipt
    assert receipt.index("It runs") < receipt.index("Taken over")
    assert [("opening", "25.000000", "25.000000")] == [
        (entry["kind"], entry["amount"], entry["balance_after"]) for entry in ledger
    ]
    assert ("running", "1.500000") == (reading["state"], reading["credits_used"])
    assert 60 * S <= reading["free_used_us"] == reading["elapsed_us"] < 90 * S


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("UPDATE opening_account SET credits = credits + 1", "ledger entry 1: amount"),
        ("UPDATE opening_account SET credits = 0", "ledger entry 1: amount"),
        ("DELETE FROM opening_account", "ledger entry 1: amount"),
        ("UPDATE opening_allowance SET used_us = used_us - 1", "used_us"),
        ("DELETE FROM opening_allowance", "used_us"),
        ("UPDATE opening_chat SET elapsed_us = elapsed_us + 1", "elapsed_us"),
        ("UPDATE opening_chat SET cost = cost - 1", "cost"),
        ("DELETE FROM opening_chat", "elapsed_us"),
        ("UPDATE chat SET cost = cost + 1", "cost"),
        ("UPDATE ledger_entry SET amount = amount + 1, balance_after = balance_after + 1", "ledger entry 1: amount"),
        ("DELETE FROM ledger_entry", "opening in the ledger"),
        ("UPDATE account SET balance = balance + 1", "balance"),
    ],
)
async def test_tampering_with_it_is_found_and_named(moved_in: URL, tampering: str, found: str) -> None:
    with connect(moved_in) as connection:
        connection.execute(tampering)
    lines = [line for findings in await found_in(moved_in) for line in findings.lines()]
    assert any(found in line for line in lines), lines
