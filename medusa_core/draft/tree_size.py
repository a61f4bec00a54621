"""Keeps speculation from costing more than it gains: shrinks the tree, down to off, and later tries again.

It compares with no speculation only, by step times measured at start. A moment of load looks like
a tree that does not pay: hence the trials of the next larger one, ever more rarely while they fail.
"""

import logging
import math

from medusa_core.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

WINDOW_STEPS = 96
RETRY_STEPS = 1000  # steps at a size before the next larger one gets a trial; doubles with each that fails
MAX_RETRY_STEPS = 64_000
BANDS = 4  # of temperatures: 0, up to 0.5, up to 1, up to 1.5, and all above


class Governors:
    """A governor for each kind of request, none of which shrinks another's tree.

    Kinds differ in what they accept: at temperature 2 hardly a draft is right, and where that traffic is best
    served without speculation, greedy answers still gain from it.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._by_kind: dict[tuple[str, str, int], Governor] = {}

    def of(self, params: SamplingParams) -> "Governor":
        """The one for requests of this mode, tree and band of temperatures."""
        speculation = params.speculation
        kind = (speculation.mode.value, speculation.tree, min(BANDS, math.ceil(2 * params.temperature)))
        if kind not in self._by_kind:
            self._by_kind[kind] = Governor(self._nodes, f"{kind[0]}, {kind[1]} tree, {_band(kind[2])}")
        return self._by_kind[kind]


class Governor:
    """Judges windows of decode steps: their seconds against what their tokens take without speculation.

    `traffic` names in the log whose steps they are.
    """

    def __init__(self, nodes: int, traffic: str = "all requests") -> None:
        self._traffic = traffic
        self._ladder = [1]
        while self._ladder[-1] * 2 < nodes:
            self._ladder.append(self._ladder[-1] * 2)
        if nodes > 1:
            self._ladder.append(nodes)
        self._rung = len(self._ladder) - 1
        self._retry_after = RETRY_STEPS
        self._on_trial = False
        self._steps_here = 0
        self._reset_window()

    @property
    def nodes(self) -> int:
        """Tree size to use now, root included; 1 is no speculation."""
        return self._ladder[self._rung]

    def observe(self, seconds: float, baseline_seconds: float) -> None:
        """Take in one decode step that ran with the governor's size. A baseline of 0.0 is unknown."""
        if baseline_seconds <= 0.0 or len(self._ladder) == 1:
            return
        self._steps += 1
        self._steps_here += 1
        self._seconds += seconds
        self._baseline += baseline_seconds
        if self._steps >= WINDOW_STEPS and self.nodes > 1:
            self._judge()
        if self._steps_here >= self._retry_after and self._rung < len(self._ladder) - 1:
            self._try_larger()

    def _judge(self) -> None:
        speedup = self._baseline / self._seconds
        if speedup < 1.0:
            self._shrink(speedup)
        elif self._on_trial:
            self._on_trial = False
            self._retry_after = RETRY_STEPS
        self._reset_window()

    def _shrink(self, speedup: float) -> None:
        old = self.nodes
        self._rung -= 1
        self._on_trial = False
        self._steps_here = 0
        now = f"a tree of {self.nodes} nodes" if self.nodes > 1 else "no speculation"
        logger.warning(
            "speculation with %d nodes is slower than without (estimated speedup %.2f): %s from now on (%s)",
            old,
            speedup,
            now,
            self._traffic,
        )

    def _try_larger(self) -> None:
        self._rung += 1
        self._on_trial = True
        self._steps_here = 0
        self._retry_after = min(2 * self._retry_after, MAX_RETRY_STEPS)
        logger.info("trying speculation with %d nodes again (%s)", self.nodes, self._traffic)
        self._reset_window()

    def _reset_window(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._baseline = 0.0


def _band(band: int) -> str:
    if band == 0:
        return "greedy"
    return f"temperature up to {band / 2:g}" if band < BANDS else f"temperature above {(BANDS - 1) / 2:g}"
