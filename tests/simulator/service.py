"""The service as its callers meet it: API processes, and requests to them, several of which can be under way."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tests.meter.histories import Card, Settings
from tests.simulator.processes import DIE_AT, STALL_AT
from tests.simulator.readings import amount, seconds

KEY = "a-service-key-for-simulations"
PATIENCE_S = 30


class Difference(AssertionError):
    """The service shows what it must not."""


def differ(where: str, what: object) -> NoReturn:
    """Say what is shown that must not be, and where.

    Raises:
        Difference: always.
    """
    message = f"{where}: {what}"
    raise Difference(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A request about one user: start, heartbeat, pause, stop, credit, or read, which changes nothing.

    A heartbeat can be one `among_many`, in the request that has room for thousands.
    """

    user_id: str
    what: str
    chat_id: str = ""
    advisor_id: str = ""
    key: str | None = None
    kind: str = ""
    amount: int = 0
    among_many: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, or the result of a heartbeat among many, which is short."""

    status: int
    body: Any
    is_short: bool = False


@dataclass(slots=True)
class Api:
    """An API process, the settings it has, and connections to it."""

    pid: int
    port: int
    settings: Settings
    _connections: list[http.client.HTTPConnection] = field(default_factory=list)

    def send(self, command: Command, *, die_at: int = 0, stall_at: int = 0, connection: int = 0) -> None:
        """Send a command on one of several connections; the process may die or stand still at an event of it."""
        headers = {DIE_AT: str(die_at), STALL_AT: str(stall_at)} if die_at or stall_at else {}
        if command.key is not None:
            headers["Idempotency-Key"] = command.key
        chat = f"/v1/users/{command.user_id}/chats/{command.chat_id}"
        match command.what:
            case "read":
                self._send("GET", chat, None, headers, connection)
            case "credit":
                body = {"kind": command.kind, "amount": amount(command.amount)}
                self._send("POST", f"/v1/users/{command.user_id}/credits", json.dumps(body), headers, connection)
            case "start":
                self._send("POST", f"{chat}/start", json.dumps({"advisor_id": command.advisor_id}), headers, connection)
            case "heartbeat" if command.among_many:
                beats = {"beats": [{"user_id": command.user_id, "chat_id": command.chat_id}]}
                self._send("POST", "/v1/heartbeats", json.dumps(beats), headers, connection)
            case _:
                self._send("POST", f"{chat}/{command.what}", None, headers, connection)

    def answer(self, connection: int = 0, *, may_fail: bool = False) -> Answer | None:
        """Wait for the answer to what was sent on a connection; None if the process died on it.

        Raises:
            Difference: it does not come, or is a server error other than the 503 that it may be if it `may_fail`.
        """
        try:
            response = self._connection(connection).getresponse()
            raw = response.read()
        except TimeoutError:
            differ(f"API process {self.pid}", f"no answer in {PATIENCE_S} s")
        except (ConnectionError, http.client.HTTPException):
            self._connection(connection).close()
            return None
        body, status, is_short = json.loads(raw), response.status, False
        if status == http.client.OK and "results" in body:
            [body] = body["results"]
            status, is_short = body["status"], True
        if may_fail and status == http.client.SERVICE_UNAVAILABLE:
            return Answer(status, None)
        if status >= http.client.INTERNAL_SERVER_ERROR:
            differ(f"API process {self.pid}", f"{status} {raw.decode()}")
        return Answer(status, body, is_short)

    def get(self, path: str) -> Answer:
        """Read something."""
        self._send("GET", path, None, {}, 0)
        return self._certain(path)

    def get_pages(self, path: str, query: str, *, limit: int) -> Iterator[Any]:
        """Read all items of a list, in pages of so many."""
        cursor: str | None = ""
        while cursor is not None:
            answer = self.get(f"{path}?limit={limit}{query}" + (f"&cursor={cursor}" if cursor else ""))
            if answer.status != http.client.OK:
                differ(path, answer)
            yield from answer.body["items"]
            cursor = answer.body["next"]

    def put_card(self, advisor_id: str, card: Card) -> None:
        """Set an advisor's rate card."""
        path = f"/v1/advisors/{advisor_id}"
        body = (
            f'{{"credits_per_minute": "{amount(card.rate)}", "free_seconds": {seconds(card.free_us)},'
            f' "first_seconds": {seconds(card.first_us)}, "increment_seconds": {seconds(card.increment_us)}}}'
        )
        self._send("PUT", path, body, {}, 0)
        answer = self._certain(path)
        if answer.status != http.client.OK:
            differ(path, answer)

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()

    def _send(self, method: str, path: str, body: str | None, headers: dict[str, str], connection: int) -> None:
        content = {} if body is None else {"Content-Type": "application/json"}
        everything = {"Authorization": f"Bearer {KEY}", **content, **headers}
        try:
            self._connection(connection).request(method, path, body, everything)
        except ConnectionError:
            self._connection(connection).close()  # it has died; who asks for the answer will see

    def _connection(self, number: int) -> http.client.HTTPConnection:
        while len(self._connections) <= number:
            self._connections.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S))
        return self._connections[number]

    def _certain(self, path: str) -> Answer:
        answer = self.answer()
        if answer is None:
            differ(path, "no answer")
        return answer
