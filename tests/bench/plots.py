"""The plot: each figure that has a target, a point for every round, on one scale: how many times the target it is.

An SVG, written by hand: there is little in it, and nothing to be installed for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import median

from tests.bench.figures import Figure, number

WIDTH = 1000
ROW = 52
TOP = 70
LEFT = 30
RIGHT = 30
OCTAVES = 3
"""The scale goes from an eighth of the target to eight times; what lies beyond is drawn at its end."""

MET, MISSED = "#0072b2", "#d55e00"


def draw(figures: Sequence[Figure]) -> str:
    """Return the plot of the figures that have a target and were measured."""
    shown = [figure for figure in figures if figure.target is not None and figure.runs]
    height = TOP + ROW * len(shown) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">Benchmarks: how many times the target, every round</text>',
    ]
    for octave in range(-OCTAVES, OCTAVES + 1):
        x = _x(2.0**octave)
        label = "target" if octave == 0 else f"{2**octave}x" if octave > 0 else f"1/{2**-octave}"
        stroke = "#333" if octave == 0 else "#ddd"
        lines += [
            f'<line x1="{x}" x2="{x}" y1="{TOP - 12}" y2="{height - 20}" stroke="{stroke}"/>',
            f'<text x="{x}" y="{TOP - 18}" font-size="12" text-anchor="middle" fill="#333">{label}</text>',
        ]
    for place, figure in enumerate(shown):
        lines += _row(figure, TOP + ROW * place)
    return "\n".join([*lines, "</svg>", ""])


def _row(figure: Figure, top: int) -> list[str]:
    times = times_target(figure)
    color = MET if figure.is_met else MISSED
    what = f"{figure.name} / {figure.baseline}" if figure.baseline else f"{figure.name}, {figure.unit}"
    values = figure.ratios or figure.runs
    text = f"{what}: {number(median(values))} ({number(min(values))} to {number(max(values))}), {figure.target}"
    y = top + 32
    ends = f'x1="{_x(min(times))}" x2="{_x(max(times))}"'
    return [
        f'<text x="{LEFT}" y="{top + 16}" font-size="13" fill="#111">{escape(text)}</text>',
        f'<line {ends} y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>',
        *(f'<circle cx="{_x(one)}" cy="{y}" r="4" fill="{color}" fill-opacity="0.6"/>' for one in times),
        f'<rect x="{_x(median(times)) - 2}" y="{y - 9}" width="4" height="18" fill="{color}"/>',
    ]


def times_target(figure: Figure) -> list[float]:
    """Return, round by round, how many times the target a figure is; of a limit, how many times it would fit in."""
    target = figure.target
    assert target is not None
    if target.below is not None:
        return [target.below / run for run in figure.runs]
    return [value / (target.at_least or 1) for value in figure.ratios or figure.runs]


def _x(times: float) -> int:
    octaves = math.log2(times) if times > 0 else -OCTAVES
    part = (min(max(octaves, -OCTAVES), OCTAVES) + OCTAVES) / (2 * OCTAVES)
    return round(LEFT + part * (WIDTH - LEFT - RIGHT))
