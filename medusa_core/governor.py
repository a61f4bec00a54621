"""Keeps speculation from costing more than it gains: shrinks the tree, down to off, and tries again later."""

import logging

logger = logging.getLogger(__name__)

WINDOW_STEPS = 96
RETRY_STEPS = 1000  # without speculation, before the smallest tree gets another chance; doubles each time
MAX_RETRY_STEPS = 64_000


class Governor:
    """Judges windows of decode steps: their seconds against what their tokens take without speculation."""

    def __init__(self, nodes: int) -> None:
        self._ladder = [1]
        while self._ladder[-1] * 2 < nodes:
            self._ladder.append(self._ladder[-1] * 2)
        if nodes > 1:
            self._ladder.append(nodes)
        self._rung = len(self._ladder) - 1
        self._retry_after = RETRY_STEPS
        self._reset()

    @property
    def nodes(self) -> int:
        """Tree size to use now, root included; 1 is no speculation."""
        return self._ladder[self._rung]

    def observe(self, seconds: float, baseline_seconds: float) -> None:
        """Take in one decode step that ran with the governor's size. A baseline of 0.0 is unknown."""
        if baseline_seconds <= 0.0 or len(self._ladder) == 1:
            return
        self._steps += 1
        self._seconds += seconds
        self._baseline += baseline_seconds
        if self.nodes == 1:
            self._maybe_retry()
        elif self._steps >= WINDOW_STEPS:
            self._judge()

    def _judge(self) -> None:
        speedup = self._baseline / self._seconds
        if speedup < 1.0:
            old = self.nodes
            self._rung -= 1
            now = f"a tree of {self.nodes} nodes" if self.nodes > 1 else "no speculation"
            logger.warning(
                "speculation with %d nodes is slower than without (estimated speedup %.2f): %s from now on",
                old,
                speedup,
                now,
            )
        elif self.nodes > 1:
            self._retry_after = RETRY_STEPS
        self._reset()

    def _maybe_retry(self) -> None:
        if self._steps < self._retry_after:
            return
        self._rung = 1
        self._retry_after = min(2 * self._retry_after, MAX_RETRY_STEPS)
        logger.info("trying speculation again with %d nodes", self.nodes)
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._baseline = 0.0
