"""What becomes of one user's old rows, case by case: decided from values alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talktime.legacy.rows import Figures, OldChat, OldRecord, OldUser
from talktime.legacy.taking_over import Decided, Rules, decide
from talktime.meter.state import Allowance, Chat, ChatState, Policy, RateCard, Scope, StopReason, Tariff

if TYPE_CHECKING:
    from collections.abc import Sequence

S = 1_000_000
NOW = 1_800_000_000 * S
CARD = RateCard(Tariff(60 * S), 180 * S)
RULES = Rules(Policy(Scope.ADVISOR, 15 * S, 300 * S), {"cheap": RateCard(Tariff(1), 7 * S)}, CARD)


def record(**changes: Any) -> OldRecord:  # noqa: ANN401 - of each column its own type
    """A plain record: a minute of chat `c` with `a`, silent for a day."""
    times = {"recorded_at": NOW - 90_000 * S, "heartbeat_at": NOW - 86_400 * S}
    plain = OldRecord("r1", "u", "a", "c", "60", "1.5", "30", "180", is_active=False, **times)
    return plain._replace(**changes)


def taken(
    *records: OldRecord,
    chats: Sequence[OldChat] = (),
    users: Sequence[OldUser] = (OldUser("u", "25"),),
    rules: Rules = RULES,
    user_id: str = "u",
    read_at: int = NOW,
) -> Decided:
    """Decide, and check what always holds: nothing is lost between before, after and what is listed."""
    decided = decide(user_id, users, records, chats, rules=rules, read_at=read_at, now=NOW)
    after = Figures()
    if decided.taken is not None:
        for opening in decided.taken.chats.values():
            after = after.plus(Figures(opening.elapsed_us, opening.free_us, opening.cost))
        after = after.plus(Figures(credits=max(0, decided.taken.credits)))
        assert decided.taken.account.at == NOW
        assert decided.taken.account.balance == max(0, decided.taken.credits)
    assert decided.before == after.plus(decided.left_out)
    return decided


def chat_of(decided: Decided, chat_id: str = "c") -> Chat:
    """Return the chat that was made."""
    assert decided.taken is not None
    return decided.taken.account.chats[chat_id]


def allowance_of(decided: Decided, advisor_id: str = "a") -> Allowance:
    """Return the pair's free time."""
    assert decided.taken is not None
    return decided.taken.account.allowances[advisor_id]


def reasons(decided: Decided) -> list[tuple[str, str]]:
    """Return what is listed, and why."""
    return [(one.row, one.reason) for one in decided.listed]


def test_an_inactive_record_becomes_history_with_its_totals_verbatim() -> None:
    decided = taken(record())
    chat = chat_of(decided)
    assert (ChatState.ENDED, StopReason.ENDED, NOW - 86_400 * S) == (chat.state, chat.stop_reason, chat.stopped_at)
    assert (60 * S, 30 * S, 1_500_000) == (chat.elapsed_us, chat.free_us, chat.cost)
    assert (NOW - 90_000 * S, NOW - 86_400 * S) == (chat.started_at, chat.last_heartbeat_at)
    assert Allowance(180 * S, 30 * S) == allowance_of(decided)
    assert [] == decided.listed


def test_an_active_record_that_was_just_heard_of_runs_on_from_the_import_and_the_gap_is_not_billed() -> None:
    chat = chat_of(taken(record(is_active=True, heartbeat_at=NOW - 14 * S)))
    assert (ChatState.RUNNING, NOW, 60 * S, 1_500_000) == (chat.state, chat.opened_at, chat.elapsed_us, chat.cost)


def test_who_was_heard_of_when_the_old_tables_were_read_runs_on_however_long_the_import_takes() -> None:
    chat = chat_of(taken(record(is_active=True, heartbeat_at=NOW - 60 * S), read_at=NOW - 46 * S))
    assert (ChatState.RUNNING, NOW, NOW) == (chat.state, chat.opened_at, chat.last_heartbeat_at)


def test_at_the_end_of_the_lease_an_active_record_has_lapsed() -> None:
    chat = chat_of(taken(record(is_active=True, heartbeat_at=NOW - 15 * S)))
    assert (ChatState.LAPSED, StopReason.LAPSED, NOW) == (chat.state, chat.stop_reason, chat.stopped_at)


def test_an_active_record_that_is_silent_for_long_is_abandoned() -> None:
    assert chat_of(taken(record(is_active=True))).state is ChatState.ABANDONED


def test_an_active_record_without_credits_is_exhausted_at_the_import() -> None:
    alive = record(is_active=True, heartbeat_at=NOW - S, free_time_used="180")
    chat = chat_of(taken(alive, users=[OldUser("u", "0")]))
    assert (ChatState.EXHAUSTED, StopReason.EXHAUSTED) == (chat.state, chat.stop_reason)


