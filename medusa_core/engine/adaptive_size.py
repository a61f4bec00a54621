"""Tree sizes that follow what speculation gains: tokens over seconds, both corrected by the steps that run.

The start's choice is a guess from calibration and measured step times. Here the acceptance that this traffic
really has scales the expected tokens, and real steps correct the times, those of sizes that are not in use by
rare probes. So neither a measurement under load nor a moment of it pins a size. In exact mode a probe decides
the same tokens as any other step; in typical mode there is none.
"""

import logging
import math
from collections.abc import Mapping

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.tree_size import TREE_SIZES, expected_tokens
from medusa_core.engine.live_times import LiveStepTimes
from medusa_core.engine.step_times import StepTimes
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode

logger = logging.getLogger(__name__)

MEMORY_STEPS = 128  # over which acceptance is averaged
CHOICE_STEPS = 32  # between choices
MARGIN = 1.03  # by which another size must be better
PROBE_STEPS = 512  # between plain steps, and between steps at the next other size: below 0.5 % of the time
TRIAL_STEPS = 96
RETRY_STEPS = 1000  # without speculation, before a tree gets a trial; doubles with each that fails
MAX_RETRY_STEPS = 64_000
BANDS = 4  # of temperatures: 0, up to 0.5, up to 1, up to 1.5, and all above
NGRAM_CALIBRATION = HeadCalibration(accuracies=((0.6,),) * 15)  # only the shape matters: traffic scales it


class AdaptiveTreeSizes:
    """A size for each kind of request, none of which shrinks another's tree.

    Kinds differ in what they accept: at temperature 2 hardly a draft is right, and where that traffic is best
    served without speculation, greedy answers still gain from it.
    """

    def __init__(
        self,
        table: StepTimes,
        calibration: HeadCalibration | None,
        *,
        head_nodes: int,
        ngram_nodes: int,
        most_nodes: int | None,
    ) -> None:
        """Sizes to begin with; `ngram_nodes` where n-grams draft, alone or beside heads.

        `calibration` None: there are no heads. `most_nodes`: a limit that was asked for.
        """
        self._table, self._calibration = table, calibration
        self._head_nodes, self._ngram_nodes, self._most_nodes = head_nodes, ngram_nodes, most_nodes
        self._by_kind: dict[tuple[str, str, str, int], AdaptiveTreeSize] = {}

    def of(self, params: SamplingParams) -> "AdaptiveTreeSize":
        """The one for requests of this mode, source, tree and band of temperatures."""
        speculation = params.speculation
        band = min(BANDS, math.ceil(2 * params.temperature))
        kind = (speculation.mode.value, speculation.source.value, speculation.tree, band)
        if kind not in self._by_kind:
            traffic = ", ".join((*kind[:2], f"{kind[2]} tree", _band(band)))
            self._by_kind[kind] = self._new(params, traffic)
        return self._by_kind[kind]

    def _new(self, params: SamplingParams, traffic: str) -> "AdaptiveTreeSize":
        speculation, times = params.speculation, LiveStepTimes(self._table)
        with_ngrams = speculation.source is not DraftSourceName.HEADS
        calibration = self._calibration or (NGRAM_CALIBRATION if with_ngrams else None)
        if speculation.source is DraftSourceName.NGRAM:
            calibration = NGRAM_CALIBRATION
        if speculation.mode is SpeculationMode.OFF or calibration is None:
            return AdaptiveTreeSize(times, {}, 1, traffic)
        nodes = self._ngram_nodes if with_ngrams else self._head_nodes
        most = self._most_nodes or (nodes if calibration is NGRAM_CALIBRATION else TREE_SIZES[-1])
        sizes = sorted({size for size in (*TREE_SIZES, nodes) if 1 < size <= most})
        tokens = {size: expected_tokens(calibration, size, speculation.tree) for size in sizes}
        probes = speculation.mode is SpeculationMode.EXACT
        return AdaptiveTreeSize(times, tokens, nodes, traffic, probes=probes)


