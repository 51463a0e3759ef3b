"""What the benchmark computes from its runs, and how it draws it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from tests.bench.figures import Figure, Target, number, percentile, table_of
from tests.bench.plots import MET, MISSED, draw, times_target
from tests.bench.programs import BenchmarkFailed
from tests.bench.rounds import Part, Progress, Run, alternate, per_second
from tests.bench.whole import whole_design

READING = Figure(
    name="reading",
    unit="/s",
    runs=[500.0, 900.0, 400.0],
    baseline="bare",
    baseline_runs=[1000.0, 1000.0, 1000.0],
    target=Target(at_least=0.45, aim=0.6),
)
MEMORY = Figure(name="memory <peak>", unit="MB", runs=[150.0, 250.0, 160.0], target=Target(below=200))


def test_a_ratio_is_taken_round_by_round_and_the_figure_is_their_median() -> None:
    drifting = Figure(name="", unit="", runs=[10.0, 100.0, 30.0], baseline="b", baseline_runs=[20.0, 100.0, 50.0])
    assert [0.5, 1.0, 0.6] == drifting.ratios
    assert 0.6 == drifting.value


def test_without_a_baseline_the_figure_is_the_median_run() -> None:
    assert 30 == Figure(name="", unit="", runs=[10, 100, 30], target=Target(at_least=20)).value


def test_a_limit_holds_for_the_worst_run() -> None:
    assert 250 == MEMORY.value
    assert MEMORY.is_met is False


def test_a_candidate_without_its_baseline_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        _ = Figure(name="", unit="", runs=[1.0, 2.0], baseline="b", baseline_runs=[1.0]).ratios


@pytest.mark.parametrize(
    ("target", "met", "missed"),
    [(Target(at_least=0.45, aim=0.6), 0.45, 0.449), (Target(below=300), 299.9, 300)],
)
def test_a_target_is_met_from_its_bound_on_and_a_limit_before_it(target: Target, met: float, missed: float) -> None:
    assert target.is_met(met)
    assert not target.is_met(missed)


def test_what_has_no_target_is_neither_met_nor_missed() -> None:
    assert Figure(name="", unit="", runs=[1]).is_met is None


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50), (99, 99), (100, 100), (1, 1)], ids=["p50", "p99", "max", "p1"]
)
def test_a_percentile_is_the_nearest_rank(percent: int, expected: int) -> None:
    assert expected == percentile(range(1, 101), percent)


def test_percentiles_of_few_values_and_of_none() -> None:
    assert [7, 7, 7] == [percentile([7], percent) for percent in (50, 99, 100)]
    assert [3, 9, 9] == [percentile([3, 9], percent) for percent in (50, 51, 99)]
    assert 0 == percentile([], 99)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5149, "0.515"), (1_234_567.8, "1,234,568"), (3, "3"), (42.123, "42.1")]
)
def test_numbers_are_written_with_as_many_digits_as_say_something(value: float, expected: str) -> None:
    assert expected == number(value)


def test_the_table_shows_the_median_its_spread_the_target_and_whether_it_is_met() -> None:
    text = StringIO()
    Console(file=text, width=200).print(table_of([READING, MEMORY]))
    [reading] = [line for line in text.getvalue().splitlines() if "reading" in line]
    assert [cell.strip() for cell in reading.split("│")][1:-1] == [
        "reading",
        "500 /s",
        "1,000 /s bare",
        "0.5 (0.4..0.9)",
        "at least 0.45, aim 0.6",
        "yes",
    ]
    [memory] = [line for line in text.getvalue().splitlines() if "memory" in line]
    assert [cell.strip() for cell in memory.split("│")][2:-1] == ["250 MB", "", "", "below 200", "NO"]


def test_the_json_holds_every_round() -> None:
    document = READING.as_json()
    assert [500.0, 900.0, 400.0] == document["runs"]
    assert [0.5, 0.9, 0.4] == document["ratios"]
    assert (0.5, True) == (document["value"], document["is_met"])


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_sides_take_turns_backwards_every_other_time_and_the_first_turn_of_each_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], Run]:
        def measure() -> Run:
            order.append(name)
            return {"rate": float(len(order))}

        return measure

    part = alternate({"a": side("a"), "b": side("b")}, 2, Progress())
    assert ["a", "b", "b", "a", "a", "b"] == order
    assert {"a": {"rate": 1.0}, "b": {"rate": 2.0}} == part.warm_up
    assert ([4.0, 5.0], [3.0, 6.0]) == (part.rates("a"), part.rates("b"))


def test_a_side_that_did_nothing_is_no_baseline() -> None:
    with pytest.raises(BenchmarkFailed, match="idle did nothing"):
        alternate({"idle": lambda: {"rate": per_second(0, 5)}}, 1, Progress())


@pytest.mark.parametrize(("count", "us", "expected"), [(10, 2_000_000, 5), (1, 2_000_000, 0.5), (0, 0, 0)])
def test_a_rate_is_per_second(count: int, us: int, expected: float) -> None:
    assert expected == per_second(count, us)


# --- the whole design -------------------------------------------------------------------------------------------------


def test_a_whole_design_is_a_pass_and_three_heartbeats() -> None:
    def part(*sides: str) -> Part:
        rates = {"pass": 60_000, "interval writer": 1_000, "heartbeat": 9_000, "beats in batches": 60_000}
        return Part(rounds=[{side: {"rate": rates[side] * (number + 1)} for side in sides} for number in range(2)])

    writer, single, batch = part("pass", "interval writer"), part("heartbeat"), part("beats in batches")
    one_by_one, in_batches = whole_design({"heartbeats": single, "batch": batch, "writer": writer})
    # A pass takes 1/60 of a millisecond for a chat, three heartbeats 1/3 or 3/60.
    assert pytest.approx([60_000 / 21, 2 * 60_000 / 21]) == one_by_one.runs
    assert pytest.approx([15, 15]) == in_batches.ratios
    assert in_batches.is_met is None
    # What was not measured, or failed, is left out.
    assert [one_by_one] == whole_design({"writer": writer, "heartbeats": single, "batch": Part(failures=["no"])})
    assert [] == whole_design({"heartbeats": single, "batch": batch})


# --- the plot ---------------------------------------------------------------------------------------------------------


def test_a_plot_shows_how_many_times_the_target_a_figure_is() -> None:
    assert pytest.approx([0.5 / 0.45, 2.0, 0.4 / 0.45]) == times_target(READING)
    assert pytest.approx([200 / 150, 0.8, 1.25]) == times_target(MEMORY)


def test_a_plot_has_a_point_for_every_round_in_the_color_that_tells_whether_the_target_is_met() -> None:
    untargeted = Figure(name="no target", unit="", runs=[1.0])
    plot = ET.fromstring(draw([READING, untargeted, MEMORY]))  # noqa: S314 - our own
    circles = plot.findall("{*}circle")
    assert [MET] * 3 + [MISSED] * 3 == [circle.get("fill") for circle in circles]
    # Twice the target is an octave to the right of it, wherever the scale ends.
    lines = [line.get("x1") for line in plot.findall("{*}line") if line.get("x1") == line.get("x2")]
    assert lines[4] == circles[1].get("cx")
    texts = [text.text or "" for text in plot.findall("{*}text")]
    assert any(text.startswith("memory <peak>, MB: 160 (150 to 250), below 200") for text in texts)
    assert not any("no target" in text for text in texts)


def test_a_plot_keeps_what_lies_beyond_its_scale_inside() -> None:
    far = Figure(name="", unit="", runs=[0.0, 1e9], target=Target(at_least=1))
    plot = ET.fromstring(draw([far]))  # noqa: S314 - our own
    assert ["30", "970"] == [circle.get("cx") for circle in plot.findall("{*}circle")]
