"""What a running chat's row says of its credits: before that instant the clock runs as long as it beats.

Exact in microseconds, on a simulated clock that stands still unless it is moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import beats, operations
from talktime.errors import TalktimeError
from talktime.meter.advance import advance, foretell
from talktime.meter.state import Account, Allowance, Chat, ChatState, CreditKind, Policy, RateCard, Scope, Tariff
from talktime.operations import Service
from talktime.store import accounts, statements
from talktime.store.exhaustion import LATEST_US, first_exhaustion
from talktime.store.sending import text_of
from tests.database import Clock, Databases, connect, simulated_clock
from tests.driver import Parameters, watched
from tests.meter.histories import BLOCKS, CHATS, RATES, Card, Settings, Step, cards, histories, settings_in_force
from tests.store.many_chats import TINY, copy_user, start
from tests.support import FREE_OF_CHARGE, audit_lines, open_service

ONE_A_TICK = RateCard(Tariff(60_000_000), 0)
ENDS_LATE = 1 << 40

# --- the rule ---------------------------------------------------------------------------------------------------------


def running(chat_id: str, tariff: Tariff, *, advisor_id: str = "x", lease_us: int = ENDS_LATE) -> Chat:
    """A chat that runs since the instant 0."""
    return Chat(chat_id, advisor_id, ChatState.RUNNING, tariff, lease_us, ENDS_LATE + 1, 0, 0, opened_at=0)


@st.composite
def accounts_that_run(draw: st.DrawFn) -> Account:
    """Accounts in which several clocks run; some fall silent, each at its own instant."""
    chats = [
        running(
            chat_id,
            Tariff(draw(st.sampled_from(RATES)), *draw(st.sampled_from(BLOCKS))),
            advisor_id=advisor_id,
            lease_us=draw(st.one_of(st.integers(1, 60), st.just(ENDS_LATE))),
        )
        for chat_id, advisor_id in CHATS.items()
    ]
    allowances = {advisor_id: Allowance(draw(st.integers(0, 40)), 0) for advisor_id in CHATS.values()}
    balance = draw(st.integers(0, 400))
    return advance(Account("u", 0, balance, allowances, {chat.chat_id: chat for chat in chats}), 0)


@given(accounts_that_run())
def test_no_clock_stops_for_want_of_credits_before_that_instant_whichever_fall_silent(account: Account) -> None:
    exhausts_at = first_exhaustion(account)
    ran = {chat_id for chat_id, chat in account.chats.items() if chat.state is ChatState.RUNNING}
    view = advance(account, min(exhausts_at, ENDS_LATE) - 1)
    assert {view.chats[chat_id].state for chat_id in ran} <= {ChatState.RUNNING, ChatState.LAPSED}


def test_a_clock_that_is_foretold_to_go_on_for_long_may_stop_early_once_another_falls_silent() -> None:
    # The first needs 60 at 10, for its second block, the second needs 49 at 20, and the last hardly anything. If the
    # first pays, the second cannot, and what is left is the last one's for long. If it falls silent, the second can,
    # twice; and that leaves next to nothing.
    costs = {"first": Tariff(360_000_000, 0, 10), "second": Tariff(147_000_000, 0, 20), "last": Tariff(1_000_000)}
    chats = {name: running(name, tariff, advisor_id=name) for name, tariff in costs.items()}
    allowances = dict.fromkeys(costs, Allowance(0, 0))
    account = advance(Account("u", 0, 60 + 49 + 1 + 100, allowances, chats), 1)
    foretold = foretell(account, beating=True)["last"].stops_at
    silent = account.chats["first"]._replace(lease_us=9)
    truth = foretell(account._replace(chats={**account.chats, "first": silent}), beating=False)["last"].stops_at
    assert foretold is not None
    assert truth is not None
    assert truth < foretold
    assert first_exhaustion(account) <= truth


@pytest.mark.parametrize("balance", [0, 1, 2**62])
def test_what_is_never_or_far_away_is_a_date_in_every_time_zone(balance: int) -> None:
    chats = {"c": running("c", Tariff(0 if balance == 0 else 1))}
    account = Account("u", 0, balance, {"x": Allowance(0, 0)}, chats)
    assert (60_000_000 if balance == 1 else LATEST_US) == first_exhaustion(account)


# --- what is stored ---------------------------------------------------------------------------------------------------

_STORED = (
    "SELECT chat_id, (extract(epoch FROM exhausts_at) * 1000000)::bigint FROM chat"
    " WHERE user_id = %s AND (state = 'running' OR exhausts_at IS NOT NULL)"
)


def stored(url: URL, user_id: str = "u") -> dict[str, int]:
    """Return what the rows of running chats say, and those of others that say anything."""
    with connect(url) as connection:
        return dict(connection.execute(_STORED, [user_id]).fetchall())


@pytest.fixture(scope="module")
def simulated(databases: Databases) -> Iterator[tuple[URL, Clock]]:
    """A database and its clock for many histories, each of users and advisors of its own."""
    url = databases.create()
    with simulated_clock(url) as clock:
        yield url, clock
    databases.drop(url)


_numbers = count()


@given(settings_in_force.filter(lambda settings: settings.lease_us >= 20), cards, histories)
def test_whatever_happens_each_running_chats_row_says_when_credits_run_out_first(
    simulated: tuple[URL, Clock], settings: Settings, card: Card, history: list[Step]
) -> None:
    asyncio.run(_live_through(*simulated, settings, card, history))


async def _live_through(url: URL, clock: Clock, settings: Settings, card: Card, history: list[Step]) -> None:
    user_id = f"u{next(_numbers)}"
    policy = Policy(Scope(settings.scope), settings.lease_us, settings.abandon_after_us)
    async with open_service(url, policy=policy, card=_card(card)) as service:
        await _take(service, user_id, Step(0, "credit", kind="grant", amount=300), key="first")
        for number, step in enumerate(history):
            clock.tick(step.wait_us)
            try:
                await _take(service, user_id, step, key=f"{number}")
            except TalktimeError:
                continue
            loaded = await service.database.read(lambda connection: accounts.load(connection, user_id))
            if loaded is not None:
                account, _ = loaded
                assert dict.fromkeys(account.chats, first_exhaustion(account)) == stored(url, user_id)


def _card(card: Card) -> RateCard:
    return RateCard(Tariff(card.rate, card.first_us, card.increment_us), card.free_us)


async def _take(service: Service, user_id: str, step: Step, *, key: str) -> None:
    advisor_id = f"{user_id}-{CHATS.get(step.chat_id)}"
    if step.what == "credit":
        kind = CreditKind(step.kind)
        await operations.credit(service, user_id, kind=kind, amount=step.amount, memo="", key=key)
    elif step.what == "card":
        assert step.card is not None
        await operations.put_advisor(service, advisor_id, _card(step.card))
    elif step.what == "materialize":
        await sweep(service.database, asyncio.Event())
    elif step.what == "start":
        await operations.start(service, user_id, step.chat_id, advisor_id=advisor_id, key=step.key)
    elif step.what == "fast_heartbeat":
        [beaten] = await beats.heartbeats(service, [(user_id, step.chat_id)])
        if isinstance(beaten, ChatState):
            assert beaten is (await operations.read_chat(service, user_id, step.chat_id)).state
    elif step.what in ("heartbeat", "pause", "stop"):
        await getattr(operations, step.what)(service, user_id, step.chat_id)


async def test_what_makes_it_earlier_or_later_is_written_to_all_that_run(database_url: URL, clock: Clock) -> None:
    async with open_service(database_url, policy=TINY._replace(scope=Scope.NONE), card=ONE_A_TICK) as service:
        begin = clock.now

        async def credit(kind: CreditKind, amount: int) -> None:
            await operations.credit(service, "u", kind=kind, amount=amount, memo="", key=f"{kind}-{amount}")

        await credit(CreditKind.PURCHASE, 80)
        await start(service, "u", "c1")
        assert {"c1": begin + 80} == stored(database_url)
        clock.tick(10)
        await start(service, "u", "c2")
        assert dict.fromkeys(("c1", "c2"), begin + 10 + 35) == stored(database_url)
        await credit(CreditKind.GRANT, 20)
        assert dict.fromkeys(("c1", "c2"), begin + 10 + 45) == stored(database_url)
        await credit(CreditKind.REFUND, 40)
        assert dict.fromkeys(("c1", "c2"), begin + 10 + 25) == stored(database_url)
        clock.tick(5)
        await operations.pause(service, "u", "c1")
        assert {"c2": begin + 15 + 40} == stored(database_url)
        clock.set(begin + 55)
        await sweep(service.database, asyncio.Event())
        assert {} == stored(database_url)
        assert not await audit_lines(service.database)


async def test_a_pass_writes_it_where_it_is_not_known_and_nowhere_else(database_url: URL, clock: Clock) -> None:
    rows: list[str] = []

    def on_statement(_connection: object, statement: str, parameters: Parameters) -> None:
        if statement == text_of(statements.UPDATE_CHATS.statement):
            assert isinstance(parameters, dict)
            rows.append(parameters["new_user_id"])

    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        await start(service, "u")
        copy_user(database_url, "u", ["v"])
        with connect(database_url) as connection:
            connection.execute("UPDATE chat SET exhausts_at = NULL WHERE user_id = 'v'")
        with watched(on_statement):
            for _ in range(2):
                clock.tick(10)
                await sweep(service.database, asyncio.Event())
        assert ['{"v"}'] == rows
        assert {"c": LATEST_US} == stored(database_url, "u") == stored(database_url, "v")
