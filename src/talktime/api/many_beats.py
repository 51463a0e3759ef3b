"""The body with heartbeats for many chats. It is decoded for thousands of them, one of which may be malformed."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

BEATS_MAX = 10_000


class Beat(Struct, frozen=True, forbid_unknown_fields=True):
    """The chat that a heartbeat is for. What is wrong with it is told in its result: it does not concern the others."""

    user_id: str
    chat_id: str


NO_BEAT = Beat("", "")
"""In the place of one that is malformed: such are no ids."""


class BeatsBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Heartbeats for many chats."""

    beats: Annotated[list[Beat], Meta(max_length=BEATS_MAX)]


class AnyBeats(Struct, frozen=True, forbid_unknown_fields=True):
    """The same, whatever is in the list."""

    beats: Annotated[list[msgspec.Raw], Meta(max_length=BEATS_MAX)]


_AT_ONCE = msgspec.json.Decoder(BeatsBody)


def decode_beats(raw: bytes) -> BeatsBody | None:
    """Decode heartbeats: all at once, or if that fails each by itself, so that one that is malformed fails no other.

    None if the body as a whole is none, or they are too many.
    """
    with contextlib.suppress(ValueError, RecursionError):
        body = _AT_ONCE.decode(raw)
        if _names_each_once(body, raw):
            return body
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(raw.decode(), object_pairs_hook=tuple, parse_int=float, parse_constant=_refuse_constant)
        match document:
            case tuple((("beats", list(sent)),)) if len(sent) <= BEATS_MAX:
                return BeatsBody([_beat(value) for value in sent])
    return None


def _names_each_once(body: BeatsBody, raw: bytes) -> bool:
    """Tell whether heartbeats certainly name no member twice, without going through thousands of them once more."""
    # Without a backslash all names are in plain letters, and what is in quotes is a name or a whole id.
    counts = [raw.count(b'"user_id"'), raw.count(b'"chat_id"'), raw.count(b'"beats"')]
    return b"\\" not in raw and counts == [len(body.beats), len(body.beats), 1]


def _beat(value: object) -> Beat:
    """Return the heartbeat in a JSON value, whose objects are tuples of their members."""
    match value:
        case tuple(
            (("user_id", str(user_id)), ("chat_id", str(chat_id)))
            | (("chat_id", str(chat_id)), ("user_id", str(user_id)))
        ):
            return Beat(user_id, chat_id)
    return NO_BEAT


def _refuse_constant(name: str) -> None:
    """Refuse NaN and the like, which JSON does not have."""
    raise ValueError(name)
