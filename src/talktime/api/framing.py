"""What is taken for an HTTP request, and where it ends: one at a time, and only what everybody would read alike.

The parser is llhttp, as strict as it can be. What is left to see to: it has no limits, takes as much as it is given,
calls a request complete that asks for an upgrade, and knows more than HTTP/1.0 and HTTP/1.1. Where a proxy and this
server could come to different ends of a request, somebody could hide a request in another.
"""

from __future__ import annotations

import re

import httptools
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from talktime.api.problems import INVALID_INPUT, raw_problem

HEAD_BYTES_MAX = 64 * 1024
"""The request line and the headers together; and what else a client may send that is no body, in one go."""
_EMPTY_LINE = b"\n\r\n"
_UPGRADE = re.compile(rb"(?<=\r\n)upgrade:[^\r\n]*\r\n", re.IGNORECASE)
_VERSIONS = ("1.1", "1.0")


class OneAtATime(HttpToolsProtocol):
    """Reads a request, and no further until it is answered; what comes in the meantime waits, and stops the client."""

    cycle: RequestResponseCycle | None  # type: ignore[assignment] # None before the first request, whatever uvicorn says

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type] # whatever uvicorn gives
        self.parser = httptools.HttpRequestParser(self)  # with none of the leniency that uvicorn asks for
        self.is_in_body = False
        self._unread = bytearray()
        self._body_bytes_left = 0  # of a body whose length was given
        self._bare = bytearray()  # what came since the last that was a body, or since the last request

    # --- reading ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read on."""
        self._unread += data
        self._read_on()

    def on_response_complete(self) -> None:
        """Read the next request, if it is there."""
        super().on_response_complete()
        if self._unread and not self.transport.is_closing():
            self._read_on()

    def _read_on(self) -> None:
        self._unset_keepalive_if_required()
        try:
            while not self._is_answering() and (part := self._next_part()):
                self._parse(part)
        except HttpParserError:
            self._refuse()
            return
        if self._unread and self._is_answering():
            self.flow.pause_reading()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.is_in_body

    def _next_part(self) -> bytes:
        """Return what the parser may have next: a request can end where it does, but not before."""
        unread = self._unread
        if self.is_in_body and self._body_bytes_left > 0:
            size = self._body_bytes_left
        elif (found := unread.find(_EMPTY_LINE)) >= 0:
            size = found + len(_EMPTY_LINE)
        else:
            size = len(unread) - _waiting(unread)
        part = bytes(unread[:size])
        del unread[:size]
        return part

    def _parse(self, part: bytes) -> None:
        self._bare += part
        if not self.is_in_body and len(self._bare) > HEAD_BYTES_MAX:
            raise HttpParserError
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            self._parse_without_upgrade()
        if self.is_in_body and len(self._bare) > HEAD_BYTES_MAX:
            raise HttpParserError

    def _parse_without_upgrade(self) -> None:
        """Parse the head once more as if no upgrade had been asked for: none is offered, and there may be a body."""
        head = _UPGRADE.sub(b"", self._bare)
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade as error:  # CONNECT
            raise HttpParserError from error

    # --- what the parser found ----------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, but no trailer: those would be headers that nobody has checked."""
        if not self.is_in_body:
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Begin to answer, if this is a request that can only be read in one way."""
        if self.parser.should_upgrade():
            return
        version = self.parser.get_http_version()
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version.encode())
        is_http = version in _VERSIONS and self._bare.lstrip(b"\r\n").startswith(line)
        if not (is_http and _is_target(self.url) and _is_plain(version, self.headers)):
            raise HttpParserError
        self.expect_100_continue &= version == "1.1"
        super().on_headers_complete()
        self.is_in_body = True
        self._body_bytes_left = int(dict(self.headers).get(b"content-length", 0))
        self._bare.clear()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._body_bytes_left -= len(body)
        self._bare.clear()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the request as complete, unless it was not even begun."""
        if self.is_in_body:
            self.is_in_body = False
            self._bare.clear()
            super().on_message_complete()

    # --- what is no request -------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Answer what is not HTTP, and close: who waits for the rest of a body is then told that the client is gone."""
        cycle = self.cycle if self.is_in_body else None
        # There is nothing to say where an answer has begun already.
        if cycle is None or not cycle.response_started:
            answer = raw_problem(INVALID_INPUT, "this is not an HTTP/1.1 request", {"connection": "close"})
            lines = b"".join(b"%b: %b\r\n" % header for header in answer.headers)
            self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[answer.status], lines, answer.body))
        self.transport.close()


def _waiting(unread: bytearray) -> int:
    """Return how many of the last bytes may be the beginning of an empty line, and wait for its rest."""
    if unread.endswith(b"\n\r"):
        return 2
    return unread.endswith(b"\n") and not unread.endswith(b"\n\n")


def _is_plain(version: str, headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether it is clear for which host this is, and how its body ends."""
    names = [name for name, _ in headers]
    if names.count(b"host") > 1 or (version == "1.1" and b"host" not in names):
        return False
    encodings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    return not encodings or (encodings == [b"chunked"] and version == "1.1")


def _is_target(target: bytes) -> bool:
    """Return whether there is a path, and nothing that only a browser should see."""
    return b"#" not in target and (target.startswith(b"/") or httptools.parse_url(target).path is not None)
