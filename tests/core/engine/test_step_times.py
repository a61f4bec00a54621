"""Step times: what is measured and in which order, and the baseline between contexts."""

import json
from typing import Any

import pytest

from medusa_core.engine.step_times import (
    BASELINE_CONTEXTS,
    MAX_REPEATS,
    MIN_REPEATS,
    TOLERANCE,
    StepTimes,
    measure_step_times,
    still_hold,
)


class MadeUpMachine:
    """A step costs what a table says, with every third call of a point disturbed."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, nodes: int, context: int) -> float:
        self.calls.append((nodes, context))
        disturbed = self.calls.count((nodes, context)) % 3 == 0
        return 0.001 * nodes + 1e-6 * context + (1.0 if disturbed else 0.0)


def test_measured_points_are_medians_of_interleaved_rounds() -> None:
    machine = MadeUpMachine()
    times = measure_step_times(machine, 2000, (4, 16))
    assert times.baseline == pytest.approx({32: 0.001032, 256: 0.001256, 1024: 0.002024})
    assert times.trees == pytest.approx({1: 0.001256, 4: 0.004256, 16: 0.016256})
    points = [(1, 32), (1, 256), (1, 1024), (4, 256), (16, 256)]
    starts = range(0, len(machine.calls), 5)
    assert all(machine.calls[start : start + 5] == points for start in starts)
    assert MIN_REPEATS + 1 <= len(machine.calls) / 5 <= MAX_REPEATS + 1  # and a round to warm up


@pytest.mark.parametrize(
    ("max_context", "contexts"),
    [
        (2, [1]),
        (20, [10]),
        (33, [32]),
        (256, [32]),
        (257, [32, 256]),
        (10**6, list(BASELINE_CONTEXTS)),
        (0, [1]),
    ],
)
def test_contexts_fit(max_context: int, contexts: list[int]) -> None:
    machine = MadeUpMachine()
    times = measure_step_times(machine, max_context, (8,))
    assert list(times.baseline) == contexts
    assert set(times.trees) == {1, 8}
    assert (8, min(256, contexts[-1])) in machine.calls


@pytest.mark.parametrize(
    ("context", "seconds"),
    [(0, 1.0), (10, 1.0), (32, 1.0), (33, 1.5), (34, 2.0), (44, 3.0), (54, 4.0), (1000, 4.0)],
)
def test_baseline_between_contexts(context: int, seconds: float) -> None:
    times = StepTimes(baseline={54: 4.0, 32: 1.0, 34: 2.0})
    assert times.baseline_seconds(context) == pytest.approx(seconds)


def test_nothing_measured_is_no_baseline() -> None:
    assert StepTimes().baseline_seconds(100) == 0.0
    assert StepTimes(baseline={256: 0.5}).baseline_seconds(1) == 0.5


TABLE = StepTimes(baseline={32: 0.004, 256: 0.005, 1024: 0.008}, trees={1: 0.005, 4: 0.006, 16: 0.009})


@pytest.mark.parametrize(
    ("nodes", "context", "seconds"),
    [
        (1, 256, 0.005),
        (4, 256, 0.006),
        (10, 256, 0.0075),
        (64, 256, 0.009),
        (4, 1024, 0.009),
        (16, 32, 0.008),
    ],
)
def test_tree_times_at_other_sizes_and_contexts(nodes: int, context: int, seconds: float) -> None:
    assert TABLE.seconds(nodes, context) == pytest.approx(seconds)


def test_trees_that_were_not_measured_are_free() -> None:
    assert StepTimes(baseline={256: 0.5}).seconds(16, 10) == 0.5
    assert StepTimes().seconds(16, 10) == 0.0


def test_a_tree_is_never_faster_than_a_plain_step() -> None:
    noisy = StepTimes(baseline={32: 0.004, 256: 0.005}, trees={1: 0.005, 4: 0.0045})
    assert noisy.seconds(4, 32) == 0.004


def test_times_survive_json() -> None:
    assert StepTimes.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"baseline": {}, "trees": {"1": 1.0}},
        {"baseline": {"1": 1.0}, "trees": {}},
        {"baseline": {"1": 1.0}, "trees": {"1": 0.0}},
        {"baseline": {"1": "soon"}, "trees": {"1": 1.0}},
        {"baseline": {"one": 1.0}, "trees": {"1": 1.0}},
        {"baseline": [1.0], "trees": {"1": 1.0}},
        {"baseline": {"1": float("inf")}, "trees": {"1": 1.0}},
    ],
)
def test_damaged_times_are_none(data: dict[str, Any]) -> None:
    assert StepTimes.from_json(data) is None


@pytest.mark.parametrize(("slower", "holds"), [(1.0, True), (1.2, True), (2.0, False), (0.5, False)])
def test_times_hold_while_steps_take_about_as_long(slower: float, holds: bool) -> None:
    calls = []

    def timed_step(nodes: int, context: int) -> float:
        calls.append((nodes, context))
        return slower * TABLE.seconds(nodes, context)

    assert still_hold(TABLE, timed_step, 2000) is holds
    assert set(calls) == {(1, 256), (4, 256)}
    assert len(calls) <= 2 * (MIN_REPEATS + 1)
    assert TOLERANCE == 1.5


def test_times_hold_only_if_trees_do_too() -> None:
    def timed_step(nodes: int, context: int) -> float:
        return TABLE.seconds(nodes, context) * (1.0 if nodes == 1 else 2.0)

    assert not still_hold(TABLE, timed_step, 2000)
