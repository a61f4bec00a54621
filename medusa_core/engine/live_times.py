"""Step times as they are now: the table measured at start, corrected by the steps that really run.

Two corrections: how fast the machine is now, which every usual step tells, and what a size costs relative to
that, which a step now and then at another size tells. So a load that slows all steps changes no comparison.
Both follow slowly and by bounded amounts: a hiccup moves them by next to nothing, a lasting change wins.
"""

from collections import Counter

from medusa_core.draft.accuracy import bracket
from medusa_core.engine.step_times import StepTimes

USUAL_WEIGHT, NOW_WEIGHT = 1 / 64, 1 / 8
PROBE_WEIGHT = 1 / 8  # the first ones at a size weigh more
MOST = 2.0  # a step counts as at most that many times slower or faster than expected


class LiveStepTimes:
    """Seconds of one kind of traffic's steps by tree nodes (1: without speculation) and cached context."""

    def __init__(self, table: StepTimes) -> None:
        self._table = table
        self._slowness = self._slowness_now = 1.0  # of the machine, relative to the table
        self._relative: dict[int, float] = {1: 1.0}  # of a size, relative to the machine's
        self._probes: Counter[int] = Counter()

    @property
    def is_measured(self) -> bool:
        return bool(self._table.baseline)

    def seconds(self, nodes: int, context: int) -> float:
        """0.0 if nothing was measured at start."""
        return self._table.seconds(nodes, context) * self._slowness * self._factor(nodes)

    def observe(self, nodes: int, context: int, seconds: float, *, is_probe: bool) -> None:
        """Take in one step that ran: at the usual size of this time, or at another."""
        expected = self._table.seconds(nodes, context) * self._factor(nodes)
        if expected <= 0.0 or seconds <= 0.0:
            return
        slowness = seconds / expected
        if is_probe:  # compared with the steps just before it, whatever loads the machine
            weight = max(PROBE_WEIGHT, 1 / (self._probes[nodes] + 2))
            self._relative[nodes] = _moved(self._factor(nodes), slowness / self._slowness_now, weight)
            self._probes[nodes] += 1
        else:
            self._relative.setdefault(nodes, self._factor(nodes))  # no longer what its neighbors' are
            self._slowness = _moved(self._slowness, slowness / self._slowness, USUAL_WEIGHT)
            self._slowness_now = _moved(self._slowness_now, slowness / self._slowness_now, NOW_WEIGHT)

    def _factor(self, nodes: int) -> float:
        """Between sizes that have been tried, interpolated."""
        low, high, share = bracket(self._relative, nodes)
        return self._relative[low] + share * (self._relative[high] - self._relative[low])


def _moved(value: float, ratio: float, weight: float) -> float:
    return value * min(MOST, max(1 / MOST, ratio)) ** weight
