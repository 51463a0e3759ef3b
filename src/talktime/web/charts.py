"""Plots of the last hour: figures -> the coordinates of an inline SVG.

The drawing is stretched to the width that there is, so it holds no text; the labels stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

HEIGHT = 1000
STEP = 10
"""The width of a minute in the drawing."""

_BAR_GAP = 2
_TOPS = (2, 4, 10)


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing of `width` by `HEIGHT`: `line` is None where there are only areas; `ticks` go from the top down."""

    width: int
    area: str
    line: str | None
    ticks: tuple[str, str, str]
    summary: str


def scale_top(most: int, unit: int = 1) -> int:
    """Return a round figure that is not below `most`, nor below two units, and whose half is round too."""
    while True:
        for top in _TOPS:
            if top * unit >= most:
                return top * unit
        unit *= 10


def steps(values: Sequence[int], name: str, write: Callable[[int], str]) -> Plot:
    """Draw figures that hold at instants, as steps."""
    top = scale_top(max(values, default=0))
    levels = [_y(value, top) for value in values]
    line = " ".join(
        f"{'L' if minute else 'M'}{minute * STEP},{y} H{(minute + 1) * STEP}" for minute, y in enumerate(levels)
    )
    width = len(values) * STEP
    return Plot(width, f"{line} V{HEIGHT} H0 Z", line, _ticks(top, write), _summary(values, name, write))


def bars(values: Sequence[int], name: str, write: Callable[[int], str], *, unit: int = 1) -> Plot:
    """Draw figures of whole minutes, as bars; `unit` is the smallest figure that the scale is made for."""
    top = scale_top(max(values, default=0), unit)
    area = " ".join(
        f"M{minute * STEP + _BAR_GAP // 2},{HEIGHT} V{y} h{STEP - _BAR_GAP} V{HEIGHT} Z"
        for minute, y in enumerate(_y(value, top) for value in values)
        if y < HEIGHT
    )
    return Plot(len(values) * STEP, area, None, _ticks(top, write), _summary(values, name, write))


def _y(value: int, top: int) -> int:
    # What is not nothing can be seen.
    return HEIGHT - max(value * HEIGHT // top, 8 if value else 0)


def _ticks(top: int, write: Callable[[int], str]) -> tuple[str, str, str]:
    return write(top), write(top // 2), write(0)


def _summary(values: Sequence[int], name: str, write: Callable[[int], str]) -> str:
    if not values:
        return f"{name}: nothing yet"
    most = max(values)
    ago = len(values) - 1 - max(minute for minute, value in enumerate(values) if value == most)
    place = "now" if ago == 0 else "a minute ago" if ago == 1 else f"{ago} minutes ago"
    if most == 0:
        return f"{name}, over the last hour: none."
    return f"{name}, over the last hour: {write(values[-1])} now; at most {write(most)}, {place}."
