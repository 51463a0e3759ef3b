"""Arrays go to PostgreSQL as text: whatever ids and keys hold, it reads what was meant."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.engine import URL

from reconciler.sweep import sweep
from talktime import beats, operations
from talktime.meter.state import Scope
from talktime.meter.units import END_OF_TIME_US
from talktime.store.statements import array_literal
from talktime.store.tables import datetime_of
from tests.database import Clock, Databases
from tests.store.many_chats import HANGS_AFTER_SECONDS, TINY, beats_at, chat_rows, start
from tests.support import FREE_OF_CHARGE, audit_lines, open_service

TEXTS = st.text(st.sampled_from("{}\",\\' NULnul%$:;\n\t\x01\u00e4\u20ac\U0001f600()[]")) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"])
)
SYNTAX = ["NULL", "null", None, "", " ", '"', "\\", '\\"', "{", "}", "{}", ",", "a,b", "'", "\\N", "%s", " a ", "--"]


@given(st.lists(st.none() | TEXTS))
@example(SYNTAX)
def test_an_array_of_texts_is_read_as_it_was_meant(databases: Databases, values: list[str | None]) -> None:
    assert (values,) == databases.admin.execute("SELECT %s::text[]", [array_literal(values)]).fetchone()


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)))
def test_an_array_of_integers_is_read_as_it_was_meant(databases: Databases, values: list[int | None]) -> None:
    assert (values,) == databases.admin.execute("SELECT %s::bigint[]", [array_literal(values)]).fetchone()


@given(st.lists(st.none() | st.integers(0, END_OF_TIME_US - 1)))
def test_an_array_of_instants_is_read_to_the_microsecond(databases: Databases, values: list[int | None]) -> None:
    literal = array_literal(None if at is None else datetime_of(at) for at in values)
    query = "SELECT array(SELECT (extract(epoch FROM at) * 1000000)::bigint FROM unnest(%s::timestamptz[]) at)"
    assert (values,) == databases.admin.execute(query, [literal]).fetchone()


async def test_ids_are_nothing_but_ids(database_url: URL, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "SECONDS_MAX", HANGS_AFTER_SECONDS)
    ids = ["NULL", "null", "-", "...", "@", "|", "-_.:@+=~|", "0", "x" * 128]
    keys = [(user_id, chat_id) for user_id in ids for chat_id in {"NULL": None, "-_.:@+=~|": None, user_id: None}]
    policy = TINY._replace(scope=Scope.NONE)
    async with open_service(database_url, policy=policy, card=FREE_OF_CHARGE) as service:
        for user_id, chat_id in keys:
            await start(service, user_id, chat_id, advisor_id=chat_id)
        clock.tick(50)
        for ask in (operations.read_chat, operations.heartbeat):
            found = await asyncio.gather(*(ask(service, *key) for key in keys))
            assert [(*key, key[1], 50) for key in keys] == [
                (a.user_id, a.chat_id, a.advisor_id, a.elapsed_us) for a in found
            ]
        clock.tick(1)
        assert ["running"] * len(keys) == await beats.heartbeats(service, keys)
        assert {clock.now} == beats_at(database_url, keys)
        await sweep(service.database, asyncio.Event())
        assert not await audit_lines(service.database)


async def test_start_keys_are_nothing_but_keys(database_url: URL, clock: Clock) -> None:
    keys = ['"', "\\", '\\"', "NULL", "null", "{}", ",", " ", "'", json.dumps({"a": "b"}), "%s", "$1", ":x"]
    keys.append("".join(map(chr, range(32, 127))))
    async with open_service(database_url, policy=TINY, card=FREE_OF_CHARGE) as service:
        for n, key in enumerate(keys):
            chat_id = f"c{n}"
            await operations.start(service, "u", chat_id, advisor_id="a", key=key)
            clock.tick(10)
            # This writes the whole row, the key in it.
            paused = await operations.pause(service, "u", chat_id)
            assert paused == await operations.start(service, "u", chat_id, advisor_id="a", key=key)
        rows = {row["chat_id"]: row["start_key"] for row in chat_rows(database_url, ["u"])["u"]}
        assert {f"c{n}": key for n, key in enumerate(keys)} == rows
