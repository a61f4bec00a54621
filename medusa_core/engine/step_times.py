"""How long steps take here: measured once at start, to choose the tree and to estimate the speedup."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from medusa_core.draft.accuracy import bracket

BASELINE_CONTEXTS = (32, 256, 1024, 4096, 16384)
REFERENCE_CONTEXT = 256
MEASURE_SECONDS = 0.4  # per point, at least MIN_REPEATS and at most MAX_REPEATS steps
MIN_REPEATS, MAX_REPEATS = 3, 15

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


def measure_step_times(timed_step: TimedStep, max_context: int, tree_sizes: tuple[int, ...]) -> StepTimes:
    """Time every point in interleaved rounds, so that a noisy moment does not favor one of them."""
    contexts = [c for c in BASELINE_CONTEXTS if c < max_context] or [max(1, max_context // 2)]
    reference = min(REFERENCE_CONTEXT, contexts[-1])
    points = [(1, c) for c in contexts] + [(size, reference) for size in tree_sizes]
    samples: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for point in points:
        timed_step(*point)  # warm up: first calls allocate
    started = time.perf_counter()
    for done in range(MAX_REPEATS):
        if done >= MIN_REPEATS and time.perf_counter() - started > MEASURE_SECONDS * len(points):
            break
        for point in points:
            samples[point].append(timed_step(*point))
    medians = {point: statistics.median(values) for point, values in samples.items()}
    return StepTimes(
        baseline={c: medians[1, c] for c in contexts},
        trees={1: medians[1, reference]} | {size: medians[size, reference] for size in tree_sizes},
    )
