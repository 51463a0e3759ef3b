"""One random history: what happens to the service, step by step, and a comparison with the reference after each.

The seed decides what happens. Two things it cannot decide, the order of what races and what becomes of a request that
got no answer, are found out by looking; so what is aimed at instants of a chat that raced may differ in a repetition.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import CREATED, SERVICE_UNAVAILABLE

from reconciler.sweep import Pass
from talktime.store.tables import bucket_of
from tests.database import Clock
from tests.meter.histories import BLOCKS, CHATS, KINDS, RATES, Card
from tests.simulator.beliefs import Belief, Circumstances, Sent, after_commands, distinct
from tests.simulator.deployment import APIS, Deployment
from tests.simulator.looks import Looks
from tests.simulator.processes import Processes
from tests.simulator.readings import boundaries
from tests.simulator.service import Api, Command

AUDIT_EVERY = 125
EVENTS_OF_A_COMMAND = 16  # statements, commits and parts of answers, at most
EVENTS_OF_A_PASS = 30

ADVISORS = sorted(set(CHATS.values()))
WAITS_US = (0, 0, 0, 1, 1, 2, 3, 5, 8, 13, 30, 60, -1, -4, -40)
LONG_WAITS_US = (200, 500, 1_500)
AMOUNTS = (1, 2, 9, 30, 200)
BATCHES = (1, 2, 500)
AMONG_MANY = 0.4
"""The part of the heartbeats that comes in the request for many."""
COMMANDS = ("start",) * 5 + ("heartbeat",) * 6 + ("credit",) * 3 + ("pause", "stop")
LIKELY = {
    "command": 300,
    "late": 24,  # a command that was held up on its way
    "again": 20,  # one that was sent before, to the letter
    "race": 24,  # several commands at once, or some and passes
    "passes": 24,  # one, two at once, or one that dies
    "death": 2,  # an API process dies between two statements
    "card": 12,  # an advisor's tariff changes
    "cut": 1,  # all connections to the database are lost
    "deploy": 1,  # an API process is replaced by one with other settings
    "outage": 4,  # nobody passes, beats or asks for long
}


@dataclass(frozen=True, slots=True)
class _Request:
    api: Api
    command: Command
    die_at: int = 0
    stall_at: int = 0


@dataclass(frozen=True, slots=True)
class _Meanwhile:
    """What happens while commands are under way: passes, the clock moves, connections to the database are lost."""

    passes: Sequence[Future[Pass]] = ()
    doomed_pass: int = 0
    moves_us: int = 0
    cut: bool = False

    @property
    def passes_max(self) -> int:
        """How many passes there may be at most."""
        return len(self.passes) + bool(self.doomed_pass)


_NOTHING = _Meanwhile()


class History:
    """A history under way, on a database of its own."""

    def __init__(self, seed: int, *, url: str, processes: Processes, clock: Clock) -> None:
        self.totals: Counter[str] = Counter()
        self._deployed = Deployment(seed, url=url, processes=processes, clock=clock, totals=self.totals)
        self._now = clock.now
        self._rng = random.Random(seed)
        looking = random.Random(f"looks {seed}")  # of its own: how often is looked depends on outcomes
        self._looking = looking
        self._looks = Looks(lambda: looking.choice(self._deployed.apis), looking, self.totals)
        self._users = _choose_users(self._rng)
        # In some histories nobody passes before the end, in others somebody always does.
        self._likely = {**LIKELY, "passes": LIKELY["passes"] * self._rng.choice((0, 1, 1, 4))}
        self._beliefs: dict[str, list[Belief]] = {user_id: [Belief()] for user_id in self._users}
        self._cards: dict[str, Card] = {}
        self._held_up: list[Command] = []
        self._sent: list[Command] = []
        self._keys = 0
        self._aimed_at = "", ""  # a user and a chat, in a step at whose instant something ends for them
        self._happenings: dict[str, Callable[[], set[str]]] = {
            "command": self._happens_command,
            "late": self._happens_late,
            "again": self._happens_again,
            "race": self._happens_race,
            "passes": self._happens_passes,
            "death": self._happens_death,
            "card": self._happens_card,
            "cut": self._happens_cut,
            "deploy": self._happens_deploy,
            "outage": set,
        }

    @property
    def log(self) -> Iterable[str]:
        """The last lines of what happened."""
        return self._deployed.log

    def begin(self) -> None:
        """Set the advisors' cards."""
        for advisor_id in ADVISORS:
            self._put_card(advisor_id)

    def close(self) -> None:
        """End what runs."""
        self._deployed.close()

    def step(self) -> None:
        """Let something happen, and compare."""
        [what] = self._rng.choices(list(self._likely), list(self._likely.values()))
        wait_us = self._rng.choice(LONG_WAITS_US if what == "outage" else WAITS_US)
        if self._rng.random() < 0.2 and (aimed_us := self._aim()) is not None:
            wait_us = aimed_us
        self._now += wait_us
        self._deployed.clock.set(self._now)
        self._deployed.log.append(f"{self._now} ({wait_us:+d}) {what}")
        self.totals["steps"] += 1
        users = self._happenings[what]()
        self._aimed_at = "", ""
        if what != "passes" and len(users) == 1 and self._looking.random() < 0.75:
            users = set()  # the answer was compared, and whatever is wrong besides will be seen later
        users |= {user_id for user_id, beliefs in self._beliefs.items() if len(beliefs) > 1}
        if self._looking.random() < 0.1:
            users.add(self._looking.choice(self._users))
        for user_id in sorted(users):
            self._beliefs[user_id] = self._looks.at(user_id, self._beliefs[user_id], self._now)
        if self.totals["steps"] % AUDIT_EVERY == 0:
            self._deployed.audit()

    def _aim(self) -> int | None:
        """Return how long it is until something ends for a chat, a microsecond less, or more; None if nothing does."""
        user_id, place, aside_us = self._rng.choice(self._users), self._rng.random(), self._rng.choice((-1, 0, 0, 1))
        account = self._beliefs[user_id][0].account
        ends = [] if account is None else boundaries(account, self._now)
        if not ends:
            return None
        at, chat_id = ends[int(place * len(ends))]
        self._aimed_at = user_id, chat_id
        return at + aside_us - self._now

    def end(self) -> None:
        """Compare all there is, and once more after a last pass."""
        self._look_at_all()
        self._deployed.audit()
        self._pass_alone(1, batch_accounts=500)
        self._look_at_all()
        self._deployed.audit()

    def _look_at_all(self) -> None:
        for user_id in self._users:
            self._beliefs[user_id] = self._looks.at_all(user_id, self._beliefs[user_id], self._now)

    # --- what happens; each returns the users that it may have changed ------------------------------------------------

    def _happens_command(self) -> set[str]:
        command = self._command()
        if self._rng.random() < 0.06:
            self._held_up.append(command)
            return set()
        return self._send([self._request(command)])

    def _happens_late(self) -> set[str]:
        if not self._held_up:
            return set()
        return self._send([self._request(self._held_up.pop(self._rng.randrange(len(self._held_up))))])

    def _happens_again(self) -> set[str]:
        if not self._sent:
            return set()
        return self._send([self._request(self._sent[-self._rng.randint(1, min(4, len(self._sent)))])])

    def _happens_race(self) -> set[str]:
        rng = self._rng
        user_id = rng.choice(self._users)
        commands = [self._command(user_id if rng.random() < 0.8 else "") for _ in range(rng.choice((1, 2, 2, 3)))]
        if rng.random() < 0.3:
            commands[-1] = commands[0]
        if len(commands) < 3 and rng.random() < 0.4:
            commands.append(Command(user_id=user_id, what="read", chat_id=rng.choice(sorted(CHATS))))
        # One may be doomed, and takes those with it that its process has besides; or stand still with its locks.
        die_at, stall_at = rng.randint(1, EVENTS_OF_A_COMMAND), rng.randint(1, EVENTS_OF_A_COMMAND)
        fate = rng.choices(("dies", "stalls", "lives"), (1, 8, 11))[0]
        first = self._request(commands[0], die_at if fate == "dies" else 0, stall_at if fate == "stalls" else 0)
        passes = rng.choice((0, 1, 1, 2)) if self._likely["passes"] and len(commands) < 3 else 0
        doomed_pass = 0
        if passes == 2 and rng.random() < 0.1:
            passes, pass_dies_at = 1, rng.randint(1, EVENTS_OF_A_PASS)
            doomed_pass = self._deployed.sweep_and_die(batch_accounts=rng.choice(BATCHES), die_at=pass_dies_at)
        meanwhile = _Meanwhile(
            self._deployed.reconcilers.begin(passes, batch_accounts=rng.choice(BATCHES)),
            doomed_pass,
            moves_us=rng.choice((0, 1, 3, 13, 60, -4)) if rng.random() < 0.6 else 0,
            cut=rng.random() < 0.03,
        )
        return self._send([first, *map(self._request, commands[1:])], meanwhile)

    def _happens_passes(self) -> set[str]:
        rng = self._rng
        if rng.random() < 0.9:
            self._pass_alone(rng.choice((1, 1, 2)), batch_accounts=rng.choice(BATCHES))
            return set(self._users)
        die_at = rng.randint(1, EVENTS_OF_A_PASS)
        self._deployed.end_of_doomed(self._deployed.sweep_and_die(batch_accounts=rng.choice(BATCHES), die_at=die_at))
        for user_id, beliefs in self._beliefs.items():
            self._beliefs[user_id] = distinct(beliefs + [belief.materialized(self._now) for belief in beliefs])
        return set(self._users)

    def _happens_death(self) -> set[str]:
        return self._send([self._request(self._command(), self._rng.randint(1, EVENTS_OF_A_COMMAND))])

    def _happens_card(self) -> set[str]:
        self._put_card(self._rng.choice(ADVISORS))
        return set()

    def _happens_cut(self) -> set[str]:
        self._deployed.cut()
        return set()

    def _happens_deploy(self) -> set[str]:
        self._deployed.replace(self._rng.randrange(APIS))
        return set()

    # --- commands -----------------------------------------------------------------------------------------------------

    def _command(self, user_id: str = "") -> Command:
        rng = self._rng
        user_id = user_id or rng.choice(self._users)
        what = rng.choice(COMMANDS)
        chat_id = rng.choice(sorted(CHATS))
        if rng.random() < 0.6 and all(self._aimed_at):
            user_id, chat_id = self._aimed_at
        if what == "credit":
            self._keys += 1
            # Now and then a key that belongs to an earlier request.
            key = f"credit-{self._keys if rng.random() < 0.9 else rng.randint(1, self._keys)}"
            return Command(user_id=user_id, what=what, key=key, kind=rng.choice(KINDS), amount=rng.choice(AMOUNTS))
        if what == "start":
            advisor_id = CHATS[chat_id] if rng.random() < 0.97 else rng.choice(ADVISORS)
            start_key = rng.choice((None, None, "k1", "k2", "k3"))
            return Command(user_id=user_id, what=what, chat_id=chat_id, advisor_id=advisor_id, key=start_key)
        among_many = what == "heartbeat" and rng.random() < AMONG_MANY
        return Command(user_id=user_id, what=what, chat_id=chat_id, among_many=among_many)

    def _request(self, command: Command, die_at: int = 0, stall_at: int = 0) -> _Request:
        return _Request(self._rng.choice(self._deployed.apis), command, die_at, stall_at)

    def _send(self, requests: Sequence[_Request], meanwhile: _Meanwhile = _NOTHING) -> set[str]:
        """Send commands at the same time, and work out what may be stored after them."""
        for number, request in enumerate(requests):
            request.api.send(request.command, die_at=request.die_at, stall_at=request.stall_at, connection=number)
        instants = [self._now]
        if meanwhile.moves_us:
            time.sleep(self._looking.uniform(0, 0.01))
            self._now += meanwhile.moves_us
            self._deployed.clock.set(self._now)
            instants.append(self._now)
        if meanwhile.cut:
            self._deployed.cut()
        sent = [self._answered(request, number, requests, meanwhile) for number, request in enumerate(requests)]
        self._deployed.end_of(meanwhile.passes, may_fail=meanwhile.cut)
        if meanwhile.doomed_pass:
            self._deployed.end_of_doomed(meanwhile.doomed_pass, may_fail=meanwhile.cut)
        self._deployed.bury(
            {request.api.pid for request, one in zip(requests, sent, strict=True) if one.answer is None},
            doomed={request.api.pid for request in requests if request.die_at},
        )
        users = set(self._users) if meanwhile.passes_max else {request.command.user_id for request in requests}
        for user_id in sorted(users):
            self._beliefs[user_id] = after_commands(
                self._beliefs[user_id],
                [one for one in sent if one.command.user_id == user_id],
                instants=instants,
                passes=meanwhile.passes_max,
                user_id=user_id,
            )
        return users

    def _answered(
        self, request: _Request, connection: int, requests: Sequence[_Request], meanwhile: _Meanwhile
    ) -> Sent:
        command = request.command
        answer = request.api.answer(connection, may_fail=meanwhile.cut)
        self._deployed.log.append(f"    {command} -> {answer.status if answer else None} from {request.api.pid}")
        self._sent.append(command)
        self.totals["commands"] += 1
        if answer is None or answer.status == SERVICE_UNAVAILABLE:
            self.totals["commands without answer"] += 1
        elif command.what == "credit" and answer.status == CREATED:
            self._looks.keep_entry(command, answer.body)
        others = sum(one.command.user_id == command.user_id for one in requests) - 1
        raced = others > 0 or meanwhile.passes_max > 0 or meanwhile.moves_us != 0 or meanwhile.cut
        return Sent(command, Circumstances(request.api.settings, dict(self._cards), raced), answer)

    def _put_card(self, advisor_id: str) -> None:
        rng = self._rng
        card = Card(rng.choice(RATES), *rng.choice(BLOCKS), rng.choice((0, 1, 5, 13, 40)))
        rng.choice(self._deployed.apis).put_card(advisor_id, card)
        self._cards[advisor_id] = card

    # --- passes -------------------------------------------------------------------------------------------------------

    def _pass_alone(self, count: int, *, batch_accounts: int) -> None:
        """Let passes run that meet no command: what is due is written after them, and nothing else."""
        self._deployed.end_of(self._deployed.reconcilers.begin(count, batch_accounts=batch_accounts))
        for user_id, beliefs in self._beliefs.items():
            self._beliefs[user_id] = distinct(
                belief.materialized(self._now) if belief.is_due(self._now) else belief for belief in beliefs
            )


def _choose_users(rng: random.Random) -> list[str]:
    """Choose users, half of the time all of one bucket, so that passes take them in one batch."""
    count = rng.choice((1, 2, 3, 5))
    users = [f"user-{n}" for n in range(count)]
    if rng.random() < 0.5:
        others = (f"user-{n}" for n in range(count, 1_000_000))
        neighbours = (user_id for user_id in others if bucket_of(user_id) == bucket_of(users[0]))
        users[1:] = [next(neighbours) for _ in users[1:]]
    return users
