"""The service as its callers meet it: API processes, and requests to them, several of which can be under way."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tests.meter.histories import Card, Settings
from tests.simulator.processes import DIE_AT
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
    """A request that changes something: start, heartbeat, pause, stop or credit."""

    user_id: str
    what: str
    chat_id: str = ""
    advisor_id: str = ""
    key: str | None = None
    kind: str = ""
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: Any


@dataclass(slots=True)
class Api:
    """An API process, the settings it has, and connections to it."""

    pid: int
    port: int
    settings: Settings
    _connections: list[http.client.HTTPConnection] = field(default_factory=list)

    def send(self, command: Command, *, die_at: int = 0, connection: int = 0) -> None:
        """Send a command on one of several connections; the process dies at its `die_at`-th event, if that is not 0."""
        headers = {}
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
        if die_at:
            headers[DIE_AT] = str(die_at)
        self._send("POST", path, None if body is None else json.dumps(body), headers, connection)

    def answer(self, connection: int = 0) -> Answer | None:
        """Wait for the answer to what was sent on a connection; None if the process died on it.

        Raises:
            Difference: it is a server error, or does not come.
        """
        try:
            response = self._connection(connection).getresponse()
            raw = response.read()
        except TimeoutError:
            differ(f"API process {self.pid}", f"no answer in {PATIENCE_S} s")
        except (ConnectionError, http.client.HTTPException):
            self._connection(connection).close()
            return None
        if response.status >= http.client.INTERNAL_SERVER_ERROR:
            differ(f"API process {self.pid}", f"{response.status} {raw.decode()}")
        return Answer(response.status, json.loads(raw))

    def get(self, path: str) -> Answer:
        """Read something."""
        self._send("GET", path, None, {}, 0)
        return self._certain(path)

    def get_pages(self, path: str) -> Iterator[Any]:
        """Read all items of a list."""
        cursor: str | None = ""
        while cursor is not None:
            page = self.get(f"{path}?limit=200" + (f"&cursor={cursor}" if cursor else "")).body
            yield from page["items"]
            cursor = page["next"]

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
        self._connection(connection).request(method, path, body, everything)

    def _connection(self, number: int) -> http.client.HTTPConnection:
        while len(self._connections) <= number:
            self._connections.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S))
        return self._connections[number]

    def _certain(self, path: str) -> Answer:
        answer = self.answer()
        if answer is None:
            differ(path, "no answer")
        return answer
