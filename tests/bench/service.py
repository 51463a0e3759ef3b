"""The API under load: a process of its own, run as it is run by users, and the requests that are sent to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import jwt
from sqlalchemy.engine import URL

from tests.bench.figures import percentile
from tests.bench.http_load import OK
from tests.bench.population import ABANDON_AFTER_S, CHAT, LEASE_S, Population
from tests.bench.programs import BenchmarkFailed, Program, cpu_us, module, started
from tests.bench.rounds import S_US, Run, per_second
from tests.database import connect
from tests.program import TALKTIME, environment, written

START_S = 60
TOKEN_S = 86_400
PER_USER_DEFAULT = 20  # requests a second that a process takes of each user
LISTENING = r"^listening on http://(\S+)$"
BATCH_PATH = "/v1/heartbeats"
_ISSUER = "https://login.example"


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """A running API over a population."""

    program: Program
    address: str
    population: Population
    key: str
    secret: str

    def token(self, user_id: str, issued_at: int) -> str:
        """Return a token of the host product for a user."""
        claims = {"iss": _ISSUER, "aud": "talktime", "sub": user_id, "iat": issued_at, "exp": issued_at + TOKEN_S}
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def tokens(self, users: Sequence[str]) -> list[str]:
        """Return a token for each user."""
        with connect(self.population.url) as connection:
            row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::bigint").fetchone()
        assert row is not None
        return [self.token(user_id, row[0]) for user_id in users]

    def reading(self, user_id: str, credential: str) -> bytes:
        """Return a request for a reading."""
        return request("GET", _chat(user_id), self.address, credential)

    def heartbeat(self, user_id: str) -> bytes:
        """Return a request with a heartbeat."""
        return request("POST", f"{_chat(user_id)}/heartbeat", self.address, self.key)

    def batch(self, users: Sequence[str]) -> bytes:
        """Return a request with a heartbeat for each user."""
        return request("POST", BATCH_PATH, self.address, self.key, batch_body(users))

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send one request with the service key, and return status and body."""
        connection = http.client.HTTPConnection(self.address, timeout=START_S)
        headers = {"Authorization": f"Bearer {self.key}"} | ({"Content-Type": "application/json"} if body else {})
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def one_reading(self) -> bytes:
        """Return the body of a reading.

        Raises:
            BenchmarkFailed: it is none.
        """
        [user_id] = self.population.some_users(1)
        status, body = self.ask("GET", _chat(user_id))
        if status != OK or not json.loads(body)["accruing"]:
            message = f"no reading of a running chat but {status}: {body.decode(errors='replace')}"
            raise BenchmarkFailed(message)
        return body


def _chat(user_id: str) -> str:
    return f"/v1/users/{user_id}/chats/{CHAT}"


def batch_body(users: Sequence[str]) -> bytes:
    """Return the body of a batch of heartbeats."""
    return json.dumps({"beats": [{"user_id": user_id, "chat_id": CHAT} for user_id in users]}).encode()


