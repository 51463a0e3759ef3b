"""What the console's pages show, and what its form books."""

from __future__ import annotations

import asyncio
import json
import re
from html import unescape
from typing import TYPE_CHECKING

import pytest

from reconciler.sweep import sweep_and_record
from talktime import keys, operating, operations
from talktime.meter.state import CreditKind, RateCard, Tariff
from talktime.web.views import CHATS_MAX, LEDGER_MAX, REASON_LENGTH_MAX
from tests.api.requests import AUTH
from tests.database import Clock, connect
from tests.support import CREDIT, POLICY, S, open_service
from tests.web.server import console, field_of, page_of, text_of

if TYPE_CHECKING:
    from httpx import AsyncClient, Response
    from sqlalchemy.engine import URL

    from talktime.operations import Service

MINUTE = 60 * S
CARD = RateCard(Tariff(90 * CREDIT), 2 * S)
SCRIPT = "<script>alert(1)</script>"
SEEN = "&lt;script&gt;alert(1)&lt;/script&gt;"


async def give(service: Service, user_id: str, amount: int = 100 * CREDIT, memo: str = "", key: str = "k") -> None:
    await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=amount, memo=memo, key=key)


async def start(service: Service, user_id: str, chat_id: str = "c", advisor_id: str = "ada") -> None:
    await operations.start(service, user_id, chat_id, advisor_id=advisor_id, key=None)


def ids_in(html: str, pattern: str) -> list[str]:
    main = html[html.index("<main") :]
    return re.findall(rf'<a class="id" href="{pattern}">([^<]+)</a>', main)


# --- everybody --------------------------------------------------------------------------------------------------------


async def test_the_overview_shows_what_runs_with_readings_for_its_script(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=POLICY, card=CARD) as service, console(database_url) as client:
        for user_id in ("ann", "bob|1", "cy"):
            await give(service, user_id)
            await start(service, user_id)
            clock.tick(6 * S)
        html = page_of(await client.get("/console"))
        api = (await client.get("/v1/users/cy/chats/c", headers=AUTH)).json()
    text = text_of(html)
    assert "Running chats 2 now" in text
    assert "Credits per minute 180.00" in text
    assert "Reconciler's lag 18 s" in text
    assert ["cy", "bob|1"] == ids_in(html, r"/console/users/[^/]*")
    assert "/console/users/bob%7C1/chats/c" in html
    assert "cy c ada 0:06 paid 6.00 94.00 90.00 a minute" in text
    readings = [json.loads(unescape(one)) for one in re.findall(r'data-reading="([^"]*)"', html)]
    assert ["cy", "bob|1"] == [reading["user_id"] for reading in readings]
    assert api == readings[0]
    assert f'data-server-time="{api["server_time"]}"' in html


async def test_free_time_is_shown_with_what_is_left_of_it(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, card=RateCard(Tariff(CREDIT), 725 * S)) as service:
        await start(service, "ann")
        clock.tick(5 * S)
        async with console(database_url) as client:
            html = page_of(await client.get("/console"))
    assert "ann c ada 0:05 free for 12:00 0.00 0.00 1.00 a minute" in text_of(html)
    assert "Credits per minute 0.00" in text_of(html)


async def test_the_plots_are_told_in_words_and_as_a_table(database_url: URL, clock: Clock) -> None:
    policy = POLICY._replace(lease_us=1000 * S, abandon_after_us=2000 * S)
    async with open_service(database_url, policy=policy, card=RateCard(Tariff(3 * CREDIT), 0)) as service:
        await give(service, "ann")
        await start(service, "ann")
        clock.tick(10 * MINUTE)
        await operations.stop(service, "ann", "c")
        clock.tick(5 * MINUTE)
        async with console(database_url) as client:
            html = page_of(await client.get("/console"))
    assert "Running chats, over the last hour: 0 now; at most 1, 6 minutes ago." in html
    assert "Credits per minute, over the last hour: 0 now; at most 3, 5 minutes ago." in html
    rows = re.findall(r'</time></th><td class="number">(\d+)</td><td class="number"><data [^>]*value="([^"]*)"', html)
    assert 60 == len(rows)
    # At the mark itself the chat has just stopped; what the minute before it cost is there.
    assert [("0", "0.000000")] * 5 == rows[:5]
    assert ("0", "3.000000") == rows[5]
    assert [("1", "3.000000")] * 9 == rows[6:15]
    assert [("1", "0.000000")] + [("0", "0.000000")] * 44 == rows[15:]


