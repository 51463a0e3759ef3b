"""The vectors that the Python core and the JavaScript client share, and the program that writes them.

Each case is a history of one user, played through the real commands; one chat's reading at the end of it, exactly as
the API sends it; and what `show` makes of that reading at instants on both sides of everything that can happen next.
``uv run python -m tests.vectors`` rewrites the file; `tests.meter.test_vectors` holds it against the reference.

Most histories are told in units: at a microsecond each, the tests' reference can live through them tick by tick; at
375 milliseconds each, the lease of 40 units is the 15 seconds of a real service.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from typing import Final

from talktime.api.schemas import JsonResponse, format_instant, reading_body
from talktime.errors import TalktimeError
from talktime.meter import commands
from talktime.meter.advance import advance
from talktime.meter.reading import Reading, read, show
from talktime.meter.state import Account, CreditKind, Policy, RateCard, Scope, Tariff
from talktime.meter.units import END_OF_TIME_US, MAX_AMOUNT, MAX_BALANCE, MAX_RATE, MICRO, format_credits
from tests.meter.histories import BLOCKS, CHATS, RATES, SCOPES, Card, Settings, Step

FILE: Final = Path(__file__).parent.parent / "src" / "talktime" / "web" / "client" / "test" / "vectors.json"
DESCRIPTION: Final = (
    "Readings as the API sends them, and what is shown of each at other instants; rewritten by python -m tests.vectors."
)

S: Final = 1_000_000
HOUR: Final = 3_600 * S
DAY: Final = 24 * HOUR
BASE_US: Final = (datetime(2026, 11, 20, 19, 46, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
    microseconds=1
)
"""When every history begins."""

TICK: Final = 1
REAL: Final = 375_000
LEASE: Final = 40
ABANDON: Final = 800
"""In units, as all numbers in `_situations`: 15 and 300 seconds where a unit is `REAL`."""

Timeline = tuple[tuple[int, Step], ...]
"""What happens, and when: microseconds after `BASE_US`. The last entry is when the chat is read."""

NOW: Final = Step(0, "wait")


@dataclass(frozen=True, slots=True)
class Case:
    """A history of one user, and the chat that is read at its end."""

    name: str
    settings: Settings
    card: Card
    steps: tuple[Step, ...]
    chat_id: str
    heartbeat_us: int = 5 * S

    def play(self) -> tuple[Account, int]:
        """Return the account after the history, as it would be stored, and the instant of the reading."""
        now = BASE_US
        account = Account(user_id="u", at=now)
        cards = dict.fromkeys(CHATS.values(), self.card)
        for step in self.steps:
            now += step.wait_us
            if step.card is not None:
                cards[CHATS[step.chat_id]] = step.card
            with suppress(TalktimeError):  # random histories try what is refused, and nothing comes of it
                account = _after(account, now, step, self.settings, cards)
        return account, now

    def read(self) -> Reading:
        """Return the chat's reading at the end of the history."""
        account, now = self.play()
        return read(account, self.chat_id, now)


def _after(account: Account, now: int, step: Step, settings: Settings, cards: dict[str, Card]) -> Account:
    policy = Policy(Scope(settings.scope), settings.lease_us, settings.abandon_after_us)
    chat_id = step.chat_id
    match step.what:
        case "start":
            advisor_id = CHATS[chat_id]
            card = RateCard(_tariff(cards[advisor_id]), cards[advisor_id].free_us)
            account = commands.start(
                account, now, chat_id=chat_id, advisor_id=advisor_id, card=card, policy=policy, key=step.key
            )
        case "heartbeat":
            account = commands.heartbeat(account, now, chat_id=chat_id, policy=policy)
        case "pause":
            account = commands.pause(account, now, chat_id=chat_id, policy=policy)
        case "stop":
            account = commands.stop(account, now, chat_id=chat_id)
        case "credit":
            account = commands.credit(account, now, kind=CreditKind(step.kind), amount=step.amount, memo="", key="k")
        case "materialize":
            account = advance(account, max(now, account.at))
    return account


def _tariff(card: Card) -> Tariff:
    return Tariff(card.rate, card.first_us, card.increment_us)


def _do(what: str, chat_id: str = "a") -> Step:
    return Step(0, what, chat_id)


