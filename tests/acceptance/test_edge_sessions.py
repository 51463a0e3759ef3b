"""One story in databases whose sessions have odd time zones and styles: every answer is the same, byte for byte.

It runs over the days on which the clocks of such zones change, over a leap day and over a year's end. A day on which a
clock is put forward has no hour less for anyone who pays by the minute.
"""

from __future__ import annotations

from datetime import UTC, datetime

from psycopg import sql
from sqlalchemy.engine import URL

from tests.acceptance.edges import Story, told
from tests.database import Clock, Databases, simulated_clock
from tests.support import S

HOUR = 3600 * S
LEASE_US = 30 * HOUR
ABANDON_US = 60 * HOUR

SESSIONS = {
    "kathmandu": {
        "timezone": "Asia/Kathmandu",
        "datestyle": "SQL, DMY",
        "intervalstyle": "sql_standard",
        "bytea_output": "escape",
    },
    "st-johns": {"timezone": "America/St_Johns", "datestyle": "German", "intervalstyle": "postgres_verbose"},
    "a-zone-without-a-name": {
        "timezone": "<odd>-12:34",
        "datestyle": "Postgres, MDY",
        "intervalstyle": "iso_8601",
        "extra_float_digits": "-15",
    },
}
# Who begins when: an hour before the clocks of St. John's change and before midnight.
BEGINS = {
    "spring": (datetime(2026, 3, 8, 4, 30, tzinfo=UTC), "2026-03-09T10:30:00.000000Z"),
    "autumn": (datetime(2026, 11, 1, 3, 30, tzinfo=UTC), "2026-11-02T09:30:00.000000Z"),
    "leap-day": (datetime(2028, 2, 28, 22, 0, tzinfo=UTC), "2028-03-01T04:00:00.000000Z"),
    "new-year": (datetime(2028, 12, 31, 22, 0, tzinfo=UTC), "2029-01-02T04:00:00.000000Z"),
}


def _set_for_sessions(clock: Clock, url: URL, session: dict[str, str]) -> None:
    """Set it for the database, and for the role in it too, which goes before that."""
    assert url.database
    for whose in ("DATABASE {}", "ROLE CURRENT_USER IN DATABASE {}"):
        for name, value in session.items():
            clock.connection.execute(
                sql.SQL("ALTER " + whose + " SET {} = {}").format(
                    sql.Identifier(url.database), sql.Identifier(name), sql.Literal(value)
                )
            )


async def _all_answers(story: Story, user_id: str) -> list[bytes]:
    """Return every answer about the user as it was sent."""
    paths = ("account", "ledger?limit=2", "chats", "chats/c1", "chats/c1/segments", "chats?state=running&limit=1")
    return [(await story.client.get(f"/v1/users/{user_id}/{path}")).content for path in paths]


async def _tell(story: Story) -> list[bytes]:
    answers: list[bytes] = []
    await story.card("0.5", free_us=HOUR // 2)
    for user_id, (begin, lease_end) in BEGINS.items():
        story.begin = int(begin.timestamp()) * S
        story.at(0)
        for _ in range(2):  # the second time, the answer is taken from the ledger
            answer = await story.credit("1000", user_id=user_id, key="order")
            answers.append(answer.content)
        answers.append((await story.send("start", user_id=user_id, key="k1")).content)
        assert lease_end == (await story.reading(user_id=user_id))["accrues_until"]
        for us in (HOUR, 2 * HOUR + 1):
            story.at(us)
            answers += await _all_answers(story, user_id)
        story.at(3 * HOUR)
        await story.materialize()
        answers.append((await story.send("heartbeat", user_id=user_id)).content)
        # Three hours are three hours: half an hour free, 150 minutes at half a credit; and the lease runs 33 hours.
        figures = ("state", "elapsed_us", "free_used_us", "credits_used", "accrues_until")
        expected: tuple[object, ...] = ("running", 3 * HOUR, HOUR // 2, "75.000000", 33 * HOUR)
        assert expected == await story.read("c1", *figures, user_id=user_id)
        story.at(33 * HOUR)
        expected = ("lapsed", 33 * HOUR, HOUR // 2, "975.000000", None)
        assert expected == await story.read("c1", *figures, user_id=user_id)
        answers += await _all_answers(story, user_id)
        story.at(34 * HOUR)
        answers.append((await story.send("heartbeat", user_id=user_id)).content)
        # 25 credits are 50 minutes.
        assert (34 * HOUR + 50 * 60 * S,) == await story.read("c1", "exhausts_at", user_id=user_id)
        story.at(94 * HOUR - 1)
        assert ("exhausted",) == await story.read("c1", "state", user_id=user_id)
        story.at(94 * HOUR)
        answers.append((await story.send("heartbeat", user_id=user_id)).content)
        await story.materialize()
        answers.append((await story.send("start", user_id=user_id, key="k1")).content)
        answers.append((await story.send("stop", user_id=user_id)).content)
        stopped = ("ended", 34 * HOUR + 50 * 60 * S, "exhausted", "1000.000000")
        assert stopped == await story.read("c1", "state", "stopped_at", "stop_reason", "credits_used", user_id=user_id)
        answers += await _all_answers(story, user_id)
    return answers


async def _told_in(url: URL, clock: Clock) -> list[bytes]:
    async with told(url, clock, lease_us=LEASE_US, abandon_us=ABANDON_US) as story:
        return await _tell(story)


async def test_time_zones_summer_time_leap_days_and_styles_of_a_session_change_no_byte_of_any_answer(
    databases: Databases, database_url: URL, clock: Clock
) -> None:
    plain = await _told_in(database_url, clock)
    for name, session in SESSIONS.items():
        odd_url = databases.create()
        try:
            with simulated_clock(odd_url) as odd_clock:
                _set_for_sessions(odd_clock, odd_url, session)
                assert plain == await _told_in(odd_url, odd_clock), name
        finally:
            databases.drop(odd_url)
