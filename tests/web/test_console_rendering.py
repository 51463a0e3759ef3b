"""How amounts, durations and plots are written."""

from __future__ import annotations

import re

import pytest

from talktime.meter.state import Tariff
from talktime.web import charts
from talktime.web.rendering import MINUS, brief, compact, credits_exact, credits_short, iso, price, words
from tests.support import CREDIT, S


@pytest.mark.parametrize(
    ("amount", "exact", "short"),
    [
        (0, "0.00", "0.00"),
        (1, "0.000001", "0.00"),
        (25 * CREDIT, "25.00", "25.00"),
        (1_234_567 * CREDIT + 500_000, "1,234,567.50", "1,234,567.50"),
        (12_345_678, "12.345678", "12.34"),
        (-533_900, f"{MINUS}0.5339", f"{MINUS}0.53"),
    ],
)
def test_amounts_have_separators_and_no_trailing_zeros(amount: int, exact: str, short: str) -> None:
    assert exact == credits_exact(amount).striptags()
    assert short == credits_short(amount).striptags()
    for html in (credits_exact(amount), credits_short(amount)):
        [title] = re.findall(r'title="([^"]*)"', html)
        assert amount == round(float(title) * CREDIT)


def test_a_signed_amount_says_plus() -> None:
    assert "+5.00" == credits_exact(5 * CREDIT, signed=True).striptags()
    assert f"{MINUS}5.00" == credits_exact(-5 * CREDIT, signed=True).striptags()


@pytest.mark.parametrize(
    ("us", "said", "short", "compared"),
    [
        (0, "0 seconds", "0:00", "0 ms"),
        (1, "less than a second", "0:00", "0 ms"),
        (999_999, "less than a second", "0:00", "999 ms"),
        (9_999_999, "9 seconds", "0:09", "9.9 s"),
        (59_999_999, "59 seconds", "0:59", "59 s"),
        (725 * S + 1, "12 minutes 5 seconds", "12:05", "12 min 5 s"),
        (3_725 * S, "1 hour 2 minutes 5 seconds", "1:02:05", "62 min 5 s"),
    ],
)
def test_durations_are_said_as_a_person_says_them_and_never_rounded_up(
    us: int, said: str, short: str, compared: str
) -> None:
    assert (said, short, compared) == (words(us), compact(us), brief(us))


def test_an_instant_is_exact() -> None:
    assert "2026-01-01T00:00:00.000001Z" == iso(1_767_225_600_000_001)
    assert "1969-12-31T23:59:59.999999Z" == iso(-1)


@pytest.mark.parametrize(
    ("tariff", "said"),
    [
        (Tariff(0), "free of charge"),
        (Tariff(1_500_000), "1.50 a minute"),
        (Tariff(1_500_000, 60 * S, 60 * S), "1.50 a minute, in blocks of 60 s"),
        (Tariff(1_500_000, 0, 6 * S), "1.50 a minute, in blocks of 6 s"),
        (Tariff(1_500_000, 60 * S, 6 * S), "1.50 a minute, in blocks of 60 s and then 6 s"),
        (Tariff(1_500_000, 30 * S), "1.50 a minute, at least 30 s"),
    ],
)
def test_a_tariff_is_said_in_words(tariff: Tariff, said: str) -> None:
    assert said == price(tariff).striptags()


@pytest.mark.parametrize(("most", "top"), [(0, 2), (2, 2), (3, 4), (5, 10), (11, 20), (99, 100), (4001, 10_000)])
def test_a_scale_ends_at_a_round_figure(most: int, top: int) -> None:
    assert top == charts.scale_top(most)


def test_steps_and_bars_are_as_high_as_their_figures() -> None:
    steps = charts.steps([0, 1, 4, 2], "Chats", str)
    assert ("M0,1000 H10 L10,750 H20 L20,0 H30 L30,500 H40", ("4", "2", "0")) == (steps.line, steps.ticks)
    assert f"{steps.line} V1000 H0 Z" == steps.area
    assert "Chats, over the last hour: 2 now; at most 4, a minute ago." == steps.summary
    bars = charts.bars([0, 5 * CREDIT], "Credits", str, unit=CREDIT)
    assert ("M11,1000 V500 h8 V1000 Z", None, 20) == (bars.area, bars.line, bars.width)


def test_what_is_not_nothing_can_be_seen_in_a_plot() -> None:
    assert "V992 " in charts.bars([1, 1_000_000], "Credits", str).area


def test_an_hour_without_anything_is_told_so() -> None:
    assert "Chats, over the last hour: none." == charts.steps([0, 0], "Chats", str).summary
    assert "" == charts.bars([0, 0], "Chats", str).area
