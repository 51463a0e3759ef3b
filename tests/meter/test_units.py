"""Units: what a decimal string means, and what is refused."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talktime.meter.units import ceil_div, format_credits, format_seconds, parse_credits, parse_seconds


@pytest.mark.parametrize(
    ("text", "micro"),
    [
        ("0", 0),
        ("1", 1_000_000),
        ("12.345678", 12_345_678),
        ("0.000001", 1),
        ("-1.5", -1_500_000),
        ("007.10", 7_100_000),
    ],
)
def test_a_decimal_string_is_read_exactly(text: str, micro: int) -> None:
    assert micro == parse_credits(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".5",
        "1.",
        "1.2345678",
        "1e3",
        "NaN",
        "inf",
        "-Infinity",
        "+1",
        " 1",
        "1 ",
        "1,5",
        "0x10",
        "\u0661",
        "1_0",
        "9" * 21,
    ],
)
def test_anything_but_a_plain_decimal_string_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plain decimal"):
        parse_credits(text)


@given(st.integers(-(10**18), 10**18))
def test_written_credits_are_read_back_as_they_were(micro: int) -> None:
    assert micro == parse_credits(format_credits(micro))


@pytest.mark.parametrize(
    ("value", "us"), [("15", 15_000_000), ("0.000001", 1), (Decimal("2.50"), 2_500_000), (3, 3_000_000)]
)
def test_seconds_are_read_exactly(value: str | int | Decimal, us: int) -> None:
    assert us == parse_seconds(value)


@pytest.mark.parametrize(
    "value",
    [
        *("", "x", "NaN", "1e3", "1_5", "0.0000001", "31536001", "1.0000000000000000001"),
        *map(Decimal, ("NaN", "Infinity", "1e999999", "1e-999999", "1.00000000000000000000000000000001")),
    ],
)
def test_seconds_out_of_bounds_are_refused_at_once(value: str | Decimal) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_seconds(value)


def test_seconds_are_written_whole_where_they_are() -> None:
    assert [180, Decimal("0.5"), Decimal("0.000007")] == [format_seconds(us) for us in (180_000_000, 500_000, 7)]


def test_the_one_rounding_is_up() -> None:
    assert [0, 1, 1, 2] == [ceil_div(n, 3) for n in (0, 1, 3, 4)]