def test_of_active_records_with_one_advisor_the_one_heard_of_last_runs() -> None:
    alive = record(is_active=True, heartbeat_at=NOW - 2 * S)
    decided = taken(alive, alive._replace(record_id="r2", chat_id="d", heartbeat_at=NOW - S))
    assert (ChatState.PAUSED, StopReason.SWITCHED) == (chat_of(decided).state, chat_of(decided).stop_reason)
    assert chat_of(decided, "d").state is ChatState.RUNNING


def test_without_exclusivity_all_of_them_run() -> None:
    alive = record(is_active=True, heartbeat_at=NOW - 2 * S)
    decided = taken(
        alive,
        alive._replace(record_id="r2", chat_id="d"),
        rules=RULES._replace(policy=Policy(Scope.NONE, 15 * S, 300 * S)),
    )
    assert {ChatState.RUNNING} == {chat_of(decided, chat_id).state for chat_id in "cd"}


def test_free_time_is_shared_and_is_the_most_that_any_record_says() -> None:
    decided = taken(record(free_time_used="45"), record(record_id="r2", chat_id="d"))
    assert Allowance(180 * S, 45 * S) == allowance_of(decided)


def test_more_free_time_than_was_granted_is_used_up_and_listed() -> None:
    decided = taken(record(free_time_used="195"))
    assert Allowance(180 * S, 180 * S) == allowance_of(decided)
    assert [("advisor a", "195000000 us of free time used of 180000000 us: used up")] == reasons(decided)


def test_a_record_may_say_more_free_time_than_its_own_duration_and_keeps_it() -> None:
    decided = taken(record(duration="10"))
    assert decided.taken is not None
    assert (10 * S, 30 * S) == (chat_of(decided).free_us, decided.taken.chats["c"].free_us)
    assert [] == decided.listed


def test_what_nobody_says_was_granted_is_what_the_rate_card_grants() -> None:
    decided = taken(record(advisor_id="cheap", allocation=None, free_time_used="5"))
    assert Allowance(7 * S, 5 * S) == allowance_of(decided, "cheap")


def test_of_several_records_of_a_chat_the_one_heard_of_last_is_taken_and_the_others_are_listed() -> None:
    decided = taken(record(), record(record_id="r2", duration="99", heartbeat_at=NOW - 80_000 * S))
    assert chat_of(decided).elapsed_us == 99 * S
    assert [("record r1", "record r2 is of the same chat and was heard of later")] == reasons(decided)


def test_a_chat_without_a_record_is_history_with_its_own_duration() -> None:
    decided = taken(chats=[OldChat("c", "u", "a", "77.5")])
    assert (77_500_000, ChatState.ENDED) == (chat_of(decided).elapsed_us, chat_of(decided).state)
    assert [] == decided.listed


def test_a_chats_duration_is_its_records_told_again_and_is_not_added() -> None:
    decided = taken(record(), chats=[OldChat("c", "u", "a", "60")])
    assert (60 * S, []) == (chat_of(decided).elapsed_us, decided.listed)


def test_where_chat_and_record_differ_the_record_is_taken_and_that_is_listed() -> None:
    decided = taken(record(), chats=[OldChat("c", "u", "b", "61")])
    assert (60 * S, "a") == (chat_of(decided).elapsed_us, chat_of(decided).advisor_id)
    assert [
        ("chat c", "its advisor is b, its record's a: the record's is taken"),
        ("chat c", "its duration is not its record's (record r1): the record's is taken"),
    ] == reasons(decided)


def test_a_record_that_was_moved_leaves_its_other_chats_with_their_own_durations() -> None:
    chats = [OldChat("b", "u", "a", "20"), OldChat("c", "u", "a", "60")]
    decided = taken(record(), chats=chats)
    assert [20 * S, 60 * S] == [chat_of(decided, chat_id).elapsed_us for chat_id in "bc"]


def test_a_user_whom_nobody_knows_is_taken_over_without_credits() -> None:
    decided = taken(record(), users=[])
    assert chat_of(decided).elapsed_us == 60 * S
    assert [("user", "not in the users' table; taken over with no credits")] == reasons(decided)


@pytest.mark.parametrize("user_id", ["not an id!", "", "..", "x" * 129, "ümlaut"])
def test_a_user_with_an_id_that_is_none_here_is_listed_with_all_figures(user_id: str) -> None:
    decided = taken(record(), user_id=user_id)
    assert decided.taken is None
    assert Figures(60 * S, 30 * S, 1_500_000, 25 * S) == decided.left_out


def test_of_several_users_of_one_id_none_is_taken_over() -> None:
    decided = taken(record(), users=[OldUser("u", "25"), OldUser("u", "3")])
    assert decided.taken is None
    assert Figures(60 * S, 30 * S, 1_500_000, 28 * S) == decided.left_out


