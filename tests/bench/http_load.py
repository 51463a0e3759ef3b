"""The load generator, a process of its own: ``python -m tests.bench.http_load``, told what to do by a line of JSON.

It shares the cores with what it measures, so it does as little as it can: requests are bytes that were made before,
each client keeps one connection and has one request in flight, and of an answer only the status and the length are
read. Told no time (``"us": 0``), all clients connect, and each sends one request when the next line comes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

OK = 200
PATIENCE_S = 60
RECEIVED_BYTES_MAX = 1 << 14  # more than a reading; a larger one would be got from the system anew each time
SHOWN_BYTES_MAX = 600
_US_NS = 1000

_READING = select.EPOLLIN
_WRITING = select.EPOLLIN | select.EPOLLOUT

_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_STATUS = slice(9, 12)  # after "HTTP/1.1 "


class NotUnderstood(Exception):
    """What came is no answer that this generator can read."""


def size_of(received: bytes) -> int | None:
    """Return how many bytes the answer has that begins here, or None while its head is not complete.

    Raises:
        NotUnderstood: it does not say how long it is.
    """
    head_size = received.find(_END_OF_HEAD)
    if head_size < 0:
        return None
    head = received[:head_size].lower()
    found = head.find(_LENGTH)
    if found < 0:
        raise NotUnderstood(shown(received))
    begin = found + len(_LENGTH)
    end = head.find(b"\r\n", begin)
    return head_size + len(_END_OF_HEAD) + int(head[begin:] if end < 0 else head[begin:end])


def status_of(answer: bytes) -> int:
    """Return the status of an answer whose head is complete."""
    return int(answer[_STATUS])


def shown(answer: bytes) -> str:
    """Return the beginning of an answer, for people."""
    return answer[:SHOWN_BYTES_MAX].decode("latin-1")


class Client:
    """A connection with at most one request in flight; its requests go round."""

    __slots__ = ("_received", "_requests", "_unsent", "sent_ns", "socket")

    def __init__(self, connected: socket.socket, requests: Sequence[bytes]) -> None:
        self.socket = connected
        self.socket.settimeout(0)
        self.sent_ns = 0
        self._requests = cycle(requests)
        self._unsent = b""
        self._received = b""

    def send(self) -> bool:
        """Send the next request; False if some of it has to wait until there is room, for `flush`."""
        self._unsent = next(self._requests)
        self.sent_ns = time.perf_counter_ns()
        return self.flush()

    def flush(self) -> bool:
        """Send what is left of a request; False if some is left still."""
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        return not self._unsent

    def receive(self) -> bytes | None:
        """Take what has come; return the answer, or None while it is not complete.

        Raises:
            NotUnderstood: it is none, or more than one.
            OSError: there is no connection any more.
        """
        received = self.socket.recv(RECEIVED_BYTES_MAX)
        if not received:
            message = "the server closed the connection"
            raise ConnectionResetError(message)
        if self._received:
            received = self._received + received
        size = size_of(received)
        if size is None or len(received) < size:
            self._received = received
            return None
        if len(received) > size:
            raise NotUnderstood(shown(received[size:]))
        self._received = b""
        return received


@dataclass(slots=True)
class Tally:
    """What came of a load: answers of all of it by status, and of the time that counts the latency of each answer.

    That time begins with an answer, which does not count, and ends with one, which does; so the rate is right also
    where answers are few. `failure` is the first thing that was not as it should be.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_us: list[int] = field(default_factory=list)
    elapsed_us: int = 0
    failure: str = ""

    def count(self, answer: bytes) -> None:
        """Count an answer by its status."""
        status = status_of(answer)
        self.statuses[status] += 1
        if status != OK and not self.failure:
            self.failure = shown(answer)

    def as_json(self) -> dict[str, Any]:
        """Return it as it is told to whoever started the generator."""
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "latencies_us": self.latencies_us,
            "elapsed_us": self.elapsed_us,
            "failure": self.failure,
            "generator_cpu_us": time.process_time_ns() // _US_NS,
        }


