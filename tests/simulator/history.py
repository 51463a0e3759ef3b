"""One random history: what happens to the service, step by step, and a comparison with the reference after each.

The seed decides what happens. Two things it cannot decide, the order of what races and what becomes of a request that
got no answer, are found out by looking.
"""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from signal import SIGKILL

from reconciler.sweep import Pass
from tests.database import Clock
from tests.meter.histories import BLOCKS, CHATS, KINDS, RATES, SCOPES, Card, Settings
from tests.simulator.beliefs import Belief, Circumstances, Sent, after_commands, distinct
from tests.simulator.looks import Looks
from tests.simulator.processes import Processes, Reconcilers
from tests.simulator.readings import boundaries, seconds
from tests.simulator.service import KEY, PATIENCE_S, Api, Command, differ

BUCKETS = 1024
APIS = 2
EVENTS_OF_A_COMMAND = 16  # statements, commits and parts of answers, at most
EVENTS_OF_A_PASS = 30

ADVISORS = sorted(set(CHATS.values()))
WAITS_US = (0, 0, 0, 1, 1, 2, 3, 5, 8, 13, 30, 60, -1, -4, -40)
LONG_WAITS_US = (200, 500, 1_500)
LEASES_US = (2, 4, 20, 50)
AMOUNTS = (1, 2, 9, 30, 200)
BATCHES = (1, 2, 500)
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