def test_negative_credits_begin_with_none_and_are_listed() -> None:
    decided = taken(users=[OldUser("u", "-3.5")])
    assert decided.taken is not None
    assert (-3_500_000, 0) == (decided.taken.credits, decided.taken.account.balance)
    assert [("user", "credits are negative: -3.5")] == reasons(decided)


@pytest.mark.parametrize(
    ("column", "text", "reason"),
    [
        ("duration", "-20", "duration is negative: -20"),
        ("duration", "NaN", "duration is no number that can be taken over: NaN"),
        ("duration", "1e300", "duration is no number that can be taken over: 1e300"),
        ("duration", "1577836801", "duration is too large: 1577836801"),
        ("credits_used", "-1", "credits_used is negative: -1"),
        ("credits_used", "Infinity", "credits_used is no number that can be taken over: Infinity"),
        ("free_time_used", "-1", "free_time_used is negative: -1"),
        ("allocation", "-1", "total_free_time_allocation is negative: -1"),
    ],
)
def test_a_figure_that_cannot_be_one_is_nought_and_listed(column: str, text: str, reason: str) -> None:
    decided = taken(record(**{column: text}))
    assert ("record r1", reason) in reasons(decided)
    whole = chat_of(taken(record()))
    field = {"duration": "elapsed_us", "credits_used": "cost", "free_time_used": "free_us"}.get(column)
    if field is not None:
        assert getattr(whole, field) > 0 == getattr(chat_of(decided), field)


def test_nulls_are_nought_and_times_the_next_best_known() -> None:
    bare = OldRecord(None, "u", "a", "c", None, None, None, None, is_active=False, recorded_at=None, heartbeat_at=None)
    chat = chat_of(taken(bare, users=[OldUser("u", None)]))
    assert (0, 0, 0) == (chat.elapsed_us, chat.free_us, chat.cost)
    assert (NOW, NOW, NOW) == (chat.started_at, chat.last_heartbeat_at, chat.stopped_at)
    chat = chat_of(taken(bare._replace(recorded_at=NOW - 9 * S)))
    assert (NOW - 9 * S, NOW - 9 * S) == (chat.started_at, chat.last_heartbeat_at)


def test_instants_after_the_import_are_the_import() -> None:
    chat = chat_of(taken(record(recorded_at=NOW + S, heartbeat_at=NOW + 2 * S)))
    assert (NOW, NOW) == (chat.started_at, chat.last_heartbeat_at)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chat_id": None}, "it names no chat"),
        ({"advisor_id": None}, "it names no advisor"),
        ({"chat_id": "a b"}, "the chat's id is not one that talktime takes: a b"),
        ({"advisor_id": "a/b"}, "the advisor's id is not one that talktime takes: a/b"),
    ],
)
def test_what_belongs_nowhere_is_listed_with_its_figures(changes: dict[str, Any], reason: str) -> None:
    decided = taken(record(**changes))
    assert [("record r1", reason)] == reasons(decided)
    assert Figures(60 * S, 30 * S, 1_500_000) == decided.left_out


def test_durations_in_other_units_are_measured_so() -> None:
    assert chat_of(taken(record(duration="1.5"), rules=RULES._replace(second_us=60 * S))).elapsed_us == 90 * S


def test_halves_of_the_smallest_part_are_rounded_to_even() -> None:
    decided = taken(record(duration="1.0000005", credits_used="0.0000015"))
    assert (1_000_000, 2) == (chat_of(decided).elapsed_us, chat_of(decided).cost)


@given(seed=st.integers(0, 2**32))
def test_nothing_depends_on_the_order_of_the_rows(seed: int) -> None:
    chance = random.Random(seed)
    texts = [None, "0", "60", "61", "-1", "NaN", "7.25"]
    records = [
        record(
            record_id=f"r{number // 2}",
            chat_id=chance.choice(["c", "d", None]),
            advisor_id=chance.choice(["a", "b"]),
            duration=chance.choice(texts),
            credits_used=chance.choice(texts),
            free_time_used=chance.choice(texts),
            is_active=chance.random() < 0.5,
            heartbeat_at=chance.choice([None, NOW - S, NOW - 20 * S, NOW - 400 * S]),
        )
        for number in range(chance.randrange(5))
    ]
    chats = [OldChat(chat_id, "u", chance.choice(["a", "b"]), chance.choice(texts)) for chat_id in "ccde"]
    first = taken(*records, chats=chats)
    shuffled = taken(*chance.sample(records, len(records)), chats=chance.sample(chats, len(chats)))
    assert first.taken == shuffled.taken
    assert sorted(first.listed) == sorted(shuffled.listed)
    assert replace(first, listed=[]) == replace(shuffled, listed=[])
