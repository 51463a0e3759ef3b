"""A bounded load that remembers what it sent and what it was told, and objects at once to what cannot be.

Each user has one client for each advisor, which sends the commands of that user's chats with that advisor one after the
other; one that buys and returns credits, with Idempotency-Keys that it makes and keeps; and one that only reads. All of
them go on whatever happens to the service. What was not answered is *unknown*: it may have happened, once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

import httpx

from tests.faults.chats import Chat, Json, micro
from tests.program import PATIENCE_S

ADVISORS = {"a1": ("c1", "c2"), "a2": ("c3", "c4")}
CARDS = {
    "a1": {"credits_per_minute": "60", "free_seconds": 1},
    "a2": {"credits_per_minute": "30", "free_seconds": 0, "first_seconds": 1, "increment_seconds": 1},
}
KEY = "a-key-from-the-environment"
LIKELY = ("start",) * 5 + ("heartbeat",) * 10 + ("read",) * 4 + ("pause",) * 3 + ("stop",)
KINDS = ("purchase",) * 4 + ("grant", "compensation", "refund")
TAKES = ("refund",)
# Short, so that clocks lapse and chats are abandoned while the load goes on.
SETTINGS = {
    "TALKTIME_LEASE_SECONDS": "2",
    "TALKTIME_HEARTBEAT_SECONDS": "1",
    "TALKTIME_ABANDON_AFTER_SECONDS": "6",
}
BACK_OFF_S = 0.1
REPEATED = 30
ANSWER_S_MAX = 2 * PATIENCE_S


def tell(figures: str) -> None:
    """Show figures, to those who run the tests with ``-s``."""
    print(f"\n{figures}")  # noqa: T201 - see above


class Outcome(StrEnum):
    """What the sender of a command knows of it."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Answer:
    """What came of a request; `status` is 0 where nothing came."""

    outcome: Outcome
    status: int
    body: Json


@dataclass
class Credit:
    """A credit as its sender keeps it. `amount` is signed, in micro-credits; `entry` what was acknowledged."""

    user_id: str
    key: str
    kind: str
    amount: int
    entry: Json = None
    open: bool = False
    """An answer is lacking, and it is to be sent again."""

    @property
    def path(self) -> str:
        return f"/v1/users/{self.user_id}/credits"

    @property
    def body(self) -> Json:
        return {"kind": self.kind, "amount": f"{Decimal(abs(self.amount)) / 1_000_000}", "memo": self.key}