def _buy(amount: int, kind: str = "purchase") -> Step:
    # There is no credit of nothing: where time costs nothing, nothing is bought.
    return Step(0, "credit", kind=kind, amount=amount) if amount > 0 else NOW


def _steps(timeline: Timeline) -> tuple[Step, ...]:
    now, steps = 0, []
    for at, step in timeline:
        steps.append(replace(step, wait_us=at - now))
        now = at
    return tuple(steps)


# The tariffs: rate in micro-credits per minute, first block and increment in microseconds.
TARIFFS: Final = (
    (0, 0, 0),
    (0, 60 * S, 60 * S),
    (1, 0, 0),
    (1_500_000, 0, 0),
    (60_000_000, 0, 0),
    (12_000_000, 60 * S, 60 * S),
    (12_000_000, 60 * S, 6 * S),
    (1_990_000, 1 * S, 1 * S),
    (7_000_000, 30 * S, 0),
    (2_500_000, S // 2, S // 4),
    (MAX_RATE, 0, 0),
    (999_999_999_999, 86_400 * S, 86_400 * S),
)
# Blocks of microseconds, so that the reference passes several of their edges within a lease.
TINY_BLOCKS: Final = ((90_000_001, 5, 3), (600_000_000, 10, 10), (7_000_000, 7, 0), (60_000_000, 0, 4), (1, 1, 1))


def _situations(rate: int, first_us: int, increment_us: int, u: int) -> Iterator[tuple[str, int, str, str, Timeline]]:
    """Yield a name, the free units, the scope, the chat that is read, and what happens."""
    cost = Tariff(rate, first_us, increment_us).cost
    rich = (0, _buy(cost(1_000 * u)))
    begin = (0, _do("start"))
    yield "free time that outlasts the lease", 1_000, "advisor", "a", (rich, begin, (5 * u, NOW))
    yield "free time that ends within the lease", 13, "advisor", "a", (rich, begin, (5 * u, NOW))
    yield "free time that ends with the lease", LEASE, "advisor", "a", (rich, begin, (5 * u, NOW))
    yield "paid from the first tick, read at once", 0, "advisor", "a", (rich, begin, (0, NOW))
    yield "paid since the free time ended", 3, "advisor", "a", (rich, begin, (7 * u + 1, NOW))
    yield (
        "beats renewed the lease",
        3,
        "advisor",
        "a",
        ((rich, begin, (30 * u, _do("heartbeat")), (61 * u, _do("heartbeat")), (70 * u, NOW))),
    )
    yield (
        "a second segment in one count",
        2,
        "advisor",
        "a",
        ((rich, begin, (11 * u + 3, _do("pause")), (30 * u, _do("start")), (36 * u, NOW))),
    )
    if rate > 0:
        yield (
            "credits that run out within the lease",
            0,
            "advisor",
            "a",
            (((0, _buy(cost(17 * u))), begin, (7 * u, NOW))),
        )
        yield (
            "free time, then credits end within the lease",
            9,
            "advisor",
            "a",
            (((0, _buy(cost(11 * u))), begin, (4 * u, NOW))),
        )
        yield "free time, and a balance of zero after it", 12, "advisor", "a", (begin, (4 * u, NOW))
        yield (
            "credits that last to the end of the lease",
            0,
            "advisor",
            "a",
            (((0, _buy(cost(LEASE * u))), begin, (3 * u, NOW))),
        )


def _more_situations(
    rate: int, first_us: int, increment_us: int, u: int
) -> Iterator[tuple[str, int, str, str, Timeline]]:
    """Yield what depends less on the tariff: other states, other commands, other chats."""
    cost = Tariff(rate, first_us, increment_us).cost
    rich = (0, _buy(cost(1_000 * u)))
    begin = (0, _do("start"))
    dearer = Step(0, "card", "a", card=Card(2 * rate + 7, increment_us, first_us, 5 * u))
    yield "resumed by a beat after a lapse", 2, "advisor", "a", (rich, begin, (60 * u, _do("heartbeat")), (66 * u, NOW))
    yield (
        "a changed tariff",
        4,
        "advisor",
        "a",
        ((rich, begin, (9 * u, _do("pause")), (9 * u, dearer), (12 * u, _do("start")), (15 * u, NOW))),
    )
    yield "a clock that stepped back", 30, "advisor", "a", (rich, begin, (20 * u, _do("materialize")), (12 * u, NOW))
    yield "a clock that stepped back before the start", 3, "advisor", "a", (rich, begin, (-9 * u, NOW))
    yield "materialized a while ago", 3, "advisor", "a", (rich, begin, (9 * u, _do("materialize")), (12 * u, NOW))
    yield (
        "ended and started again",
        3,
        "advisor",
        "a",
        ((rich, begin, (9 * u, _do("stop")), (12 * u, _do("start")), (15 * u, NOW))),
    )
    yield (
        "credits come while it runs",
        0,
        "advisor",
        "a",
        (((0, _buy(cost(17 * u))), begin, (5 * u, _buy(cost(9 * u), "grant")), (9 * u, NOW))),
    )
    yield (
        "credits taken back while it runs",
        0,
        "advisor",
        "a",
        (((0, _buy(cost(30 * u))), begin, (5 * u, _buy(cost(30 * u) - cost(5 * u), "refund")), (9 * u, NOW))),
    )
    yield "lapsed", 3, "advisor", "a", (rich, begin, (55 * u, NOW))
    yield "paused", 3, "advisor", "a", (rich, begin, (9 * u, _do("pause")), (12 * u, NOW))
    yield "exhausted", 3, "advisor", "a", ((0, _buy(cost(17 * u))), begin, (33 * u, NOW))
    yield "abandoned", 3, "advisor", "a", (rich, begin, (900 * u, NOW))
    yield "ended", 3, "advisor", "a", (rich, begin, (9 * u, _do("stop")), (12 * u, NOW))
    yield "ended, and the clock stepped back", 3, "advisor", "a", (rich, begin, (9 * u, _do("stop")), (2 * u, NOW))
    yield "a refused start", 0, "advisor", "a", (begin, (2 * u, NOW))
    yield "a refused second start", 3, "advisor", "a", (begin, (9 * u, _do("start")), (12 * u, NOW))
    shared = (rich, begin, (4 * u, _do("start", "b")), (7 * u, NOW))
    yield "the senior of two on one allowance", 31, "none", "a", shared
    yield "the junior of two on one allowance", 31, "none", "b", shared
    uneven = (rich, begin, (4 * u, _do("start", "b")), (9 * u, _do("start", "d")), (12 * u, NOW))
    yield "the second of three on one allowance", 34, "none", "b", uneven
    yield "the third of three on one allowance", 34, "none", "d", uneven
    at_odds = (*uneven[:-1], (15 * u, NOW))
    yield "the third of three, when the allowance has too little for all", 34, "none", "d", at_odds
    one_balance = ((0, _buy(cost(26 * u) + cost(24 * u))), begin, (2 * u, _do("start", "c")), (5 * u, NOW))
    yield "the senior of two on one balance", 0, "none", "a", one_balance
    yield "the junior of two on one balance", 0, "none", "c", one_balance
    yield (
        "one of two whose leases end apart",
        3,
        "none",
        "a",
        ((rich, begin, (9 * u, _do("start", "c")), (33 * u, _do("heartbeat", "c")), (35 * u, NOW))),
    )
    switched = (rich, begin, (5 * u, _do("start", "c")), (11 * u, NOW))
    yield "switched away from", 3, "user", "a", switched
    yield "switched to", 9, "user", "c", switched
    yield "the rest of an allowance", 25, "user", "b", (rich, begin, (12 * u, _do("start", "b")), (15 * u, NOW))


def _systematic(tariffs: tuple[tuple[int, int, int], ...], u: int, *, more: bool) -> Iterator[Case]:
    for rate, first_us, increment_us in tariffs:
        situations = _more_situations if more else _situations
        for name, free, scope, chat_id, timeline in situations(rate, first_us, increment_us, u):
            card = Card(rate, first_us, increment_us, free * u)
            full_name = f"{name}, at {_words(card)}, a lease of {LEASE * u} us"
            yield Case(full_name, Settings(scope, LEASE * u, ABANDON * u), card, _steps(timeline), chat_id)


def _words(card: Card) -> str:
    return f"{format_credits(card.rate)} a minute by {card.first_us}/{card.increment_us} us"


def _narrow() -> Iterator[Case]:
    """Yield readings some microseconds before something happens on the scale of minutes."""
    settings = Settings("advisor", 15 * S, 300 * S)
    for rate, first_us, increment_us in TARIFFS[3:]:
        edge = 30 * S if first_us == 30 * S else 66 * S if increment_us == 6 * S else 60 * S
        cost = Tariff(rate, first_us, increment_us).cost
        # The last beat lets the lease end 30 us after the edge.
        beats = tuple((at, _do("heartbeat")) for at in range((edge + 30) % (15 * S), edge, 15 * S))
        for name, free_us, amount in (
            ("one minute of paid time, or the edge of a block", 0, cost(10 * edge)),
            ("credits that end with a block or a minute", 0, cost(edge)),
            ("free time that ends", edge, cost(10 * edge)),
            ("free time that ends, and few credits", edge, cost(11)),
        ):
            card = Card(rate, first_us, increment_us, free_us)
            timeline = ((0, _buy(amount)), (0, _do("start")), *beats, (edge - 20, NOW))
            yield Case(f"20 us before: {name}, at {_words(card)}", settings, card, _steps(timeline), "a")


def _large() -> Iterator[Case]:
    """Yield figures beyond 2^53, and instants far away."""
    days = Settings("advisor", 8 * DAY, 9 * DAY)
    # Of the largest purchases: 2 * 10^16 micro-credits.
    rich = ((0, _buy(MAX_AMOUNT)),) * 20
    for rate in (MAX_RATE, MAX_RATE - 1, 987_654_321_987):
        card = Card(rate, 0, 0, 0)
        run = (*rich, (0, _do("start")))
        yield Case(f"a week at {_words(card)}", days, card, _steps((*run, (7 * DAY + 1, NOW))), "a")
        yield Case(f"almost eight days at {_words(card)}", days, card, _steps((*run, (8 * DAY - 60, NOW))), "a")
        yield Case(f"long ago at {_words(card)}", days, card, _steps((*run, (8 * DAY + 60, NOW))), "a")
    ticks = Settings("advisor", LEASE, ABANDON)
    card = Card(MAX_RATE, 86_400 * S, 86_400 * S, 0)
    timeline: Timeline = rich
    for n in range(9):
        # Each start at another tariff begins a new count, and so buys another day.
        dearer = Step(0, "card", "a", card=replace(card, rate=MAX_RATE - n))
        timeline = (*timeline, (10 * n, dearer), (10 * n, _do("start")), (10 * n + 5, _do("pause")))
        if n % 2 == 0:
            name = f"{n + 1} days bought in as many counts"
            yield Case(name, ticks, card, _steps((*timeline[:-1], (10 * n + 5, NOW))), "a")
    real = Settings("advisor", 15 * S, 300 * S)
    begin = ((0, _do("start")), (10 * S + 123_456, NOW))
    for rate, amount in ((1_000_000, MAX_BALANCE), (1_000_000, 3 * MAX_AMOUNT), (1, 1_400 * MICRO), (MAX_RATE, 1)):
        card = Card(rate, 0, 0, 11 * S)
        name = f"{format_credits(amount)} credits, at {_words(card)}"
        yield Case(name, real, card, _steps(((0, _buy(amount)), *begin)), "a")
    card = Card(1_500_000, 0, 0, 365 * DAY)
    yield Case("a year of free time", real, card, _steps(((0, _buy(25 * MICRO)), *begin)), "a")


def _random(count: int) -> Iterator[Case]:
    for seed in range(count):
        rng = random.Random(seed)

        def card(rng: random.Random = rng) -> Card:
            return Card(rng.choice(RATES), *rng.choice(BLOCKS), rng.choice((0, 1, 5, 13, 40)))

        lease = rng.choice((20, 50, 90))
        settings = Settings(rng.choice(SCOPES), lease, lease + rng.choice((10, 60)))
        first_card = card()
        steps = [Step(0, "credit", kind="purchase", amount=rng.choice((30, 200, 2_000))), _do("start")]
        for _ in range(rng.randrange(4, 20)):
            what = rng.choice(("start", "start", "heartbeat", "heartbeat", "credit", "pause", "stop", "card", "wait"))
            wait_us = rng.choice((0, 1, 3, 7, 12, 30, -4))
            if what == "credit":
                step = Step(wait_us, what, kind=rng.choice(("purchase", "refund")), amount=rng.choice((1, 9, 200)))
            elif what == "card":
                step = Step(wait_us, what, rng.choice(sorted(CHATS)), card=card())
            else:
                step = Step(wait_us, what, rng.choice(sorted(CHATS)))
            steps.append(step)
        steps.append(Step(rng.choice((0, 2, 5, -3)), "wait"))
        case = Case(f"random history {seed}", settings, first_card, tuple(steps), "a")
        account, now = case.play()
        # A clock that runs has more to show; if several do, any.
        running = [chat_id for chat_id in sorted(account.chats) if read(account, chat_id, now).accruing]
        yield replace(case, chat_id=rng.choice(running or sorted(account.chats)))


def _cases() -> Iterator[Case]:
    heartbeats_us = cycle((5 * S, 2_500_000, 333_333, 15 * S, 1, 7_250_000))
    for case in (
        *_systematic(TARIFFS + TINY_BLOCKS, TICK, more=False),
        *_systematic((TARIFFS[3], *TINY_BLOCKS[:2]), TICK, more=True),
        *_systematic((*TARIFFS[4:10], TARIFFS[-1]), REAL, more=False),
        *_systematic((TARIFFS[6],), REAL, more=True),
        *_narrow(),
        *_large(),
        *_random(60),
    ):
        yield replace(case, heartbeat_us=next(heartbeats_us))


CASES: Final = tuple(_cases())


def _block_edges(reading: Reading) -> Iterator[int]:
    """Yield the first instants whose tick begins a new block, as far as the clock runs."""
    if reading.paid_from is None or reading.accrues_until is None:
        return
    tariff = reading.tariff
    edges_us = [tariff.first_us] if tariff.first_us > reading.count_us else []
    if tariff.increment_us > 0:
        passed = max(0, (reading.count_us - tariff.first_us) // tariff.increment_us)
        edges_us += [tariff.first_us + (passed + n) * tariff.increment_us for n in range(1, 3)]
    for edge_us in edges_us:
        at = reading.paid_from + edge_us - reading.count_us
        if at <= reading.accrues_until:
            yield at


def instants(reading: Reading, far_us: int) -> list[int]:
    """Return the instants at which a reading is shown: both sides of all boundaries, before, between, far beyond."""
    boundaries = {
        reading.as_of,
        reading.paid_from,
        reading.free_until,
        reading.accrues_until,
        reading.exhausts_at,
        reading.stopped_at,
        *_block_edges(reading),
    }
    chosen = {b + offset for b in boundaries if b is not None for offset in (-1, 0, 1)}
    chosen |= {reading.as_of - HOUR, min(reading.as_of + far_us, END_OF_TIME_US)}
    if reading.accrues_until is not None:
        chosen.add((reading.as_of + reading.accrues_until) // 2)
    return sorted(at for at in chosen if at <= END_OF_TIME_US)


def make() -> tuple[bytes, int]:
    """Return the file, one case a line, and the number of instants in it."""
    encode = JsonResponse(None).render  # as the API writes it, with exact numbers
    lines, count = [], 0
    for case, far_us in zip(CASES, cycle((DAY, 30 * 365 * DAY, END_OF_TIME_US)), strict=False):
        reading = case.read()
        shown = []
        for at in instants(reading, far_us):
            figures = show(reading, at)
            shown.append(
                {
                    "at": format_instant(at),
                    "elapsed_us": figures.elapsed_us,
                    "free_left_us": figures.free_left_us,
                    "credits_used": format_credits(figures.credits_used),
                    "balance": format_credits(figures.balance),
                }
            )
        count += len(shown)
        content = {"name": case.name, "reading": reading_body(reading, case.heartbeat_us), "shown": shown}
        lines.append(encode(content, "application/json"))
    head = b'{"description":' + encode(DESCRIPTION, "application/json") + b',"cases":[\n'
    return head + b",\n".join(lines) + b"\n]}\n", count


def main() -> None:
    """Rewrite the file."""
    content, count = make()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_bytes(content)
    sys.stdout.write(f"{len(CASES)} cases, {count} instants, {len(content)} bytes in {FILE}\n")


if __name__ == "__main__":
    main()
