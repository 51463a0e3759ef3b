"""A host product that receives webhooks: a real HTTP server on loopback, which takes only what is signed."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

from talktime.webhooks import WebhookSettings
from tests.support import S

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
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
