"""One random history: what happens to the service, step by step, and the comparison with the reference after each.

The seed decides what happens. Two things it cannot decide, the order of what races and what becomes of a request that
got no answer, are found out by looking.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from tests.database import Clock
from tests.meter.histories import BLOCKS, CHATS, KINDS, RATES, SCOPES, Card, Settings
from tests.meter.reference import Reference
from tests.simulator.beliefs import (
    Answer,
    Belief,
    Circumstances,
    Command,
    Difference,
    Sent,
    after_commands,
    amount,
    distinct,
    figures,
    instant,
    micro,
    reading_mismatch,
    seconds,
)
from tests.simulator.processes import DIE_AT, Processes

KEY = "a-service-key-for-simulations"
PATIENCE_S = 30
BUCKETS = 1024
APIS = 2

WAITS_US = (0, 0, 0, 1, 1, 2, 3, 5, 8, 13, 30, 60, -1, -4, -40)
LONG_WAITS_US = (200, 1_000, 3_000)
LEASES_US = (2, 4, 20, 50)
AMOUNTS = (1, 2, 9, 30, 200)
COMMANDS = ("start",) * 5 + ("heartbeat",) * 6 + ("credit",) * 3 + ("pause", "stop")
STEPS = (
    *("command",) * 66,
    *("late",) * 6,  # one that was held up on its way
    *("again",) * 5,  # one that was sent before, to the letter
    *("race",) * 7,
    *("passes",) * 6,
    *("death",) * 3,  # an API process dies between two statements
    *("card",) * 3,
    *("cut",) * 1,  # all connections to the database are lost
    *("deploy",) * 1,  # an API process is replaced by one with other settings
    *("outage",) * 1,  # nobody passes, beats or asks for long
)


@dataclass(slots=True)
class Api:
    """An API process, the settings it has, and connections to it."""

    pid: int
    port: int
    settings: Settings
    connections: list[http.client.HTTPConnection] = field(default_factory=list)

    def connection(self, number: int) -> http.client.HTTPConnection:
        """Return one of several connections, opened when it is first asked for."""
        while len(self.connections) <= number:
            self.connections.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S))
        return self.connections[number]

    def close(self) -> None:
        """Close the connections."""
        for connection in self.connections:
            connection.close()


@dataclass(frozen=True, slots=True)
class Request:
    """A command on its way to an API process, which may be doomed."""

    api: Api
    command: Command
    die_at: int = 0


class History:
    """A history under way."""

    def __init__(self, seed: int, *, processes: Processes, admin: psycopg.Connection, clock: Clock) -> None:
        self.rng = random.Random(seed)
        self.look = random.Random(-seed)  # for what is looked at, which depends on the outcomes too
        self.processes = processes
        self.admin = admin
        self.clock = clock
        self.now = clock.now
        self.totals: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=40)
        self.users = self._users()
        self.beliefs: dict[str, list[Belief]] = {user_id: [Belief()] for user_id in self.users}
        self.cards: dict[str, Card] = {}
        self.held_up: list[Command] = []
        self.sent: list[Command] = []
        self.keys = 0
        self.apis: list[Api] = []

    def _users(self) -> list[str]:
        count = self.rng.choice((1, 2, 3, 5))
        users = [f"user-{n}" for n in range(count)]
        if self.rng.random() < 0.5:  # all in one bucket, and so in one batch of a pass
            bucket = zlib.crc32(users[0].encode()) % BUCKETS
            same = (
                f"user-{n}" for n in range(count, 1_000_000) if zlib.crc32(f"user-{n}".encode()) % BUCKETS == bucket
            )
            users[1:] = [next(same) for _ in users[1:]]
        return users

    # --- what happens -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Bring up the service, and the advisors' cards."""
        self.apis = [self._new_api() for _ in range(APIS)]
        for advisor_id in sorted(set(CHATS.values())):
            self._put_card(advisor_id)

    def step(self) -> None:
        """Let something happen, and compare."""
        rng = self.rng
        what = rng.choice(STEPS)
        wait_us = rng.choice(LONG_WAITS_US if what == "outage" else WAITS_US)
        self.now += wait_us
        self.clock.set(self.now)
        self.log.append(f"{self.now} ({wait_us:+d}) {what}")
        self.totals["steps"] += 1
        touched: set[str] = set()
        match what:
            case "command":
                command = self._command()
                if rng.random() < 0.06:
                    self.held_up.append(command)
                else:
                    touched = self._send([self._request(command)])
            case "late" if self.held_up:
                touched = self._send([self._request(self.held_up.pop(rng.randrange(len(self.held_up))))])
            case "again" if self.sent:
                touched = self._send([self._request(self.sent[-rng.randint(1, min(4, len(self.sent)))])])
            case "race":
                touched = self._race()
            case "passes":
                touched = self._pass()
            case "death":
                touched = self._send([self._request(self._command(), die_at=rng.randint(1, 16))])
            case "card":
                self._put_card(rng.choice(sorted(set(CHATS.values()))))
            case "cut":
                self._cut()
            case "deploy":
                self._replace(rng.randrange(APIS))
        self._compare(touched)

    def end(self) -> None:
        """Compare all there is, and once more after a last pass."""
        self._compare_all()
        self._pass_alone(batch_accounts=500, count=1)
        self._compare_all()

    def close(self) -> None:
        """Close the connections."""
        for api in self.apis:
            api.close()

    def _command(self, user_id: str | None = None) -> Command:
        rng = self.rng
        user_id = user_id or rng.choice(self.users)
        what = rng.choice(COMMANDS)
        chat_id = rng.choice(sorted(CHATS))
        if what == "credit":
            self.keys += 1
            # Now and then a key that belongs to an earlier request.
            key = f"credit-{self.keys if rng.random() < 0.9 else rng.randint(1, self.keys)}"
            return Command(user_id=user_id, what=what, key=key, kind=rng.choice(KINDS), amount=rng.choice(AMOUNTS))
        if what == "start":
            advisor_id = CHATS[chat_id] if rng.random() < 0.97 else rng.choice(sorted(set(CHATS.values())))
            key = rng.choice((None, None, "k1", "k2", "k3"))
            return Command(user_id=user_id, what=what, chat_id=chat_id, advisor_id=advisor_id, key=key)
        return Command(user_id=user_id, what=what, chat_id=chat_id)

    def _request(self, command: Command, *, die_at: int = 0) -> Request:
        return Request(self.rng.choice(self.apis), command, die_at)

    def _race(self) -> set[str]:
        rng = self.rng
        user_id = rng.choice(self.users)
        commands = [self._command(user_id if rng.random() < 0.8 else None) for _ in range(rng.choice((1, 2, 2, 3)))]
        if rng.random() < 0.3:
            commands[-1] = commands[0]
        # At most one of them is doomed: its process takes the others that it has with it.
        doomed = rng.random() < 0.15
        requests = [
            self._request(c, die_at=rng.randint(1, 16) if doomed and not n else 0) for n, c in enumerate(commands)
        ]
        pids = [self._sweep() for _ in range(rng.choice((0, 1, 1, 2)))] if len(commands) < 3 else []
        touched = self._send(requests, passing=bool(pids))
        for pid in pids:
            self._passed(pid)
        if pids:
            self._settle()
            touched |= self._maybe_materialized()
        return touched

    def _send(self, requests: Sequence[Request], *, passing: bool = False) -> set[str]:
        """Send commands at the same time, and work out what may be stored after them."""
        raced = passing or len(requests) > 1
        for number, request in enumerate(requests):
            self._write(request, number)
        sent = []
        dead: set[int] = set()
        for number, request in enumerate(requests):
            answer = self._read(request.api.connection(number))
            self.log.append(f"    {request.command} -> {answer.status if answer else None} from {request.api.pid}")
            around = Circumstances(self.now, request.api.settings, dict(self.cards), raced)
            sent.append(Sent(request.command, around, answer))
            self.sent.append(request.command)
            self.totals["commands"] += 1
            if answer is None:
                self.totals["unanswered"] += 1
                dead.add(request.api.pid)
        for place, api in enumerate(self.apis):
            if api.pid in dead:
                assert any(request.die_at and request.api is api for request in requests), "a process died by itself"
                self.totals["killed api"] += 1
                self._replace(place)
        if dead:
            self._settle()
        users = {request.command.user_id for request in requests}
        for user_id in sorted(users):
            theirs = [one for one in sent if one.command.user_id == user_id]
            self.beliefs[user_id] = after_commands(
                self.beliefs[user_id], theirs, passed_at=self.now if passing else None, user_id=user_id
            )
        return users

    def _write(self, request: Request, number: int) -> None:
        command = request.command
        headers = {"Authorization": f"Bearer {KEY}"}
        body: object = None
        if command.what == "credit":
            path = f"/v1/users/{command.user_id}/credits"
            body = {"kind": command.kind, "amount": amount(command.amount)}
        else:
            path = f"/v1/users/{command.user_id}/chats/{command.chat_id}/{command.what}"
            if command.what == "start":
                body = {"advisor_id": command.advisor_id}
        if command.key is not None:
            headers["Idempotency-Key"] = command.key
        if request.die_at:
            headers[DIE_AT] = str(request.die_at)
        if body is not None:
            headers["Content-Type"] = "application/json"
        content = None if body is None else json.dumps(body)
        request.api.connection(number).request("POST", path, content, headers)

    def _read(self, connection: http.client.HTTPConnection) -> Answer | None:
        try:
            response = connection.getresponse()
            raw = response.read()
        except (ConnectionError, http.client.HTTPException):
            connection.close()
            return None
        if response.status >= 500:
            raise Difference(f"{response.status} {raw.decode()}")
        return Answer(response.status, json.loads(raw))

    def _get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        connection = self.look.choice(self.apis).connection(0)
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        answer = self._read(connection)
        if answer is None or answer.status != 200:
            raise Difference(f"GET {path}: {answer}")
        return answer.body

    def _put_card(self, advisor_id: str) -> None:
        rng = self.rng
        card = Card(rng.choice(RATES), *rng.choice(BLOCKS), rng.choice((0, 1, 5, 13, 40)))
        body = (
            f'{{"credits_per_minute": "{amount(card.rate)}", "free_seconds": {seconds(card.free_us)},'
            f' "first_seconds": {seconds(card.first_us)}, "increment_seconds": {seconds(card.increment_us)}}}'
        )
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection = rng.choice(self.apis).connection(0)
        connection.request("PUT", f"/v1/advisors/{advisor_id}", body, headers)
        answer = self._read(connection)
        if answer is None or answer.status != 200:
            raise Difference(f"PUT of a card: {answer}")
        self.cards[advisor_id] = card

    # --- passes -------------------------------------------------------------------------------------------------------

    def _sweep(self, die_at: int = 0) -> int:
        return self.processes.sweep(batch_accounts=self.rng.choice((1, 2, 500)), die_at=die_at)

    def _pass(self) -> set[str]:
        kind = self.rng.choice(("one", "one", "two", "dies", "dies"))
        if kind == "dies":
            self._passed(self._sweep(die_at=self.rng.randint(1, 30)))
            self._settle()
            return self._maybe_materialized()
        self._pass_alone(batch_accounts=self.rng.choice((1, 2, 500)), count=2 if kind == "two" else 1)
        return set(self.users)

    def _pass_alone(self, *, batch_accounts: int, count: int) -> None:
        """Let passes run that meet no command; all that is due must be written after them."""
        pids = [self.processes.sweep(batch_accounts=batch_accounts, die_at=0) for _ in range(count)]
        for pid in pids:
            self._passed(pid)
        self._settle()
        for user_id, beliefs in self.beliefs.items():
            written = [belief.materialized(self.now) for belief in beliefs]
            self.beliefs[user_id] = distinct(
                written + [belief for belief in beliefs if not belief.must_be_materialized(self.now)]
            )

    def _passed(self, pid: int) -> None:
        code = self.processes.wait(pid)
        self.totals["passes"] += 1
        if code == -9:
            self.totals["killed reconciler"] += 1
        elif code != 0:
            raise Difference(f"a pass ended with {code}")

    def _maybe_materialized(self) -> set[str]:
        for user_id, beliefs in self.beliefs.items():
            self.beliefs[user_id] = distinct(beliefs + [belief.materialized(self.now) for belief in beliefs])
        return set(self.users)

    # --- the service --------------------------------------------------------------------------------------------------

    def _new_api(self) -> Api:
        rng = self.rng
        lease_us = rng.choice(LEASES_US)
        settings = Settings(rng.choice(SCOPES), lease_us, lease_us + rng.choice((1, 10, 60)))
        variables = {
            "TALKTIME_SERVICE_KEY": KEY,
            "TALKTIME_EXCLUSIVE": settings.scope,
            "TALKTIME_LEASE_SECONDS": seconds(settings.lease_us),
            "TALKTIME_HEARTBEAT_SECONDS": seconds(1),
            "TALKTIME_ABANDON_AFTER_SECONDS": seconds(settings.abandon_after_us),
        }
        api = Api(*self.processes.serve(variables), settings)
        self.log.append(f"    new API process {api.pid}: {settings}")
        return api

    def _replace(self, place: int) -> None:
        """Replace an API process, dead or alive, by another one."""
        self.apis[place].close()
        self.processes.kill(self.apis[place].pid)
        self.apis[place] = self._new_api()

    def _cut(self) -> None:
        self.totals["cuts"] += 1
        self.admin.execute(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend' AND application_name = 'talktime'"
        )

    def _settle(self) -> None:
        """Wait until the database has rolled back what dead processes were at."""
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'talktime' AND (state <> 'idle' OR backend_xid IS NOT NULL)"
        )
        for _ in range(1000):
            if self.admin.execute(query).fetchone() == (0,):
                return
            time.sleep(0.005)
        message = "the database goes on with what dead processes began"
        raise Difference(message)

    # --- looking ------------------------------------------------------------------------------------------------------

    def _compare(self, touched: set[str]) -> None:
        """Compare the users that something happened to, those of whom it is not certain, and one more."""
        users = touched | {user_id for user_id, beliefs in self.beliefs.items() if len(beliefs) > 1}
        users.add(self.look.choice(self.users))
        for user_id in sorted(users):
            kind = self.look.choice(("list", "list", "list", "each", "account", "by state"))
            self._look_at(user_id, "list" if len(self.beliefs[user_id]) > 1 else kind)

    def _look_at(self, user_id: str, kind: str) -> None:
        beliefs = self.beliefs[user_id]
        account = beliefs[0].account
        if account is None and len(beliefs) == 1:
            self._expect_no_account(user_id)
        elif kind == "each":
            assert account is not None
            for chat_id in account.chats:
                self._narrow(user_id, [self._get(f"/v1/users/{user_id}/chats/{chat_id}")], whole=False)
        elif kind == "account":
            self._compare_account(user_id)
        elif kind == "by state":
            self._compare_by_state(user_id)
        else:
            page = self._list(user_id)
            self._narrow(user_id, page, whole=True)

    def _list(self, user_id: str) -> list[Any] | None:
        connection = self.look.choice(self.apis).connection(0)
        connection.request("GET", f"/v1/users/{user_id}/chats?limit=200", headers={"Authorization": f"Bearer {KEY}"})
        answer = self._read(connection)
        assert answer is not None
        if answer.status == 404:
            return None
        assert answer.status == 200, answer
        items: list[Any] = answer.body["items"]
        return items

    def _expect_no_account(self, user_id: str) -> None:
        if self._list(user_id) is not None:
            raise Difference(f"user {user_id} has an account")

    def _narrow(self, user_id: str, shown: list[Any] | None, *, whole: bool) -> None:
        """Keep the beliefs that readings, all of the user's if `whole`, agree with."""
        mismatches, left = [], []
        for belief in self.beliefs[user_id]:
            mismatch = self._mismatch(belief.account, shown, whole=whole)
            if mismatch is None:
                left.append(belief)
            else:
                mismatches.append(mismatch)
        self.totals["readings"] += len(shown or ())
        if not left:
            raise Difference(f"user {user_id}: " + "\n or ".join(mismatches))
        self.beliefs[user_id] = left

    def _mismatch(self, account: Reference | None, shown: list[Any] | None, *, whole: bool) -> str | None:
        if account is None or shown is None:
            return None if account is None and shown is None else "there is an account on one side only"
        if whole:
            order = sorted(account.chats.values(), key=lambda c: (c.started_at, c.chat_id), reverse=True)
            if [chat.chat_id for chat in order] != [body["chat_id"] for body in shown]:
                return f"shown are {[body['chat_id'] for body in shown]}"
        for body in shown:
            mismatch = reading_mismatch(figures(account, body["chat_id"], self.now), body)
            if mismatch is not None:
                return mismatch
        return None

    def _certain(self, user_id: str) -> Reference:
        account = self.beliefs[user_id][0].account
        assert account is not None
        return account

    def _compare_by_state(self, user_id: str) -> None:
        account = self._certain(user_id)
        state = self.look.choice(("running", "lapsed", "paused", "exhausted", "abandoned", "ended"))
        page = self._get(f"/v1/users/{user_id}/chats?state={state}")["items"]
        expected = {chat_id for chat_id in account.chats if figures(account, chat_id, self.now)["state"] == state}
        _same(f"chats that are {state}", expected, {body["chat_id"] for body in page})
        self._narrow(user_id, page, whole=False)

    def _compare_account(self, user_id: str) -> None:
        account = self._certain(user_id)
        shown = self._get(f"/v1/users/{user_id}/account")
        view = account.copy()
        view.advance(max(self.now, view.at))
        running = {chat_id: chat for chat_id, chat in view.chats.items() if chat.state == "running"}
        accrued = sum(chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.open_count) for chat in running.values())
        _same("running chats", sorted(running), [body["chat_id"] for body in shown["running"]])
        _same("balance", (view.balance, accrued), (micro(shown["balance"]), micro(shown["accrued"])))
        _same("instants", (view.at, account.at), (instant(shown["as_of"]), instant(shown["materialized_through"])))
        self._narrow(user_id, shown["running"], whole=False)

    def _compare_all(self) -> None:
        for user_id in self.users:
            self._look_at(user_id, "list")
            if self.beliefs[user_id][0].account is not None:
                self._look_at(user_id, "account")
                self._compare_receipts(user_id)
                self._compare_ledger(user_id)

    def _compare_receipts(self, user_id: str) -> None:
        view = self._certain(user_id).copy()
        view.advance(max(self.now, view.at))
        for chat_id in view.chats:
            expected = [
                (s.started_at, s.ended_at, s.reason, s.free_us, s.paid_us, s.cost)
                for s in view.segments
                if s.chat_id == chat_id
            ]
            shown = [
                (
                    instant(item["started_at"]),
                    instant(item["ended_at"]),
                    item["stop_reason"],
                    item["free_us"],
                    item["paid_us"],
                    micro(item["cost"]),
                )
                for item in self._pages(f"/v1/users/{user_id}/chats/{chat_id}/segments")
                if item["ended_at"] is not None
            ]
            _same(f"receipt of {user_id}'s chat {chat_id}", expected, shown)

    def _compare_ledger(self, user_id: str) -> None:
        belief = self.beliefs[user_id][0]
        assert belief.account is not None
        lines = list(reversed(list(self._pages(f"/v1/users/{user_id}/ledger"))))
        charges = sorted(
            (item["chat_id"], instant(item["segment_started_at"]), micro(item["amount"]))
            for item in lines
            if item["kind"] == "charge"
        )
        _same(
            f"charges of {user_id}",
            sorted((s.chat_id, s.started_at, -s.cost) for s in belief.account.segments if s.cost),
            charges,
        )
        booked = Counter((item["kind"], abs(micro(item["amount"]))) for item in lines if item["kind"] != "charge")
        _same(f"credits of {user_id}", Counter((c.kind, c.amount) for c in belief.credits.values()), booked)
        sum_us = 0
        for number, item in enumerate(lines, start=1):
            sum_us += micro(item["amount"])
            _same(f"ledger of {user_id}", (number, sum_us), (item["number"], micro(item["balance_after"])))

    def _pages(self, path: str) -> Iterator[Any]:
        page = self._get(f"{path}?limit=200")
        yield from page["items"]
        while page["next"] is not None:
            page = self._get(f"{path}?limit=200&cursor={page['next']}")
            yield from page["items"]


def _same(what: str, expected: object, shown: object) -> None:
    if expected != shown:
        raise Difference(f"{what}: expected {expected}, got {shown}")
