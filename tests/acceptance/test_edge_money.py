"""Edge cases of balances, blocks and several chats on one balance, with figures worked out by hand.

At 60 credits a minute a microsecond costs a micro-credit, and a second a credit. Instants are in microseconds since the
begin. `told` ends each test with a clean audit and a pass that changes nothing that is read.
"""

from __future__ import annotations

from sqlalchemy.engine import URL

from tests.acceptance.edges import told
from tests.database import Clock
from tests.support import S

FIGURES = ("state", "elapsed_us", "credits_used", "balance")
STOPPED = ("state", "stopped_at", "stop_reason")
BESIDE = ("state", "elapsed_us", "free_used_us", "credits_used")
MINUTE = 60 * S


# --- a balance of zero ------------------------------------------------------------------------------------------------


async def test_with_a_balance_of_zero_runs_what_is_free_or_costs_nothing_and_nothing_else(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60", "paid")
        await story.card("60", "free-first", free_us=1)
        await story.card("0", "costs-nothing", first_us=MINUTE, increment_us=MINUTE)
        for advisor_id in ("paid", "free-first", "costs-nothing"):
            await story.start(advisor_id, advisor_id=advisor_id)
        assert ("exhausted", 0, "0.000000", "0.000000") == await story.read("paid", *FIGURES)
        assert [] == await story.segments("paid")
        assert ("running", 1, 1) == await story.read("free-first", "state", "accrues_until", "exhausts_at")
        story.at(1)
        assert ("exhausted", 1, "exhausted") == await story.read("free-first", *STOPPED)
        assert ("running", 10 * S, None) == await story.read("costs-nothing", "state", "accrues_until", "exhausts_at")
        story.at(10 * S)
        assert ("lapsed", 10 * S, "0.000000", "0.000000") == await story.read("costs-nothing", *FIGURES)
        assert [] == await story.ledger()


async def test_where_lease_and_balance_end_at_one_instant_the_chat_is_lapsed_and_its_heartbeat_exhausts_it(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.buy("10")
        await story.start()
        story.at(10 * S)
        assert ("lapsed", 10 * S, "10.000000", "0.000000") == await story.read("c1", *FIGURES)
        story.at(11 * S)
        assert ("exhausted", 10 * S, "10.000000", "0.000000") == story.shown(await story.beat(), *FIGURES)
        assert [(0, 10 * S, "lapsed", 0, 10 * S, "10.000000")] == await story.segments()


async def test_a_block_that_is_paid_runs_to_its_end_on_a_balance_of_zero_after_a_pause_too(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("1", first_us=MINUTE, increment_us=MINUTE)
        await story.buy("1")
        assert (60 * S,) == story.shown(await story.start(), "exhausts_at")
        story.at(1)
        assert ("running", 1, "1.000000", "0.000000") == await story.read("c1", *FIGURES)
        await story.beat_from(9 * S, 30 * S, 9 * S)
        story.at(30 * S)
        await story.pause()
        story.at(500 * S)
        assert ("running", 510 * S, 530 * S) == story.shown(
            await story.start(), "state", "accrues_until", "exhausts_at"
        )
        await story.beat_from(509 * S, 530 * S, 9 * S)
        story.at(530 * S - 1)
        assert ("running", 60 * S - 1, "1.000000", "0.000000") == await story.read("c1", *FIGURES)
        story.at(530 * S)
        assert ("exhausted", 60 * S, "1.000000", "0.000000") == await story.read("c1", *FIGURES)
        assert ["1.000000", "0.000000"] == [row[-1] for row in await story.segments()]


# --- blocks -----------------------------------------------------------------------------------------------------------

# At one credit a minute: first block and increment in microseconds, then what has been used after that paid time.
BLOCKS = {
    "60-60": (MINUTE, MINUTE, {1: "1.000000", MINUTE: "1.000000", MINUTE + 1: "2.000000", 120 * S + 1: "3.000000"}),
    "60-6": (
        *(MINUTE, 6 * S),
        {1: "1.000000", MINUTE: "1.000000", MINUTE + 1: "1.100000", 66 * S: "1.100000", 66 * S + 1: "1.200000"},
    ),
    # A second is 16,666.67 micro-credits, rounded up once: two are 33,334, three an even 50,000.
    "1-1": (
        *(S, S),
        {1: "0.016667", S: "0.016667", S + 1: "0.033334", 2 * S + 1: "0.050000", MINUTE: "1.000000"},
    ),
    "30-exact": (30 * S, 0, {1: "0.500000", 30 * S: "0.500000", 30 * S + 1: "0.500001", 30 * S + 61: "0.500002"}),
    "exact": (0, 0, {1: "0.000001", 60: "0.000001", 61: "0.000002", MINUTE: "1.000000", MINUTE + 1: "1.000001"}),
    "0-6": (0, 6 * S, {1: "0.100000", 6 * S: "0.100000", 6 * S + 1: "0.200000"}),
}


async def test_a_block_lasts_to_its_edge_and_a_microsecond_more_is_the_next(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock, lease_us=200 * S, abandon_us=300 * S) as story:
        for name, (first_us, increment_us, _) in BLOCKS.items():
            await story.card("1", name, first_us=first_us, increment_us=increment_us)
            await story.buy("3", user_id=name)
            await story.start(user_id=name, advisor_id=name)
            assert ("0.000000", "3.000000") == await story.read("c1", "credits_used", "balance", user_id=name)
        for us in sorted({us for _, _, used in BLOCKS.values() for us in used}):
            story.at(us)
            for name, (_, _, used) in BLOCKS.items():
                if us in used:
                    assert (used[us],) == await story.read("c1", "credits_used", user_id=name), (name, us)


async def test_a_pause_and_a_lapse_within_a_block_buy_no_second_block(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock) as story:
        await story.card("1", free_us=5 * S, first_us=MINUTE, increment_us=6 * S)
        await story.buy("3")
        await story.start()
        story.at(8 * S)  # 3 s of it paid
        await story.pause()
        story.at(20 * S)
        await story.start()  # until 30, lapsed: 13 s
        story.at(50 * S)
        await story.beat()
        await story.beat_from(59 * S, 97 * S, 9 * S)
        story.at(97 * S)  # another 47 s: exactly a block
        assert ("running", 65 * S, "1.000000", "2.000000") == await story.read("c1", *FIGURES)
        story.at(97 * S + 1)
        assert ("paused", 65 * S + 1, "1.100000", "1.900000") == story.shown(await story.pause(), *FIGURES)
        assert [(5 * S, 3 * S, "1.000000"), (0, 10 * S, "0.000000"), (0, 47 * S + 1, "0.100000")] == [
            row[3:] for row in await story.segments()
        ]
        assert ["3.000000", "-1.000000", "-0.100000"] == await story.amounts()


# --- several chats, one balance ---------------------------------------------------------------------------------------


async def test_chats_with_different_advisors_exhaust_one_balance_in_order_of_seniority(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.card("60", "a2")
        await story.buy("0.00001")
        await story.start("z", advisor_id="a1")
        story.at(3)
        # Seven are left; from here each tick takes two, and of the last one the senior chat lives a tick longer.
        junior = await story.start("c", advisor_id="a2")
        assert (6, 6) == story.shown(junior, "accrues_until", "exhausts_at")
        assert (7, 7) == await story.read("z", "accrues_until", "exhausts_at")
        story.at(6)
        assert ("exhausted", 3, 0, "0.000003") == await story.read("c", *BESIDE)
        assert ("running", 6, 0, "0.000006") == await story.read("z", *BESIDE)
        story.at(1 * S)
        assert ("exhausted", 7, "exhausted") == await story.read("z", *STOPPED)
        assert ("exhausted", 6, "exhausted") == await story.read("c", *STOPPED)
        assert "0.000000" == (await story.account())["balance"]


async def test_of_chats_that_began_at_one_instant_the_one_with_the_lesser_id_pays_first(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.card("60", "a2")
        await story.buy("0.000005")
        await story.start("c2", advisor_id="a1")
        await story.start("c1", advisor_id="a2")
        story.at(1 * S)
        assert ("exhausted", 3, 0, "0.000003") == await story.read("c1", *BESIDE)
        assert ("exhausted", 2, 0, "0.000002") == await story.read("c2", *BESIDE)


async def test_in_scope_none_chats_share_one_allowance_and_exhaust_one_balance(database_url: URL, clock: Clock) -> None:
    async with told(database_url, clock, scope="none") as story:
        await story.card("60", free_us=11)
        await story.buy("0.000004")
        await story.start("c1")
        await story.start("c2")
        # Five ticks each and the senior's sixth are free; c2 pays from 5, c1 from 6; the last micro-credit is c1's.
        assert ("running", 7, 5) == await story.read("c2", "state", "accrues_until", "paid_from")
        assert ("running", 8, 6) == await story.read("c1", "state", "accrues_until", "paid_from")
        story.at(6)
        assert ("running", 6, 6, "0.000000") == await story.read("c1", *BESIDE)
        assert ("running", 6, 5, "0.000001") == await story.read("c2", *BESIDE)
        story.at(9)
        assert ("exhausted", 8, 6, "0.000002") == await story.read("c1", *BESIDE)
        assert ("exhausted", 7, 5, "0.000002") == await story.read("c2", *BESIDE)
        assert (0, "0.000000") == await story.read("c1", "free_left_us", "balance")


async def test_a_junior_chat_whose_block_is_too_dear_is_exhausted_and_a_cheaper_senior_runs_on(
    database_url: URL, clock: Clock
) -> None:
    async with told(database_url, clock) as story:
        await story.card("60")
        await story.card("3", "a2", first_us=4 * S, increment_us=2 * S)  # 0.2 at once, then 0.1 for each two seconds
        await story.buy("7.25")
        await story.start("c1")
        await story.start("c2", advisor_id="a2")
        # c2 takes 0.2 at 0 and 0.1 each at 4 and at 6, where c1 has taken 6; 0.85 are left, and c1 takes them alone.
        story.at(6_850_000)
        assert ("exhausted", 6_850_000, 0, "6.850000") == await story.read("c1", *BESIDE)
        assert ("running", 6_850_000, 0, "0.400000") == await story.read("c2", *BESIDE)
        # Its block is paid, so it runs on to the end of it.
        story.at(8 * S)
        assert ("exhausted", 8 * S, 0, "0.400000") == await story.read("c2", *BESIDE)
        assert "0.000000" == (await story.account())["balance"]