@dataclass
class Load:
    """Users on a service that may fail."""

    clients: Sequence[httpx.AsyncClient]
    chance: random.Random
    pace_s: float
    chats: dict[tuple[str, str], Chat] = field(default_factory=dict)
    credits: dict[tuple[str, str], Credit] = field(default_factory=dict)
    probes: dict[tuple[int, str], Credit] = field(default_factory=dict)
    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    senders: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def users(self) -> list[str]:
        return sorted({user_id for user_id, _ in self.chats})

    def check(self) -> None:
        """Fail if anything was seen that cannot be."""
        assert not self.wrong, "\n".join(self.wrong[:5])

    def count(self, outcome: Outcome, *, reads: bool = False) -> int:
        """Count the commands (or the reads) that came out so."""
        return sum(n for (what, o), n in self.outcomes.items() if o is outcome and (what == "read") == reads)

    def __str__(self) -> str:
        """Figures."""
        figures = ", ".join(f"{self.count(outcome)} {outcome}" for outcome in Outcome)
        sent = sum(self.count(outcome) for outcome in Outcome)
        reads = self.count(Outcome.ACKNOWLEDGED, reads=True)
        return f"commands sent {sent} ({figures}), reads answered {reads}, slowest answer {self.slowest_s:.1f} s"

    # --- one request ---

    async def send(self, what: str, method: str, path: str, *, key: str | None = None, body: Json = None) -> Answer:
        """Send a request to any of the API processes."""
        answer = await self.ask(self.chance.choice(self.clients), method, path, key=key, body=body)
        self.outcomes[what, answer.outcome] += 1
        self.statuses[answer.status] += 1
        if answer.outcome is Outcome.UNKNOWN:
            await asyncio.sleep(BACK_OFF_S)
        return answer

    async def ask(
        self, client: httpx.AsyncClient, method: str, path: str, *, key: str | None = None, body: Json = None
    ) -> Answer:
        """Send a request to this API process."""
        headers = {} if key is None else {"Idempotency-Key": key}
        began = time.monotonic()
        try:
            response = await client.request(method, path, headers=headers, json=body)
        except httpx.TransportError as error:
            if isinstance(error, httpx.TimeoutException):
                self.wrong.append(f"no answer in {ANSWER_S_MAX} s to {method} {path}")
            return Answer(Outcome.UNKNOWN, 0, None)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        status = response.status_code
        if status >= 500:
            told = response.headers.get("content-type"), response.headers.get("retry-after")
            if (status, *told) != (503, "application/problem+json", "1"):
                self.wrong.append(f"{method} {path} was answered with {status} {told}: {response.text[:500]}")
            return Answer(Outcome.UNKNOWN, status, None)
        outcome = Outcome.ACKNOWLEDGED if response.is_success else Outcome.REFUSED
        return Answer(outcome, status, response.json())

    async def is_served_by(self, client: httpx.AsyncClient, user_id: str = "probe") -> bool:
        """Tell whether an API process gets the lock on an account, and writes to it."""
        place = self.clients.index(client), user_id
        credit = self.probes.get(place)
        if credit is None or not credit.open:
            credit = Credit(user_id, f"probe-{len(self.credits)}", "grant", 1_000)
            self.probes[place] = self.credits[user_id, credit.key] = credit
        self.book(credit, await self.ask(client, "POST", credit.path, key=credit.key, body=credit.body))
        return credit.entry is not None

    async def is_served(self) -> bool:
        """Tell whether every API process takes a command."""
        return all(await asyncio.gather(*(self.is_served_by(client) for client in self.clients)))

    # --- those who send ---

    async def talk(self, chats: list[Chat], rng: random.Random) -> None:
        """Send the commands of chats that exclude each other, one after the other."""
        while not self.stopping.is_set():
            chat = rng.choice(chats)
            siblings = [other for other in chats if other is not chat]
            await self.command(chat, rng.choice(LIKELY), siblings, rng)
            await asyncio.sleep(rng.uniform(0, 2 * self.pace_s))

    async def command(self, chat: Chat, what: str, siblings: list[Chat], rng: random.Random) -> None:
        """Send one command. A start with a key is sent again until there is an answer, unless the load ends."""
        floor = chat.floor
        if what == "read":
            answer = await self.send(what, "GET", chat.path)
            if answer.outcome is Outcome.ACKNOWLEDGED:
                chat.looked_at(answer.body, floor)
            elif answer.outcome is Outcome.REFUSED:
                chat.refused(what, answer.status, answer.body, floor)
            return
        key = None
        if what == "start" and rng.random() < 0.6:
            # Sometimes that of the latest start: a duplicate that comes late and must change nothing.
            key = chat.key if chat.key and rng.random() < 0.2 else f"start-{rng.getrandbits(64):x}"
        body = {"advisor_id": chat.advisor_id} if what == "start" else None
        again = False
        while True:
            answer = await self.send(what, "POST", f"{chat.path}/{what}", key=key, body=body)
            if answer.outcome is Outcome.ACKNOWLEDGED:
                chat.answered(what, answer.body, floor, siblings, key=key, again=again)
                return
            if answer.outcome is Outcome.REFUSED:
                chat.refused(what, answer.status, answer.body, floor)
                return
            chat.unanswered(what, siblings, key=key, again=again)
            if key is None or self.stopping.is_set():
                return
            again, floor = True, chat.floor

    async def pay(self, user_id: str, rng: random.Random) -> None:
        """Buy and return credits."""
        number = 0
        while not self.stopping.is_set():
            kind = rng.choice(KINDS)
            amount = rng.randrange(100_000, 3_000_000)
            number += 1
            credit = Credit(user_id, f"{user_id}-{number}", kind, -amount if kind in TAKES else amount)
            self.credits[user_id, credit.key] = credit
            await self.credit(credit)
            while credit.open and rng.random() < 0.5 and not self.stopping.is_set():
                await self.credit(credit)
            earlier = self.credits[user_id, f"{user_id}-{rng.randrange(number) + 1}"]
            if rng.random() < 0.2 and not earlier.open:
                await self.credit(earlier)  # a duplicate that comes late
            await asyncio.sleep(rng.uniform(0, 8 * self.pace_s))

    async def credit(self, credit: Credit) -> None:
        """Send a credit, or send it again."""
        self.book(credit, await self.send("credit", "POST", credit.path, key=credit.key, body=credit.body))

    def book(self, credit: Credit, answer: Answer) -> None:
        """Take an answer to a credit, and hold it against what was answered before."""
        if answer.outcome is Outcome.UNKNOWN:
            credit.open = credit.entry is None
            return
        credit.open = False
        if answer.outcome is Outcome.ACKNOWLEDGED:
            if credit.entry not in (None, answer.body) or micro(answer.body["amount"]) != credit.amount:
                self.wrong.append(f"{credit} was answered with {answer.body}")
            credit.entry = answer.body
        elif credit.entry is not None or (answer.status, answer.body["code"]) != (409, "insufficient-balance"):
            self.wrong.append(f"{credit} was refused with {answer.status} {answer.body}")

    async def look(self, user_id: str, rng: random.Random) -> None:
        """Read beside everything else."""
        chats = [chat for (owner, _), chat in self.chats.items() if owner == user_id]
        while not self.stopping.is_set():
            await asyncio.sleep(rng.uniform(0, 4 * self.pace_s))
            chat = rng.choice(chats)
            floor = chat.floor
            existed = chat.exists
            answer = await self.send("read", "GET", chat.path)
            if answer.outcome is Outcome.ACKNOWLEDGED:
                chat.read(answer.body, floor, committed=False)
            elif answer.outcome is Outcome.REFUSED and existed:
                chat.object_to(f"a read was refused with {answer.status}", answer.body)
            account = await self.send("read", "GET", f"/v1/users/{user_id}/account")
            if account.outcome is Outcome.ACKNOWLEDGED and micro(account.body["balance"]) < 0:
                self.wrong.append(f"the balance of {user_id} is below zero: {account.body}")

    # --- the end ---

    async def finish(self) -> None:
        """Send nothing new, and wait for what is under way."""
        self.stopping.set()
        await asyncio.gather(*self.senders)

    async def settle(self) -> None:
        """Repeat every credit without an answer, with its key, until there is one; and some of the others."""
        patient_until = time.monotonic() + PATIENCE_S
        for credit in self.credits.values():
            while credit.open:
                self.check()
                assert time.monotonic() < patient_until
                await self.credit(credit)
        acknowledged = [credit for credit in self.credits.values() if credit.entry is not None]
        for credit in self.chance.sample(acknowledged, min(REPEATED, len(acknowledged))):
            await self.credit(credit)
        self.check()

    async def ask_all(self) -> None:
        """Read every chat once more, now that nothing is under way."""
        for chat in self.chats.values():
            answer = await self.send("read", "GET", chat.path)
            assert answer.outcome is not Outcome.UNKNOWN
            if answer.outcome is Outcome.ACKNOWLEDGED:
                chat.looked_at(answer.body, chat.floor)
            else:
                chat.refused("read", answer.status, answer.body, chat.floor)
        self.check()