class History:
    """A history under way, on a database of its own."""

    def __init__(self, seed: int, *, url: str, processes: Processes, clock: Clock) -> None:
        self.totals: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=40)
        self._url = url
        self._processes = processes
        self._reconcilers = Reconcilers(url)
        self._clock = clock
        self._now = clock.now
        self._rng = random.Random(seed)
        looking = random.Random(-seed)  # of its own: how often is looked depends on outcomes
        self._looking = looking
        self._looks = Looks(lambda: looking.choice(self._apis), looking, self.totals)
        self._users = _choose_users(self._rng)
        # In some histories nobody passes before the end, in others somebody always does.
        self._likely = {**LIKELY, "passes": LIKELY["passes"] * self._rng.choice((0, 1, 1, 4))}
        self._beliefs: dict[str, list[Belief]] = {user_id: [Belief()] for user_id in self._users}
        self._cards: dict[str, Card] = {}
        self._held_up: list[Command] = []
        self._sent: list[Command] = []
        self._keys = 0
        self._apis: list[Api] = []
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

    def begin(self) -> None:
        """Bring up the service, and set the advisors' cards."""
        self._apis = [self._new_api() for _ in range(APIS)]
        for advisor_id in ADVISORS:
            self._put_card(advisor_id)

    def step(self) -> None:
        """Let something happen, and compare."""
        [what] = self._rng.choices(list(self._likely), list(self._likely.values()))
        wait_us = self._rng.choice(LONG_WAITS_US if what == "outage" else WAITS_US)
        if self._rng.random() < 0.2:
            wait_us = self._aim() or wait_us
        self._now += wait_us
        self._clock.set(self._now)
        self.log.append(f"{self._now} ({wait_us:+d}) {what}")
        self.totals["steps"] += 1
        users = self._happenings[what]()
        self._aimed_at = "", ""
        if len(users) == 1 and self._looking.random() < 0.75:
            users = set()  # the answer was compared, and whatever is wrong besides will be seen later
        users |= {user_id for user_id, beliefs in self._beliefs.items() if len(beliefs) > 1}
        if self._looking.random() < 0.1:
            users.add(self._looking.choice(self._users))
        for user_id in sorted(users):
            self._beliefs[user_id] = self._looks.at(user_id, self._beliefs[user_id], self._now)

    def _aim(self) -> int:
        """Return how long it is until something ends for a chat, or a microsecond less or more; 0 if nothing does."""
        user_id, place, aside_us = self._rng.choice(self._users), self._rng.random(), self._rng.choice((-1, 0, 0, 1))
        account = self._beliefs[user_id][0].account
        ends = [] if account is None else boundaries(account, self._now)
        if not ends:
            return 0
        at, chat_id = ends[int(place * len(ends))]
        self._aimed_at = user_id, chat_id
        return at + aside_us - self._now

    def end(self) -> None:
        """Compare all there is, and once more after a last pass."""
        self._look_at_all()
        self._pass_alone(1, batch_accounts=500)
        self._look_at_all()

    def close(self) -> None:
        """End what runs."""
        for api in self._apis:
            api.close()
        self._processes.kill_all()
        self._reconcilers.close()

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
        # One of them may be doomed; its process takes those with it that it has besides.
        die_at = rng.randint(1, EVENTS_OF_A_COMMAND) if rng.random() < 0.05 else 0
        requests = [self._request(commands[0], die_at), *map(self._request, commands[1:])]
        passes = rng.choice((0, 1, 1, 2)) if self._likely["passes"] and len(commands) < 3 else 0
        moves_us = rng.choice((0, 1, 3, 13, 60)) if rng.random() < 0.6 else 0
        begun = self._reconcilers.begin(passes, batch_accounts=rng.choice(BATCHES))
        return self._send(requests, begun=begun, moves_us=moves_us)

    def _happens_passes(self) -> set[str]:
        rng = self._rng
        if rng.random() < 0.9:
            self._pass_alone(rng.choice((1, 1, 2)), batch_accounts=rng.choice(BATCHES))
            return set(self._users)
        die_at = rng.randint(1, EVENTS_OF_A_PASS)
        code = self._processes.wait(self._processes.sweep(self._url, batch_accounts=rng.choice(BATCHES), die_at=die_at))
        self.totals["passes"] += 1
        if code == -SIGKILL:
            self.totals["killed reconcilers"] += 1
        elif code != 0:
            differ("a reconciler", f"exit code {code}")
        self._settle()
        return self._maybe_materialized()

    def _happens_death(self) -> set[str]:
        return self._send([self._request(self._command(), self._rng.randint(1, EVENTS_OF_A_COMMAND))])

    def _happens_card(self) -> set[str]:
        self._put_card(self._rng.choice(ADVISORS))
        return set()

    def _happens_cut(self) -> set[str]:
        self.totals["cuts"] += 1
        self._clock.connection.execute(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'talktime'"
        )
        return set()

    def _happens_deploy(self) -> set[str]:
        self._replace(self._rng.randrange(APIS))
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
        return Command(user_id=user_id, what=what, chat_id=chat_id)

    def _request(self, command: Command, die_at: int = 0) -> _Request:
        return _Request(self._rng.choice(self._apis), command, die_at)

    def _send(self, requests: Sequence[_Request], *, begun: Sequence[Future[Pass]] = (), moves_us: int = 0) -> set[str]:
        """Send commands at the same time, and work out what may be stored after them.

        Passes may have begun already, and the clock may move before all is answered.
        """
        for number, request in enumerate(requests):
            request.api.send(request.command, die_at=request.die_at, connection=number)
        instants = [self._now]
        if moves_us:
            time.sleep(self._looking.uniform(0, 0.01))
            self._now += moves_us
            self._clock.set(self._now)
            instants.append(self._now)
        raced = bool(begun) or len(requests) > 1
        sent = [self._answered(request, number, raced=raced) for number, request in enumerate(requests)]
        self._end_of(begun)
        dead = {request.api.pid for request, one in zip(requests, sent, strict=True) if one.answer is None}
        self._bury(dead, requests)
        users = set(self._users) if begun else {request.command.user_id for request in requests}
        for user_id in sorted(users):
            self._beliefs[user_id] = after_commands(
                self._beliefs[user_id],
                [one for one in sent if one.command.user_id == user_id],
                instants=instants,
                passes=len(begun),
                user_id=user_id,
            )
        return users

    def _answered(self, request: _Request, connection: int, *, raced: bool) -> Sent:
        answer = request.api.answer(connection)
        self.log.append(f"    {request.command} -> {answer.status if answer else None} from {request.api.pid}")
        self._sent.append(request.command)
        self.totals["commands"] += 1
        self.totals["commands without answer"] += answer is None
        return Sent(request.command, Circumstances(request.api.settings, dict(self._cards), raced), answer)

    def _put_card(self, advisor_id: str) -> None:
        rng = self._rng
        card = Card(rng.choice(RATES), *rng.choice(BLOCKS), rng.choice((0, 1, 5, 13, 40)))
        rng.choice(self._apis).put_card(advisor_id, card)
        self._cards[advisor_id] = card

    # --- passes -------------------------------------------------------------------------------------------------------

    def _pass_alone(self, count: int, *, batch_accounts: int) -> None:
        """Let passes run that meet no command; all that is due must be written after them."""
        self._end_of(self._reconcilers.begin(count, batch_accounts=batch_accounts))
        for user_id, beliefs in self._beliefs.items():
            written = [belief.materialized(self._now) for belief in beliefs]
            left = [belief for belief in beliefs if not belief.must_be_materialized(self._now)]
            self._beliefs[user_id] = distinct(written + left)

    def _end_of(self, passes: Sequence[Future[Pass]]) -> None:
        for one in passes:
            made = one.result(PATIENCE_S)
            self.totals["passes"] += 1
            if made.failed:
                differ("a reconciler", made)

    def _maybe_materialized(self) -> set[str]:
        for user_id, beliefs in self._beliefs.items():
            self._beliefs[user_id] = distinct(beliefs + [belief.materialized(self._now) for belief in beliefs])
        return set(self._users)

    # --- the service --------------------------------------------------------------------------------------------------

    def _new_api(self) -> Api:
        rng = self._rng
        lease_us = rng.choice(LEASES_US)
        settings = Settings(rng.choice(SCOPES), lease_us, lease_us + rng.choice((1, 10, 60)))
        variables = {
            "TALKTIME_SERVICE_KEY": KEY,
            "TALKTIME_EXCLUSIVE": settings.scope,
            "TALKTIME_LEASE_SECONDS": seconds(settings.lease_us),
            "TALKTIME_HEARTBEAT_SECONDS": seconds(1),
            "TALKTIME_ABANDON_AFTER_SECONDS": seconds(settings.abandon_after_us),
        }
        api = Api(*self._processes.serve(self._url, variables), settings)
        self.log.append(f"    new API process {api.pid}: {settings}")
        return api

    def _replace(self, place: int) -> None:
        """Replace an API process, dead or alive, by another one."""
        self._apis[place].close()
        self._processes.kill(self._apis[place].pid)
        self._apis[place] = self._new_api()

    def _bury(self, dead: set[int], requests: Sequence[_Request]) -> None:
        """Replace API processes that died, which only doomed ones may."""
        for place, api in enumerate(self._apis):
            if api.pid in dead:
                if not any(request.die_at and request.api is api for request in requests):
                    differ(f"API process {api.pid}", "died by itself")
                self.totals["killed APIs"] += 1
                self._replace(place)
        if dead:
            self._settle()

    def _settle(self) -> None:
        """Wait until the database has rolled back what dead processes were at."""
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'talktime' AND state <> 'idle'"
        )
        patient_until = time.monotonic() + PATIENCE_S
        while self._clock.connection.execute(query).fetchone() != (0,):
            if time.monotonic() > patient_until:
                differ("the database", "it goes on with what dead processes began")
            time.sleep(0.002)


def _choose_users(rng: random.Random) -> list[str]:
    """Choose users, half of the time all of one bucket, so that passes take them in one batch."""
    count = rng.choice((1, 2, 3, 5))
    users = [f"user-{n}" for n in range(count)]
    if rng.random() < 0.5:
        others = (f"user-{n}" for n in range(count, 1_000_000))
        neighbours = (user_id for user_id in others if _bucket_of(user_id) == _bucket_of(users[0]))
        users[1:] = [next(neighbours) for _ in users[1:]]
    return users


def _bucket_of(user_id: str) -> int:
    return zlib.crc32(user_id.encode()) % BUCKETS
