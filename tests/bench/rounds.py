"""Rounds: candidate and baseline in turns, and the lines that say how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tests.bench.figures import Figure
from tests.bench.programs import BenchmarkFailed

Run: TypeAlias = dict[str, Any]
"""The raw numbers of one measurement; its `rate` is how many a second."""

S_US = 1_000_000


def per_second(count: int, us: int) -> float:
    """Return a rate."""
    return count * S_US / max(us, 1)


@dataclass(slots=True)
class Progress:
    """Says on the standard error what is being measured."""

    part: str = ""
    _began: float = field(default_factory=time.monotonic, init=False)

    def say(self, what: str) -> None:
        """Write a line."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {self.part}: {what}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Part:
    """What a part measured: its figures, all rounds, and what else was seen."""

    figures: list[Figure] = field(default_factory=list)
    warm_up: dict[str, Run] = field(default_factory=dict)
    rounds: list[dict[str, Run]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def rates(self, side: str) -> list[float]:
        """Return the rates of one side, round by round."""
        return [round_[side]["rate"] for round_ in self.rounds]

    def as_json(self) -> dict[str, Any]:
        """Return it for the JSON file."""
        return {
            "figures": [figure.as_json() for figure in self.figures],
            "warm_up": self.warm_up,
            "rounds": self.rounds,
            "notes": self.notes,
            "failures": self.failures,
        }


def alternate(sides: Mapping[str, Callable[[], Run]], rounds: int, progress: Progress) -> Part:
    """Measure each side in turn, so many times after a first one that does not count.

    Every other round goes through them backwards, so that none always comes after the same neighbour and finds what
    that one left: dirty pages, dead rows, a checkpoint.

    Raises:
        BenchmarkFailed: one of them did nothing.
    """
    part = Part()
    for number in range(rounds + 1):
        runs = {}
        for name in reversed(list(sides)) if number % 2 else sides:
            runs[name] = run = sides[name]()
            if run["rate"] <= 0:
                message = f"{name} did nothing: {run}"
                raise BenchmarkFailed(message)
            progress.say(f"{f'round {number} of {rounds}' if number else 'warm-up'}: {name} {run['rate']:,.0f}/s")
        if number:
            part.rounds.append(runs)
        else:
            part.warm_up = runs
    return part