class AdaptiveTreeSize:
    """The size of one kind's trees. `nodes` is the one chosen now, root included; 1 is no speculation."""

    def __init__(
        self,
        times: LiveStepTimes,
        expected: Mapping[int, float],
        nodes: int,
        traffic: str = "all requests",
        *,
        probes: bool = True,
    ) -> None:
        """`expected`: tokens a step by size, of all sizes above 1 that may be chosen.

        `traffic` names in the log whose steps these are.
        """
        self.times, self.nodes = times, nodes
        self._expected, self._traffic, self._probes = {1: 1.0, **expected}, traffic, probes
        self._gain = _Gain()
        self._steps = self._steps_off = self._trial_left = 0
        self._since_plain = self._since_other = 0
        self._probed = 0
        self._retry_after = RETRY_STEPS

    @property
    def next_nodes(self) -> int:
        """Tree size of the next step: the chosen one, or now and then another, to learn its time."""
        if self.nodes == 1 or self._trial_left or not self._probes or not self.times.is_measured:
            return self.nodes
        if self._since_plain >= PROBE_STEPS:
            return 1
        others = [size for size in self._expected if size not in (1, self.nodes)]
        if others and self._since_other >= PROBE_STEPS:
            return others[self._probed % len(others)]
        return self.nodes

    def speedup(self, nodes: int, context: int) -> float:
        """Tokens per second with trees of that many nodes relative to none, as estimated now."""
        tokens = 1.0 + self._gain.share * (self._expected[nodes] - 1.0)
        return tokens * self.times.seconds(1, context) / self.times.seconds(nodes, context)

    def observe(self, nodes: int, context: int, tokens: int, seconds: float) -> None:
        """Take in one decode step that ran with a tree of `nodes` and decided `tokens`."""
        if not self.times.is_measured:
            return
        is_usual = nodes == self.nodes and not self._trial_left
        self.times.observe(nodes, context, seconds, is_probe=not is_usual)
        if len(self._expected) == 1:
            return
        self._count(nodes)
        if nodes > 1:
            self._gain.add(tokens - 1, self._expected[nodes] - 1.0)
        if self._trial_left:
            self._trial_left -= nodes > 1
            if not self._trial_left:
                self._judge_trial(context)
        elif self.nodes == 1:
            self._retry_later(context)
        elif self._steps % CHOICE_STEPS == 0:
            self._choose(context)

    def _count(self, nodes: int) -> None:
        self._steps += 1
        self._since_plain += 1
        self._since_other += 1
        if nodes == 1:
            self._since_plain = 0
        elif nodes != self.nodes:
            self._since_other = 0
            self._probed += 1

    def _best(self, context: int) -> int:
        return max(self._expected, key=lambda nodes: self.speedup(nodes, context))

    def _choose(self, context: int) -> None:
        best, now = self._best(context), self.speedup(self.nodes, context)
        if best == self.nodes or self.speedup(best, context) < MARGIN * now:
            return
        if best == 1:
            logger.warning("%s: no speculation from now on (%s)", self._reason(context), self._traffic)
        else:
            logger.info("a tree of %d nodes instead of %d from now on (%s)", best, self.nodes, self._traffic)
        self._use(best)

    def _use(self, nodes: int) -> None:
        self.nodes, self._steps_off = nodes, 0

    def _reason(self, context: int) -> str:
        tokens = 1.0 + self._gain.share * (self._expected[self.nodes] - 1.0)
        tree, plain = (1e3 * self.times.seconds(nodes, context) for nodes in (self.nodes, 1))
        return (
            f"speculation with {self.nodes} nodes is slower than without (estimated speedup "
            f"{self.speedup(self.nodes, context):.2f}: {tokens:.2f} tokens in a step of {tree:.2f} ms, "
            f"one in a plain step of {plain:.2f} ms)"
        )

    def _retry_later(self, context: int) -> None:
        self._steps_off += 1
        if self._steps_off < self._retry_after:
            return
        self._use(max((n for n in self._expected if n > 1), key=lambda nodes: self.speedup(nodes, context)))
        self._trial_left = TRIAL_STEPS
        self._retry_after = min(2 * self._retry_after, MAX_RETRY_STEPS)
        self._gain.forget()
        logger.info("trying speculation with %d nodes again (%s)", self.nodes, self._traffic)

    def _judge_trial(self, context: int) -> None:
        best = self._best(context)
        if best > 1:
            self._retry_after = RETRY_STEPS
        self._use(best)


class _Gain:
    """Accepted drafts as a share of those expected, over the last `MEMORY_STEPS` or so; 1.0 to begin with."""

    def __init__(self) -> None:
        self._accepted = self._expected = CHOICE_STEPS * 1.0

    @property
    def share(self) -> float:
        return self._accepted / self._expected

    def add(self, accepted: int, expected: float) -> None:
        keep = 1 - 1 / MEMORY_STEPS
        self._accepted = keep * self._accepted + accepted
        self._expected = keep * self._expected + expected

    def forget(self) -> None:
        """Let the next steps count for almost all."""
        self._accepted, self._expected = self.share, 1.0


def _band(band: int) -> str:
    if band == 0:
        return "greedy"
    return "temperature above 1.5" if band == BANDS else f"temperature up to {band / 2:g}"
