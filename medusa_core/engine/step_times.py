"""How long steps take here: measured at start, to choose the tree and to estimate the speedup."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from medusa_core.draft.accuracy import bracket

BASELINE_CONTEXTS = (32, 256, 1024, 4096, 16384)
REFERENCE_CONTEXT = 256
MEASURE_SECONDS = 3.0  # all points together, each at least MIN_REPEATS and at most MAX_REPEATS times
MIN_REPEATS, MAX_REPEATS = 3, 15
TOLERANCE = 1.5  # between starts

TimedStep = Callable[[int, int], float]
"""(nodes, context) -> seconds of one real decode step with that tree size (1: without speculation)."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Median seconds of a step: without speculation by cached context, with a tree by its nodes."""

    baseline: Mapping[int, float] = field(default_factory=dict)
    trees: Mapping[int, float] = field(default_factory=dict)

    def baseline_seconds(self, context: int) -> float:
        """Step time without speculation at a cached length, interpolated; 0.0 if nothing was measured."""
        if not self.baseline:
            return 0.0
        low, high, share = bracket(self.baseline, context)
        return self.baseline[low] + share * (self.baseline[high] - self.baseline[low])

    def seconds(self, nodes: int, context: int) -> float:
        """Step time with a tree of that many nodes at a cached length; 1 is without speculation.

        Where trees were not measured, they count as free.
        """
        plain = self.baseline_seconds(context)
        if nodes == 1 or not self.trees:
            return plain
        low, high, share = bracket(self.trees, nodes)
        tree = self.trees[low] + share * (self.trees[high] - self.trees[low])
        return max(
            plain, tree + plain - self.trees[1]
        )  # a longer context costs a tree what it costs one token

    def to_json(self) -> dict[str, Any]:
        return {"baseline": dict(self.baseline), "trees": dict(self.trees)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self | None:
        """None if it is not what `to_json` wrote, or not of times."""
        try:
            baseline, trees = (
                {int(key): float(seconds) for key, seconds in data[name].items()}
                for name in ("baseline", "trees")
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            return None
        is_sound = all(0.0 < seconds < math.inf for seconds in (*baseline.values(), *trees.values()))
        return cls(baseline, trees) if is_sound and baseline and 1 in trees else None


def measure_step_times(timed_step: TimedStep, max_context: int, tree_sizes: tuple[int, ...]) -> StepTimes:
    """Time every point in interleaved rounds, so that a noisy moment does not favor one of them."""
    contexts = _contexts(max_context)
    reference = reference_context(max_context)
    points = [(1, c) for c in contexts] + [(size, reference) for size in tree_sizes]
    medians = _medians(timed_step, points, MEASURE_SECONDS, MAX_REPEATS)
    return StepTimes(
        baseline={c: medians[1, c] for c in contexts},
        trees={1: medians[1, reference]} | {size: medians[size, reference] for size in tree_sizes},
    )


def still_hold(times: StepTimes, timed_step: TimedStep, max_context: int) -> bool:
    """Whether times from an earlier start are those of now: a plain step's and a middle tree's."""
    sizes = sorted(times.trees)
    reference = reference_context(max_context)
    points = [(size, reference) for size in {1, sizes[len(sizes) // 2]}]
    now = _medians(timed_step, points, 0.0, MIN_REPEATS)
    return all(1 / TOLERANCE < seconds / times.trees[size] < TOLERANCE for (size, _), seconds in now.items())


def reference_context(max_context: int) -> int:
    """Cached tokens at which trees are timed."""
    return min(REFERENCE_CONTEXT, _contexts(max_context)[-1])


def _contexts(max_context: int) -> list[int]:
    return [c for c in BASELINE_CONTEXTS if c < max_context] or [max(1, max_context // 2)]


def _medians(
    timed_step: TimedStep, points: list[tuple[int, int]], limit: float, most: int
) -> dict[tuple[int, int], float]:
    """Median seconds of each point, of at most so many rounds and as few as fit `limit` seconds."""
    samples: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for point in points:
        timed_step(*point)  # warm up: first calls allocate
    started = time.perf_counter()
    for done in range(most):
        if done >= MIN_REPEATS and time.perf_counter() - started > limit:
            break
        for point in points:
            samples[point].append(timed_step(*point))
    return {point: statistics.median(values) for point, values in samples.items()}