def request(method: str, path: str, host: str, credential: str, body: bytes | None = None) -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {credential}"]
    if body is not None:
        lines += ["Content-Type: application/json"]
    if method != "GET":
        lines += [f"Content-Length: {len(body or b'')}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + (body or b"")


@contextlib.contextmanager
def serving(population: Population, folder: Path, *, per_user: int = PER_USER_DEFAULT) -> Iterator[Api]:
    """Run ``talktime serve`` over a population until the block ends."""
    key, secret = secrets.token_urlsafe(32), secrets.token_urlsafe(48)
    variables = environment(
        TALKTIME_DATABASE_URL=written(population.url),
        TALKTIME_SERVICE_KEY=key,
        TALKTIME_TOKEN_SECRET=secret,
        TALKTIME_TOKEN_ISSUER=_ISSUER,
        TALKTIME_LEASE_SECONDS=str(LEASE_S),
        TALKTIME_ABANDON_AFTER_SECONDS=str(ABANDON_AFTER_S),
        TALKTIME_USER_REQUESTS_PER_SECOND=str(per_user),
    )
    name = f"API of {population.url.database}"
    with started(name, TALKTIME, "serve", "--port", "0", folder=folder, environment=variables) as program:
        address = program.wait_for(LISTENING, START_S)
        api = Api(program=program, address=address, population=population, key=key, secret=secret)
        status, body = api.ask("GET", "/readyz")
        if status != OK:
            program.fail(f"is not ready: {body.decode(errors='replace')}")
        yield api


@contextlib.contextmanager
def serving_bare(app: str, answer: bytes, folder: Path) -> Iterator[tuple[Program, str]]:
    """Run the bare route, or the server alone, with a constant answer, until the block ends."""
    with started(app, *module("tests.bench.bare"), folder=folder, environment=environment()) as program:
        program.tell(app=app, answer=answer.decode())
        yield program, program.wait_for(LISTENING, START_S)


def url_environment(url: URL) -> dict[str, str]:
    """Return the environment of a worker: its database is not for the list of processes, which all may read."""
    return environment(TALKTIME_DATABASE_URL=written(url))


# --- load -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load: requests in a file, sent to a server by so many clients in so many processes."""

    name: str
    server: Program
    address: str
    requests: Path
    clients: int
    generators: int
    warm_up_us: int
    us: int
    folder: Path

    def run(self, *, each: int = 1, begin: int = 0) -> Run:
        """Run it from a request on, and return its raw numbers; `each` is how much one answer stands for.

        Raises:
            BenchmarkFailed: an answer was not 200.
        """
        computed_before = cpu_us(self.server.pid)
        with contextlib.ExitStack() as stack:
            programs = [
                stack.enter_context(
                    started(f"load generator {n}", *module("tests.bench.http_load"), folder=self.folder)
                )
                for n in range(self.generators)
            ]
            for number, program in enumerate(programs):
                clients = len(range(number, self.clients, self.generators))
                share = Share(number, len(programs), clients, begin)
                program.tell(**plan(self.address, self.requests, share, warm_up_us=self.warm_up_us, us=self.us))
            patience_s = 3 * START_S + (self.warm_up_us + self.us) / S_US
            answers = [program.answer(patience_s) for program in programs]
        return self._summed(answers, each) | {"server_cpu_us": cpu_us(self.server.pid) - computed_before}

    def _summed(self, answers: Sequence[Run], each: int) -> Run:
        failures = [answer["failure"] for answer in answers if answer["failure"]]
        if failures:
            message = f"{self.name}: {failures[0]}"
            raise BenchmarkFailed(message)
        latencies_us = sorted(us for answer in answers for us in answer["latencies_us"])
        return {
            "rate": each * sum(per_second(len(answer["latencies_us"]), answer["elapsed_us"]) for answer in answers),
            "answers": len(latencies_us),
            "answers_with_warm_up": sum(count for answer in answers for count in answer["statuses"].values()),
            "elapsed_us": max(answer["elapsed_us"] for answer in answers),
            "latency_us": {
                "p50": percentile(latencies_us, 50),
                "p99": percentile(latencies_us, 99),
                "max": percentile(latencies_us, 100),
            },
            "generator_cpu_us": sum(answer["generator_cpu_us"] for answer in answers),
        }


class Share(NamedTuple):
    """A load generator's share: each `step`-th request from the `first` on, so many clients, and where they begin."""

    first: int
    step: int
    clients: int
    begin: int = 0


def plan(address: str, requests: Path, share: Share, *, warm_up_us: int = 0, us: int = 0) -> dict[str, object]:
    """Return what a load generator is told. Without a time each client sends one request, all at once."""
    parts = urlsplit(f"//{address}")
    return {
        "host": parts.hostname,
        "port": parts.port,
        "requests": str(requests),
        **share._asdict(),
        "warm_up_us": warm_up_us,
        "us": us,
    }


def write_requests(path: Path, requests: Sequence[bytes]) -> Path:
    """Write requests where load generators find them."""
    path.write_text(json.dumps([made.decode("latin-1") for made in requests]))
    path.chmod(0o600)  # there are credentials in it
    return path