@asynccontextmanager
async def load(
    origins: Sequence[str], key: str, *, seed: int, users: int = 5, pace_s: float = 0.1
) -> AsyncIterator[Load]:
    """Put users on a service until the block ends; then what is under way is awaited."""
    headers = {"Authorization": f"Bearer {key}"}
    clients = [
        httpx.AsyncClient(base_url=origin, headers=headers, timeout=ANSWER_S_MAX, trust_env=False) for origin in origins
    ]
    chance = random.Random(seed)
    made = Load(clients, chance, pace_s)
    for n in range(users):
        for advisor_id, chat_ids in ADVISORS.items():
            for chat_id in chat_ids:
                made.chats[f"u{n}", chat_id] = Chat(f"u{n}", chat_id, advisor_id, made.wrong)
    try:
        for advisor_id, card in CARDS.items():
            answer = await made.send("card", "PUT", f"/v1/advisors/{advisor_id}", body=card)
            assert answer.outcome is Outcome.ACKNOWLEDGED, answer
        for user_id in made.users:
            for chat_ids in ADVISORS.values():
                chats = [made.chats[user_id, chat_id] for chat_id in chat_ids]
                made.senders.append(asyncio.create_task(made.talk(chats, random.Random(chance.random()))))
            made.senders.append(asyncio.create_task(made.pay(user_id, random.Random(chance.random()))))
            made.senders.append(asyncio.create_task(made.look(user_id, random.Random(chance.random()))))
        yield made
    finally:
        for sender in made.senders:
            sender.cancel()
        await asyncio.gather(*made.senders, return_exceptions=True)
        for client in clients:
            await client.aclose()
