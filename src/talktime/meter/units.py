"""Units: time in integer microseconds since 1970 (UTC), money in integer micro-credits. No floats.

The caps keep every figure inside a signed 64-bit column: the costliest count, an unbroken one at `MAX_RATE`,
takes 17 years to reach 2**63.
"""

from __future__ import annotations

import re
from decimal import Decimal

MICRO = 1_000_000
"""Microseconds in a second, and micro-credits in a credit."""

MINUTE_US = 60 * MICRO

END_OF_TIME_US = 253_402_300_799_999_999
"""9999-12-31T23:59:59.999999Z: later instants cannot be written as a date and are shown as "never"."""

MAX_RATE = 1_000_000 * MICRO
"""Largest tariff, in micro-credits per minute."""

MAX_AMOUNT = 1_000_000_000 * MICRO
"""Largest single credit, in micro-credits."""

MAX_BALANCE = 1_000_000_000_000 * MICRO
"""Largest balance, in micro-credits."""

MAX_BLOCK_US = 86_400 * MICRO
"""Longest first block or increment of a tariff."""

MAX_FREE_US = 31_536_000 * MICRO
"""Largest allowance: a year."""

_SECONDS = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?", re.ASCII)
_CREDITS = re.compile(r"(-?)(\d{1,20})(?:\.(\d{1,6}))?", re.ASCII)


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide and round up. The only rounding in the meter, and always in favour of the price as published."""
    return -(-numerator // denominator)


def parse_credits(text: str) -> int:
    """Micro-credits in a plain decimal string such as ``"12.345678"``.

    Raises:
        ValueError: not such a string, or more than 6 decimals.
    """
    match = _CREDITS.fullmatch(text)
    if match is None:
        message = 'must be a plain decimal number with at most 6 decimals, such as "12.345678"'
        raise ValueError(message)
    sign, whole, decimals = match.groups(default="")
    amount = int(whole) * MICRO + int(decimals.ljust(6, "0"))
    return -amount if sign else amount


def format_credits(amount: int) -> str:
    """Write micro-credits as a decimal string with exactly 6 decimals."""
    sign = "-" if amount < 0 else ""
    whole, decimals = divmod(abs(amount), MICRO)
    return f"{sign}{whole}.{decimals:06d}"


def parse_seconds(value: str | int | Decimal) -> int:
    """Microseconds in a number of seconds with at most 6 decimals.

    Raises:
        ValueError: not a finite number, or finer than a microsecond.
    """
    if isinstance(value, str) and _SECONDS.fullmatch(value) is None:
        message = "must be a number of seconds"
        raise ValueError(message)
    seconds = Decimal(value)
    # The bound comes first: scaling 1e999999 to an integer would take the machine down.
    if not seconds.is_finite() or abs(seconds) > MAX_FREE_US // MICRO:
        message = "must be a finite number of seconds within a year"
        raise ValueError(message)
    exact = seconds.quantize(Decimal("0.000001"))
    if exact != seconds:
        message = "must not be finer than a microsecond (6 decimals)"
        raise ValueError(message)
    return int(exact * MICRO)


def format_seconds(us: int) -> int | Decimal:
    """Seconds as an exact number: an integer where whole, else a decimal."""
    seconds, rest = divmod(us, MICRO)
    return seconds if rest == 0 else (Decimal(us) / MICRO).normalize()
