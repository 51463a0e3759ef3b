"""The load generator: reading answers, however they are cut, and counting what they say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h11
import pytest

from tests.bench.http_load import Client, NotUnderstood, connected, keep_busy, size_of, status_of, take_answers
from tests.bench.service import batch_body, request

REQUEST = request("GET", "/v1/users/u1/chats/c1", "127.0.0.1:1", "key")
ANSWER = b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 11\r\ncontent-type: text/plain\r\n\r\nhello\r\n\r\nyo"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length:2\r\n\r\nno"
EMPTY = b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize("answer", [ANSWER, REFUSAL, EMPTY], ids=["200", "503", "204"])
def test_an_answer_is_as_long_as_it_says(answer: bytes) -> None:
    assert len(answer) == size_of(answer)


@pytest.mark.parametrize("cut", range(len(ANSWER)))
def test_an_answer_without_its_whole_head_has_no_size_yet(cut: int) -> None:
    head_size = ANSWER.index(b"hello")
    assert (len(ANSWER) if cut >= head_size else None) == size_of(ANSWER[:cut])


def test_an_answer_that_does_not_say_how_long_it_is_is_not_understood() -> None:
    with pytest.raises(NotUnderstood, match="transfer-encoding"):
        size_of(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")


def test_a_length_elsewhere_is_none() -> None:
    with pytest.raises(NotUnderstood):
        size_of(b"HTTP/1.1 200 OK\r\nx-content-length: 5\r\n\r\ncontent-length: 5\r\n\r\n")


@pytest.fixture
def pair() -> Iterator[tuple[Client, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Client(ours, [REQUEST]), theirs


@pytest.mark.parametrize("cut", range(1, len(ANSWER)))
def test_an_answer_in_two_pieces_is_whole_after_the_second(pair: tuple[Client, socket.socket], cut: int) -> None:
    client, server = pair
    server.send(ANSWER[:cut])
    assert client.receive() is None
    server.send(ANSWER[cut:])
    assert ANSWER == client.receive()


def test_answers_in_single_bytes_are_told_apart(pair: tuple[Client, socket.socket]) -> None:
    client, server = pair
    for answer in (ANSWER, REFUSAL, EMPTY):
        for byte in answer[:-1]:
            server.send(bytes([byte]))
            assert client.receive() is None
        server.send(answer[-1:])
        assert answer == client.receive()
        assert int(answer[9:12]) == status_of(answer)


def test_more_than_one_answer_is_not_understood(pair: tuple[Client, socket.socket]) -> None:
    client, server = pair
    server.send(ANSWER + EMPTY)
    with pytest.raises(NotUnderstood, match="204"):
        client.receive()


def test_a_closed_connection_is_an_error(pair: tuple[Client, socket.socket]) -> None:
    client, server = pair
    server.close()
    with pytest.raises(ConnectionResetError):
        client.receive()


def test_requests_go_round(pair: tuple[Client, socket.socket]) -> None:
    _, server = pair
    client = Client(pair[0].socket, [b"one", b"two"])
    sent = []
    for _ in range(3):
        assert client.send()
        sent.append(server.recv(100))
    assert [b"one", b"two", b"one"] == sent


# --- against servers --------------------------------------------------------------------------------------------------


@contextmanager
def answering(answer_for: Callable[[int], bytes]) -> Iterator[tuple[str, int]]:
    """Answer each request with what the function says for its number on the connection, from 0."""

    def converse(connection: socket.socket) -> None:
        with connection:
            peer = h11.Connection(h11.SERVER)
            number = 0
            while data := connection.recv(1 << 16):
                peer.receive_data(data)
                while (event := peer.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                    if isinstance(event, h11.EndOfMessage):
                        connection.sendall(answer_for(number))
                        number += 1
                        # Its own half was answered by hand.
                        peer.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                        peer.send(h11.EndOfMessage())
                        peer.start_next_cycle()

    def accept() -> None:
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threads.append(threading.Thread(target=converse, args=[connection]))
                threads[-1].start()

    listener = socket.create_server(("127.0.0.1", 0))
    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)


def test_every_answer_is_counted_and_those_after_the_warm_up_have_latencies() -> None:
    answered = []

    def answer(number: int) -> bytes:
        answered.append(number)
        return ANSWER

    with answering(answer) as address, connected(address, [REQUEST], 3) as clients:
        tally = keep_busy(clients, warm_up_us=200_000, us=50_000)
    assert "" == tally.failure
    assert {200: len(answered)} == dict(tally.statuses)
    assert 50_000 <= tally.elapsed_us < 5_000_000
    # The one with which the time began, those of the warm-up, and those that were waited for at the end do not count.
    assert 0 < len(tally.latencies_us) < len(answered) - 3
    assert all(0 <= us <= tally.elapsed_us for us in tally.latencies_us)


def test_an_answer_that_is_not_200_ends_it_and_is_shown() -> None:
    with (
        answering(lambda number: REFUSAL if number == 5 else ANSWER) as address,
        connected(address, [REQUEST], 2) as clients,
    ):
        tally = keep_busy(clients, warm_up_us=0, us=60_000_000)
    assert tally.failure.startswith("HTTP/1.1 503 Service Unavailable")
    assert tally.failure.endswith("no")
    assert 1 <= tally.statuses[503] <= 2


def test_a_request_that_is_larger_than_what_the_kernel_takes_at_once_is_sent_whole() -> None:
    large = request("POST", "/v1/heartbeats", "127.0.0.1:1", "key", batch_body(["user"] * 200_000))
    assert len(large) > 1 << 22
    with answering(lambda _: ANSWER) as address, connected(address, [large], 2) as clients:
        tally = keep_busy(clients, warm_up_us=0, us=1)
    assert "" == tally.failure
    assert tally.statuses[200] >= 2


def test_those_who_send_at_once_get_an_answer_each() -> None:
    with answering(lambda _: ANSWER) as address, connected(address, [REQUEST], 20) as clients:
        assert all(client.send() for client in clients)
        tally = take_answers(clients)
    assert (20, 20) == (tally.statuses[200], len(tally.latencies_us))


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "body"), [("GET", None), ("POST", None), ("POST", b'{"beats": []}')])
def test_a_request_is_one_that_a_server_understands(method: str, body: bytes | None) -> None:
    server = h11.Connection(h11.SERVER)
    server.receive_data(request(method, "/v1/x", "127.0.0.1:80", "secret", body))
    head = server.next_event()
    assert isinstance(head, h11.Request)
    assert (method.encode(), b"/v1/x") == (head.method, head.target)
    assert (b"authorization", b"Bearer secret") in head.headers
    received = b""
    while isinstance(event := server.next_event(), h11.Data):
        received += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert (body or b"") == received
