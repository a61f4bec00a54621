"""How many nodes a tree gets: chosen from step times at start, adapted to what speculation gains since.

`AdaptiveTreeSize` compares with no speculation only, by the step times measured at start. A moment of load
looks like a tree that does not pay: hence the trials of the next larger one, ever more rarely while they
fail.
"""

import logging
import math
from collections.abc import Mapping

from medusa_core.draft.accuracy import HeadCalibration, bracket
from medusa_core.draft.head_trees import fitting_trees
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.tree import Tree, expected_acceptance_length, grow_tree
from medusa_core.sampling_params import DraftSourceName, SamplingParams

logger = logging.getLogger(__name__)

TREE_SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64)  # measured at start, root included
WINDOW_STEPS = 96
RETRY_STEPS = 1000  # steps at a size before the next larger one gets a trial; doubles with each that fails
MAX_RETRY_STEPS = 64_000
NGRAM_NODES = 16  # where nobody says how many
BANDS = 4  # of temperatures: 0, up to 0.5, up to 1, up to 1.5, and all above


class AdaptiveTreeSizes:
    """A size for each kind of request, none of which shrinks another's tree.

    Kinds differ in what they accept: at temperature 2 hardly a draft is right, and where that traffic is best
    served without speculation, greedy answers still gain from it.
    """

    def __init__(self, head_nodes: int, ngram_nodes: int) -> None:
        """`ngram_nodes`: where n-grams draft, alone or beside heads."""
        self._head_nodes, self._ngram_nodes = head_nodes, ngram_nodes
        self._by_kind: dict[tuple[str, str, str, int], AdaptiveTreeSize] = {}

    def of(self, params: SamplingParams) -> "AdaptiveTreeSize":
        """The one for requests of this mode, source, tree and band of temperatures."""
        speculation = params.speculation
        band = min(BANDS, math.ceil(2 * params.temperature))
        kind = (speculation.mode.value, speculation.source.value, speculation.tree, band)
        if kind not in self._by_kind:
            with_ngrams = speculation.source is not DraftSourceName.HEADS
            nodes = self._ngram_nodes if with_ngrams else self._head_nodes
            traffic = ", ".join((*kind[:2], f"{kind[2]} tree", _band(band)))
            self._by_kind[kind] = AdaptiveTreeSize(nodes, traffic)
        return self._by_kind[kind]


class AdaptiveTreeSize:
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
        """Take in one decode step that ran with this size. A baseline of 0.0 is unknown."""
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


def expected_tokens(calibration: HeadCalibration, nodes: int, kind: str = "dynamic") -> float:
    """A(T): mean acceptance length with a tree of `nodes`, measured if calibrated, else estimated."""
    measured = calibration.expected.get(kind, {})
    if measured and min(measured) <= nodes <= max(measured):
        low, high, share = bracket(measured, nodes)
        return measured[low] + share * (measured[high] - measured[low])
    return expected_acceptance_length(grow_tree(calibration.accuracies, nodes), calibration.accuracies)


def expected_speedup(seconds: Mapping[int, float], calibration: HeadCalibration, nodes: int) -> float:
    """Tokens per second with trees of that many nodes, relative to none; `seconds`: of a step, by nodes."""
    tokens = expected_tokens(calibration, nodes) if nodes > 1 else 1.0
    return tokens * seconds[1] / seconds[nodes]


def fastest_size(seconds: Mapping[int, float], calibration: HeadCalibration) -> int:
    """The tree size with the most expected tokens per second: argmax A(T) / t(T); 1 is off."""
    return max(seconds, key=lambda nodes: expected_speedup(seconds, calibration, nodes))


def scratch_rows(heads: DraftHeads | None, static_tree: Tree | None, tree_nodes: int | None) -> int:
    """Cache rows after the context for the largest tree that is measured or asked for."""
    named = [] if heads is None else [tree.size for tree in fitting_trees(heads)]
    own = [static_tree.size] if static_tree is not None else []
    return max(*named, *own, tree_nodes or 1, *TREE_SIZES)
