"""A host product that receives webhooks: a real HTTP server on loopback, which takes only what is signed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from standardwebhooks import Webhook

from reconciler.delivery import Delivered, deliver
from talktime import operations
from talktime.meter.state import CreditKind, RateCard, Tariff
from talktime.webhooks import WebhookSettings
from tests.database import connect
from tests.program import written
from tests.support import CREDIT, S, open_service

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.engine import URL

    from talktime.operations import Service

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CARD = RateCard(Tariff(60 * CREDIT), 4 * S)
LOW_US = 10 * S
OTHER_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


@dataclass(slots=True)
class Receiver:
    """What came, in order, with the id of each; and what is answered, 204 unless a test says otherwise."""

    url: str = ""
    ids: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], int] = lambda _: 204
    answer_bytes: int = 0
    hangs: threading.Event | None = None
    came: threading.Event = field(default_factory=threading.Event)

    @property
    def settings(self) -> WebhookSettings:
        return WebhookSettings(url=self.url, secrets=(SECRET,), low_us=10 * S)

    @property
    def numbers(self) -> list[tuple[str, int]]:
        return [(event["data"]["user_id"], event["number"]) for event in self.events]

    def forget(self) -> None:
        self.ids.clear()
        self.events.clear()


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    together = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            # Raises for what is not signed, which the sender sees as no answer.
            event = Webhook(SECRET).verify(body, dict(self.headers))
            assert self.headers["content-type"] == "application/json"
            with together:
                receiver.ids.append(self.headers["webhook-id"])
                receiver.events.append(event)
            receiver.came.set()
            if receiver.hangs is not None:
                receiver.hangs.wait(30)
                self.close_connection = True
                return
            answer = json.dumps({"took": event["number"]}).encode() + bytes(receiver.answer_bytes)
            status = receiver.answer(event)
            self.send_response(status)
            self.send_header("content-length", "0" if status == 204 else str(len(answer)))
            self.end_headers()
            if status != 204:
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        receiver.url = f"http://127.0.0.1:{server.server_address[1]}/hooks"
        try:
            yield receiver
        finally:
            if receiver.hangs is not None:
                receiver.hangs.set()
            server.shutdown()
            serving.join()


def telling(url: URL) -> AbstractAsyncContextManager[Service]:
    return open_service(url, card=CARD, low_us=LOW_US)


async def deliver_now(service: Service, receiver: Receiver) -> Delivered:
    return await deliver(service.database, receiver.settings, asyncio.Event())


async def credit(service: Service, user_id: str, key: str = "k", amount: int = 50 * CREDIT) -> None:
    await operations.credit(service, user_id, kind=CreditKind.PURCHASE, amount=amount, memo="", key=key)


def variables_of(url: URL, receiver: Receiver) -> dict[str, str]:
    return {
        "TALKTIME_DATABASE_URL": written(url),
        "TALKTIME_WEBHOOK_URL": receiver.url,
        "TALKTIME_WEBHOOK_SECRET": receiver.settings.secrets[0],
        "TALKTIME_BALANCE_LOW_SECONDS": "0",
    }


def scalar(url: URL, query: str) -> Any:  # noqa: ANN401 - as the query has it
    with connect(url) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
