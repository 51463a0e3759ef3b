"""The batcher alone: who is answered with whom, and what becomes of those who fail, give up, or come too late."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talktime.batching import Batcher
from talktime.errors import DatabaseUnavailable, Overloaded

HANGS_AFTER_SECONDS = 20


class Desk:
    """Answers batches, each when it is let: with the item and the number of the batch, counted from 1."""

    def __init__(self, *, failing: Mapping[str, Exception] | None = None, unknown: str = "") -> None:
        self.batches: list[list[str]] = []
        self.failing = failing or {}
        self.unknown = unknown
        self._begun: asyncio.Queue[list[str]] = asyncio.Queue()
        self._let = asyncio.Semaphore(0)
        self._busy = False

    async def answer(self, items: Sequence[str]) -> dict[str, str]:
        assert not self._busy, "one batch at a time"
        self._busy = True
        self.batches.append(list(items))
        number = len(self.batches)
        self._begun.put_nowait(list(items))
        await self._let.acquire()
        self._busy = False
        for item in items:
            if item in self.failing:
                raise self.failing[item]
        return {item: f"{item} in {number}" for item in items if item not in self.unknown}

    async def begun(self) -> list[str]:
        """Wait for the next batch, and return its items."""
        async with asyncio.timeout(HANGS_AFTER_SECONDS):
            return await self._begun.get()

    def let(self, batches: int = 1) -> None:
        """Let so many batches be answered, now or when they come."""
        for _ in range(batches):
            self._let.release()


def asking(batcher: Batcher[str, str], items: str) -> list[asyncio.Task[str | None]]:
    """Let one client after the other ask for the items."""
    return [asyncio.create_task(batcher.ask(item)) for item in items]


async def turns() -> None:
    """Let all go on that waits for nothing."""
    for _ in range(5):
        await asyncio.sleep(0)


async def told(tasks: Sequence[asyncio.Task[str | None]]) -> list[str | BaseException | None]:
    """Wait for all answers and return them, or what was raised instead."""
    async with asyncio.timeout(HANGS_AFTER_SECONDS):
        return await asyncio.gather(*tasks, return_exceptions=True)


# --- who shares a batch -----------------------------------------------------------------------------------------------


async def test_the_first_is_answered_at_once_and_those_who_come_meanwhile_share_the_next_batch() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer)
    first = asking(batcher, "a")
    assert ["a"] == await desk.begun()
    others = asking(batcher, "bcd")
    await turns()
    assert [["a"]] == desk.batches
    desk.let()
    assert ["a in 1"] == await told(first)
    assert ["b", "c", "d"] == await desk.begun()
    assert not any(task.done() for task in others)
    desk.let()
    assert ["b in 2", "c in 2", "d in 2"] == await told(others)


async def test_those_who_ask_at_the_same_time_share_the_first_batch() -> None:
    desk = Desk()
    desk.let()
    assert ["a in 1", "b in 1", "c in 1"] == await told(asking(Batcher(desk.answer), "abc"))
    assert [["a", "b", "c"]] == desk.batches


async def test_an_item_is_answered_once_for_all_who_wait_for_it() -> None:
    desk = Desk()
    desk.let()
    assert ["a in 1", "b in 1", "a in 1", "a in 1"] == await told(asking(Batcher(desk.answer), "abaa"))
    assert [["a", "b"]] == desk.batches


async def test_who_asks_for_what_is_being_answered_gets_a_later_answer_of_his_own() -> None:
    # The batch under way may have looked before he did what he now wants to see.
    desk = Desk()
    batcher = Batcher(desk.answer)
    early = asking(batcher, "a")
    await desk.begun()
    late = asking(batcher, "a")
    await turns()
    desk.let(2)
    assert ["a in 1", "a in 2"] == await told(early + late)


async def test_what_has_no_answer_is_answered_with_none() -> None:
    desk = Desk(unknown="b")
    desk.let()
    assert ["a in 1", None, "c in 1"] == await told(asking(Batcher(desk.answer), "abc"))


async def test_a_batch_is_no_larger_than_it_may_be_and_who_came_first_is_in_the_first() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer, items_max=3)
    desk.let(4)
    # One who asks for what waits already takes no place of his own.
    answers = await told(asking(batcher, "abcadefgd"))
    assert [["a", "b", "c"], ["d", "e", "f"], ["g"]] == desk.batches
    assert ["a in 1", "b in 1", "c in 1", "a in 1", "d in 2", "e in 2", "f in 2", "g in 3", "d in 2"] == answers


async def test_it_goes_on_after_a_rest() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer)
    desk.let(2)
    assert ["a in 1"] == await told(asking(batcher, "a"))
    await turns()
    assert ["b in 2"] == await told(asking(batcher, "b"))


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_an_item_that_fails_fails_those_who_asked_for_it_and_nobody_else() -> None:
    failure = ValueError("c")
    desk = Desk(failing={"c": failure})
    desk.let(10)
    a, b, c, d, again = await told(asking(Batcher(desk.answer), "abcdc"))
    assert ["a", "b", "d"] == [str(answer)[0] for answer in (a, b, d)]
    assert failure is c is again
    assert ["a", "b", "c", "d"] == desk.batches[0]


async def test_one_that_fails_among_many_is_found_by_halving(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(failing={"c": ValueError("c")})
    desk.let(10)
    await told(asking(Batcher(desk.answer), "abcdefgh"))
    assert ["abcdefgh", "abcd", "ab", "cd", "c", "d", "efgh"] == ["".join(batch) for batch in desk.batches]
    assert 1 == len(caplog.records)


async def test_items_that_fail_each_for_a_reason_of_its_own_are_told_that_one() -> None:
    failing = {item: ValueError(item) for item in "ace"}
    desk = Desk(failing=failing)
    desk.let(20)
    a, b, c, d, e = await told(asking(Batcher(desk.answer), "abcde"))
    assert [failing["a"], failing["c"], failing["e"]] == [a, c, e]
    assert ["b", "d"] == [str(answer)[0] for answer in (b, d)]


async def test_who_comes_while_a_batch_that_failed_is_gone_through_again_is_in_the_next() -> None:
    desk = Desk(failing={"b": ValueError()})
    batcher = Batcher(desk.answer)
    early = asking(batcher, "abc")
    assert ["a", "b", "c"] == await desk.begun()
    desk.let()
    await desk.begun()
    late = asking(batcher, "ad")
    await turns()
    desk.let(10)
    await told(early)
    number = len(desk.batches)
    assert [f"a in {number}", f"d in {number}"] == await told(late)
    assert ["a", "d"] == desk.batches[-1]
    assert not any(batch == ["a", "d"] for batch in desk.batches[:-1])


async def test_a_database_that_does_not_answer_is_not_asked_again_for_each_item() -> None:
    away = DatabaseUnavailable()
    desk = Desk(failing={"b": away})
    batcher = Batcher(desk.answer)
    first = asking(batcher, "abcd")
    await desk.begun()
    second = asking(batcher, "ef")
    await turns()
    desk.let(2)
    assert [away] * 4 == await told(first)
    assert ["e in 2", "f in 2"] == await told(second)
    assert [["a", "b", "c", "d"], ["e", "f"]] == desk.batches


# --- those who give up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("under_way", [False, True], ids=["while-it-waits", "while-it-is-answered"])
async def test_one_who_gives_up_takes_nobody_along(*, under_way: bool) -> None:
    desk = Desk()
    batcher = Batcher(desk.answer)
    first = asking(batcher, "z")
    await desk.begun()
    quitter, companion, neighbour = others = asking(batcher, "aab")
    await turns()
    if under_way:
        desk.let()
        assert ["a", "b"] == await desk.begun()
    quitter.cancel()
    await turns()
    assert quitter.cancelled()
    desk.let(2)
    assert ["z in 1"] == await told(first)
    assert ["a in 2", "b in 2"] == await told(others[1:])
    assert companion.result() == "a in 2"
    assert neighbour.result() == "b in 2"


async def test_one_who_gives_up_on_what_fails_leaves_no_trace() -> None:
    desk = Desk(failing={"a": ValueError()})
    batcher = Batcher(desk.answer)
    quitter, companion = asking(batcher, "aa")
    await desk.begun()
    quitter.cancel()
    await turns()
    desk.let()
    [error] = await told([companion])
    assert isinstance(error, ValueError)


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_when_too_many_wait_the_next_is_refused_at_once_and_nothing_is_done_for_him() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer, waiting_max=3)
    waiting = asking(batcher, "aab")
    await desk.begun()
    for refused in await told(asking(batcher, "cc")):
        assert isinstance(refused, Overloaded)
    desk.let(2)
    assert ["a in 1", "a in 1", "b in 1"] == await told(waiting)
    assert ["d in 2"] == await told(asking(batcher, "d"))
    assert [["a", "b"], ["d"]] == desk.batches


async def test_who_was_answered_failed_or_gave_up_makes_room() -> None:
    desk = Desk(failing={"b": ValueError()})
    batcher = Batcher(desk.answer, waiting_max=1)
    desk.let(10)
    for item in "aba":
        await told(asking(batcher, item))
    [quitter] = asking(batcher, "c")
    await turns()
    quitter.cancel()
    await turns()
    assert ["d in 5"] == await told(asking(batcher, "d"))


async def test_those_who_give_up_and_come_again_do_not_let_the_queue_grow_past_its_bound() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer, waiting_max=3)
    first = asking(batcher, "a")
    await desk.begun()
    for item in "bcdefgh":
        [quitter] = asking(batcher, item)
        await turns()
        quitter.cancel()
        await turns()
    last = asking(batcher, "z")
    await turns()
    desk.let(2)
    await told(first + last)
    assert all(len(batch) <= 3 for batch in desk.batches), desk.batches


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_draining_waits_for_all_who_wait_those_who_come_meanwhile_too() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer, items_max=2)
    waiting = asking(batcher, "abc")
    await desk.begun()
    draining = asyncio.create_task(batcher.drain())
    await turns()
    late = asking(batcher, "d")
    await turns()
    desk.let()
    assert ["c", "d"] == await desk.begun()
    await turns()
    assert not draining.done()
    desk.let()
    async with asyncio.timeout(HANGS_AFTER_SECONDS):
        await draining
    assert ["a in 1", "b in 1", "c in 2", "d in 2"] == [task.result() for task in waiting + late]


async def test_draining_is_done_at_once_where_nobody_waits() -> None:
    batcher = Batcher(Desk().answer)
    async with asyncio.timeout(HANGS_AFTER_SECONDS):
        await batcher.drain()


async def test_draining_that_is_given_up_gives_up_nobody_who_waits() -> None:
    desk = Desk()
    batcher = Batcher(desk.answer)
    waiting = asking(batcher, "ab")
    await desk.begun()
    draining = asyncio.create_task(batcher.drain())
    await turns()
    draining.cancel()
    await turns()
    desk.let()
    assert ["a in 1", "b in 1"] == await told(waiting)


# --- any order of events ----------------------------------------------------------------------------------------------

ITEMS_MAX, WAITING_MAX = 2, 4
FAILING = {"x": ValueError("x"), "y": KeyError("y")}

events = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abcxy")),
        st.tuples(st.just("give up"), st.integers(0, 20)),
        st.tuples(st.just("let"), st.just(None)),
    ),
    max_size=30,
)


@given(events)
def test_whatever_happens_everybody_gets_an_answer_of_his_own_that_is_no_older_than_his_question(
    happening: list[tuple[str, str | int | None]],
) -> None:
    asyncio.run(_live_through(happening))


async def _live_through(happening: list[tuple[str, str | int | None]]) -> None:
    desk = Desk(failing=FAILING)
    batcher = Batcher(desk.answer, items_max=ITEMS_MAX, waiting_max=WAITING_MAX)
    # What was asked for, and how many batches had begun before.
    askers: list[tuple[str, int, asyncio.Task[str | None]]] = []
    for what, which in happening:
        if what == "ask":
            full = sum(not task.done() for *_, task in askers) >= WAITING_MAX
            begun_before = len(desk.batches)
            [task] = asking(batcher, str(which))
            await turns()
            assert full == (task.done() and isinstance(task.exception(), Overloaded))
            if not full:
                askers.append((str(which), begun_before, task))
        elif what == "let":
            desk.let()
        elif askers:
            askers[int(which or 0) % len(askers)][2].cancel()
        await turns()
    desk.let(200)
    answers = await told([task for *_, task in askers])
    async with asyncio.timeout(HANGS_AFTER_SECONDS):
        await batcher.drain()
    for (item, begun_before, task), answer in zip(askers, answers, strict=True):
        if task.cancelled():
            continue
        if item in FAILING:
            assert FAILING[item] is answer
            continue
        assert isinstance(answer, str)
        answered, number = answer.split(" in ")
        assert item == answered
        assert int(number) > begun_before
        assert item in desk.batches[int(number) - 1]
    for batch in desk.batches:
        assert 1 <= len(batch) <= ITEMS_MAX
        assert len(batch) == len(set(batch))