async def test_of_more_than_a_hundred_chats_the_newest_are_shown_and_it_says_so(database_url: URL) -> None:
    async with open_service(database_url, card=CARD) as service, console(database_url) as client:
        for number in range(102):
            await give(service, f"u{number:03}")
            await start(service, f"u{number:03}")
        html = page_of(await client.get("/console"))
    assert "Running chats 102 up to 10 seconds ago" in text_of(html)
    assert "These are the 100 that started last, of about 102." in text_of(html)
    assert [f"u{number:03}" for number in range(101, 1, -1)] == ids_in(html, r"/console/users/[^/]*")


async def test_users_are_found_by_the_beginning_of_their_id_and_one_in_full_leads_to_it(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        for user_id in ("ann", "ann.b", "anna|1", "bob"):
            await give(service, user_id)
        found = page_of(await client.get("/console/users", params={"q": " an "}))
        assert ["ann", "ann.b", "anna|1"] == ids_in(found, r"/console/users/[^/]*")
        assert "/console/users/anna%7C1" in found
        exact = await client.get("/console/users", params={"q": "anna|1"})
        assert (303, "/console/users/anna%7C1") == (exact.status_code, exact.headers["location"])
        assert "ann" in text_of(page_of(await client.get(exact.headers["location"])))
        for query, answer in (
            ("x", "No user's id begins with x"),
            ("", "Which user?"),
            ("ü", "No user has such an id"),
            (SCRIPT, "No user has such an id"),
        ):
            html = page_of(await client.get("/console/users", params={"q": query}))
            assert answer in text_of(html)
            assert SCRIPT not in html


async def test_of_many_users_fifty_are_shown_and_it_says_so(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        for number in range(51):
            await give(service, f"u{number:02}")
        html = page_of(await client.get("/console/users?q=u"))
    assert "the first 50; write more of the id to see others" in text_of(html)
    assert [f"u{number:02}" for number in range(50)] == ids_in(html, r"/console/users/[^/]*")


async def test_passes_are_listed_with_a_warning_when_they_have_ceased(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        assert "No pass has been recorded in the last day." in text_of(page_of(await client.get("/console/passes")))
        await operating.record_pass(
            service.database, began_at=clock.now, took_us=1_250_000, lag_us=75 * S, accounts=1234, chats=2345, failed=3
        )
        clock.tick(MINUTE)
        text = text_of(page_of(await client.get("/console/passes")))
        assert "2026-01-01 00:00:00 UTC 1.2 s 1 min 15 s 1,234 2,345 3" in text
        assert "ago" not in text
        clock.tick(65 * S)
        text = text_of(page_of(await client.get("/console/passes")))
        assert "The last pass was 2 minutes 3 seconds ago." in text


# --- one user ---------------------------------------------------------------------------------------------------------


async def test_a_users_page_shows_balance_accrued_and_how_long_the_credits_last(
    database_url: URL, clock: Clock
) -> None:
    async with open_service(database_url, card=CARD) as service, console(database_url) as client:
        await give(service, "ann", 1234 * CREDIT + 567_890, memo="order 4711")
        await start(service, "ann", "first")
        clock.tick(10 * S)
        await operations.pause(service, "ann", "first")
        await start(service, "ann", "second", "bea")
        clock.tick(4 * S)
        text = text_of(page_of(await client.get("/console/users/ann")))
        html = page_of(await client.get("/console/users/ann"))
    assert "Balance now 1,219.56" in text
    assert "Not yet in the ledger 3.00 cost so far of 1 running chat" in text
    assert "Credits last 13 minutes 33 seconds until 2026-01-01 00:13:47 UTC" in text
    assert "second bea 0:04 paid 3.00" in text
    assert "2 2026-01-01 00:00:10 UTC Charge for first -12.00 1,222.56789" in text
    assert "1 2026-01-01 00:00:00 UTC Purchase order 4711 +1,234.56789 1,234.56789" in text
    assert "first ada paused 2026-01-01 00:00:00 UTC 0:10 12.00" in text
    assert 'value="1219.567890" title="1219.567890"' in html
    assert '<time datetime="2026-01-01T00:00:10.000000Z">2026-01-01 00:00:10 UTC</time>' in html


async def test_chats_and_ledger_are_paged_apart_from_each_other(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        for number in range(LEDGER_MAX + 2):
            clock.tick(S)
            await give(service, "ann", (number + 1) * CREDIT, key=f"k{number}")
            await start(service, "ann", f"c{number:02}", f"a{number}")
            await operations.stop(service, "ann", f"c{number:02}")
        first = page_of(await client.get("/console/users/ann"))
        assert LEDGER_MAX == CHATS_MAX
        assert [f"c{number:02}" for number in range(LEDGER_MAX + 1, 1, -1)] == chats_in(first)
        assert [f"{number:.2f}" for number in range(LEDGER_MAX + 2, 2, -1)] == amounts_in(first)
        older = {
            name: unescape(re.findall(rf'href="(/console/users/ann\?{name}=[^"#]*)#', first)[0])
            for name in ("chats", "ledger")
        }
        chats = page_of(await client.get(older["chats"]))
        assert (["c01", "c00"], amounts_in(first)) == (chats_in(chats), amounts_in(chats))
        ledger = page_of(await client.get(older["ledger"]))
        assert (chats_in(first), ["2.00", "1.00"]) == (chats_in(ledger), amounts_in(ledger))
        assert "Older" in text_of(ledger)  # of the chats
        assert "Newest" in text_of(ledger)


def chats_in(html: str) -> list[str]:
    return re.findall(r'<th [^>]*><a class="id" href="[^"]*/chats/[^"]*">([^<]+)</a></th>', html)


def amounts_in(html: str) -> list[str]:
    return re.findall(r">\+([\d.,]+)<", html)


async def test_a_receipt_says_why_each_stretch_ended_and_adds_up(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, card=CARD) as service, console(database_url) as client:
        await give(service, "ann", 30 * CREDIT)
        await start(service, "ann")
        clock.tick(5 * S)
        await operations.pause(service, "ann", "c")
        await start(service, "ann")
        clock.tick(4 * S)
        await start(service, "ann", "d")
        await start(service, "ann")
        clock.tick(14 * S)
        before = text_of(page_of(await client.get("/console/users/ann/chats/c")))
        await sweep_and_record(service.database, asyncio.Event())
        after = text_of(page_of(await client.get("/console/users/ann/chats/c")))
    assert before == after
    assert "c 0:22 exhausted The credits ran out: 2026-01-01 00:00:22 UTC." in after
    assert "00:00:00 UTC 2026-01-01 00:00:05 UTC Paused 0:02 0:03 4.50" in after
    assert "00:00:05 UTC 2026-01-01 00:00:09 UTC Another chat was started 0:00 0:04 6.00" in after
    assert "00:00:09 UTC 2026-01-01 00:00:22 UTC The credits ran out 0:00 0:13 19.50" in after
    assert "All of the chat: 22 seconds 0:02 0:20 30.00" in after


async def test_a_lapsed_stretch_and_the_totals_are_in_words(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, card=CARD) as service, console(database_url) as client:
        await give(service, "ann", 1000 * CREDIT)
        await start(service, "ann")
        clock.tick(20 * S)
        await start(service, "ann")
        clock.tick(10 * S)
        text = text_of(page_of(await client.get("/console/users/ann/chats/c")))
        await operations.stop(service, "ann", "c")
        ended = text_of(page_of(await client.get("/console/users/ann/chats/c")))
    assert "Chat of ann with ada c 0:25 running paid" in text
    assert "No heartbeat came, so the clock stopped by itself 0:02 0:13 19.50" in text
    assert "running It runs 0:00 0:10 15.00 All of the chat: 25 seconds 0:02 0:23 34.50" in text
    assert "0:25 ended Ended: 2026-01-01 00:00:30 UTC." in ended


# --- crediting --------------------------------------------------------------------------------------------------------


async def send(client: AsyncClient, html: str, user_id: str = "ann", **fields: str) -> Response:
    form = {name: field_of(html, name) for name in ("csrf", "key")}
    form |= {"kind": "compensation", "amount": "3.5", "reason": "the line dropped"}
    return await client.post(f"/console/users/{user_id}/credits", data=form | fields)


async def test_a_credit_is_booked_once_however_often_its_form_is_sent(database_url: URL) -> None:
    async with open_service(database_url) as service:
        await give(service, "ann", 10 * CREDIT)
        key = await keys.new_key(service.database, "support-anna")
        async with console(database_url, key=key) as client:
            html = page_of(await client.get("/console/users/ann"))
            answers = [await send(client, html) for _ in range(2)]
            assert [(303, "/console/users/ann?credited=2")] * 2 == [
                (answer.status_code, answer.headers["location"]) for answer in answers
            ]
            text = text_of(page_of(await client.get(answers[0].headers["location"])))
            again = page_of(await client.get("/console/users/ann"))
            assert field_of(html, "key") != field_of(again, "key")
    assert "Booked: Compensation of +3.50 credits, entry 2 of the ledger." in text
    assert "Balance now 13.50" in text
    with connect(database_url) as connection:
        rows = connection.execute("SELECT kind, amount, memo FROM ledger_entry WHERE number > 1").fetchall()
    assert [("compensation", 3_500_000, "by support-anna: the line dropped")] == rows


async def test_a_form_that_was_changed_after_it_was_booked_is_not_booked_again(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, "ann", 10 * CREDIT)
        html = page_of(await client.get("/console/users/ann"))
        await send(client, html)
        other = page_of(await send(client, html, amount="4"), 409)
        assert "This form was sent before, with something else in it, and that was booked." in text_of(other)
        assert "Balance now 13.50" in text_of(other)
        assert 'name="amount" value="4"' in other
        assert field_of(html, "key") != field_of(other, "key")
        assert 303 == (await send(client, other, amount="4")).status_code
        assert "Balance now 17.50" in text_of(page_of(await client.get("/console/users/ann")))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": ""}, "Choose what kind of credit this is."),
        ({"kind": "charge"}, "Choose what kind of credit this is."),
        ({"amount": ""}, "Say how many credits."),
        ({"amount": "0"}, "The amount must be more than 0."),
        ({"amount": "-1"}, "The amount must be more than 0."),
        ({"amount": "1,5"}, "The amount must be a plain decimal number"),
        ({"amount": "1e3"}, "The amount must be a plain decimal number"),
        ({"amount": "1.2345678"}, "The amount must not have more than 6 decimals."),
        ({"amount": "9999999999"}, "The amount must be at most 1000000000.000000."),
        ({"reason": "  "}, "Say why; it is kept in the ledger."),
        ({"reason": "x" * (REASON_LENGTH_MAX + 1)}, "The reason must be at most 400 characters."),
        ({"reason": "a\x00b"}, "The reason must not hold control characters."),
        ({"key": ""}, "Something of this form was lost."),
        ({"key": "order-1"}, "Something of this form was lost."),
    ],
)
async def test_wrong_input_is_told_beside_what_was_typed_and_books_nothing(
    database_url: URL, fields: dict[str, str], told: str
) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, "ann", 10 * CREDIT)
        html = page_of(await client.get("/console/users/ann"))
        again = page_of(await send(client, html, **{"amount": "7", "reason": 'because "this"', **fields}), 422)
        assert told in text_of(again)
        if "amount" not in fields:
            assert 'name="amount" value="7"' in again
        if "reason" not in fields:
            assert "because &#34;this&#34;</textarea>" in again
        if "kind" not in fields:
            assert '<option value="compensation" selected>' in again
        assert "Balance now 10.00" in text_of(again)
        # Put right, it is booked.
        assert 303 == (await send(client, again)).status_code


async def test_taking_more_than_there_is_is_told_plainly(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, "ann", 10 * CREDIT)
        html = page_of(await client.get("/console/users/ann"))
        short = page_of(await send(client, html, kind="refund", amount="10.000001"), 409)
        assert "Nothing was booked: the balance is 10.000000." in text_of(short)
        taken = await send(client, short, kind="refund", amount="10")
        assert "Booked: Refund of -10.00 credits" in text_of(page_of(await client.get(taken.headers["location"])))


async def test_crediting_makes_no_account_out_of_a_slip_of_the_pen(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, "ann")
        html = page_of(await client.get("/console/users/ann"))
        page_of(await send(client, html, "anm"), 404)
        assert (["ann"], False) == await operating.find_users(service.database, "a", limit=9)


async def test_a_notice_is_only_of_an_entry_that_is_there(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, "ann")
        for number in ("2", SCRIPT, "01"):
            html = page_of(await client.get("/console/users/ann", params={"credited": number}))
            assert "Booked" not in html
            assert SCRIPT not in html


async def test_what_people_write_is_shown_and_never_runs(database_url: URL) -> None:
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, "ann", memo=SCRIPT)
        html = page_of(await client.get("/console/users/ann"))
        assert SEEN in html
        assert SCRIPT not in html
        wrong = page_of(await send(client, html, reason=f"</textarea>{SCRIPT}", amount=f'">{SCRIPT}', kind=SCRIPT), 422)
        assert SCRIPT not in wrong
        assert "&lt;/textarea&gt;" in wrong
        right = await send(client, html, reason=SCRIPT)
        assert SCRIPT not in page_of(await client.get(right.headers["location"]))


async def test_ids_with_all_their_signs_work_in_addresses(database_url: URL) -> None:
    user_id, chat_id = "a|b=c+d@e~f:g.h-i_j", "|=+@~:."
    async with open_service(database_url) as service, console(database_url) as client:
        await give(service, user_id)
        await start(service, user_id, chat_id)
        html = page_of(await client.get("/console"))
        [user_url] = set(re.findall(r'href="(/console/users/[^/"]*)"', html))
        [chat_url] = set(re.findall(r'href="(/console/users/[^/"]*/chats/[^/"]*)"', html))
        assert user_id in text_of(page_of(await client.get(user_url)))
        assert chat_id in text_of(page_of(await client.get(chat_url)))
        page = page_of(await client.get(user_url))
        [action] = re.findall(r'action="([^"]*/credits)"', page)
        assert 303 == (await send(client, page, action.split("/")[3])).status_code