@contextlib.contextmanager
def connected(address: tuple[str, int], requests: Sequence[bytes], clients: int) -> Iterator[list[Client]]:
    """Connect the clients and deal the requests out to them, as far as there are any: each has its own."""
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(clients):
            connection = stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.append(Client(connection, requests[number % len(requests) :: clients]))
        yield made


def keep_busy(clients: Iterable[Client], *, warm_up_us: int, us: int) -> Tally:
    """Let each client send its next request as soon as the last one is answered, for so long after a warm-up."""
    tally = Tally()
    by_descriptor = {client.socket.fileno(): client for client in clients}
    in_flight = len(by_descriptor)
    counts_from_ns = time.perf_counter_ns() + warm_up_us * _US_NS
    began_ns = ended_ns = 0
    is_over = False
    with select.epoll() as epoll:
        for descriptor, client in by_descriptor.items():
            epoll.register(descriptor, _READING if client.send() else _WRITING)
        while in_flight:
            for descriptor, answer in _answers(epoll, by_descriptor):
                now_ns = time.perf_counter_ns()
                client = by_descriptor[descriptor]
                tally.count(answer)
                if not began_ns:
                    began_ns = now_ns if now_ns >= counts_from_ns else 0
                elif not is_over:
                    tally.latencies_us.append((now_ns - client.sent_ns) // _US_NS)
                    ended_ns = now_ns
                    is_over = now_ns >= began_ns + us * _US_NS
                if is_over or tally.failure:
                    in_flight -= 1  # what is under way is waited for, so that it does not burden what comes next
                elif not client.send():
                    epoll.modify(descriptor, _WRITING)
    tally.elapsed_us = max(ended_ns - began_ns, 0) // _US_NS
    return tally


def take_answers(clients: Iterable[Client]) -> Tally:
    """Take the answer to the request that each client has sent."""
    tally = Tally()
    began_ns = time.perf_counter_ns()
    by_descriptor = {client.socket.fileno(): client for client in clients}
    with select.epoll() as epoll:
        for descriptor in by_descriptor:
            epoll.register(descriptor, _READING)
        while tally.statuses.total() < len(by_descriptor):
            for descriptor, answer in _answers(epoll, by_descriptor):
                tally.count(answer)
                tally.latencies_us.append((time.perf_counter_ns() - by_descriptor[descriptor].sent_ns) // _US_NS)
    tally.elapsed_us = (time.perf_counter_ns() - began_ns) // _US_NS
    return tally


def _answers(epoll: select.epoll, clients: Mapping[int, Client]) -> Iterator[tuple[int, bytes]]:
    """Wait, send what could not be sent, and yield the answers that are complete."""
    events = epoll.poll(PATIENCE_S)
    if not events:
        message = f"no answer in {PATIENCE_S} s"
        raise TimeoutError(message)
    for descriptor, event in events:
        client = clients[descriptor]
        if event & select.EPOLLOUT:
            if client.flush():
                epoll.modify(descriptor, _READING)
        elif (answer := client.receive()) is not None:
            yield descriptor, answer


def main() -> int:
    """Do what the line on the standard input says, and write a line about what came of it."""
    plan = json.loads(sys.stdin.readline())
    written = json.loads(Path(plan["requests"]).read_text())
    begin = plan["begin"]
    written = written[begin:] + written[:begin]
    requests = [request.encode("latin-1") for request in written[plan["first"] :: plan["step"]] or written]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    tally = Tally()
    try:
        with connected((plan["host"], plan["port"]), requests, plan["clients"]) as clients:
            if plan["us"]:
                tally = keep_busy(clients, warm_up_us=plan["warm_up_us"], us=plan["us"])
            else:
                print(json.dumps({"connected": len(clients)}), flush=True)
                sys.stdin.readline()
                print(json.dumps({"sent": sum(client.send() for client in clients)}), flush=True)
                tally = take_answers(clients)
    except (OSError, NotUnderstood) as error:
        tally.failure = f"{type(error).__name__}: {error}"
    print(json.dumps(tally.as_json()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
