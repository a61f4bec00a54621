"""What a sequence's next step drafts: from which source, and how many nodes."""

from collections.abc import Mapping
from dataclasses import dataclass

from medusa_core.draft.source import DraftSource
from medusa_core.engine.adaptive_size import AdaptiveTreeSize, AdaptiveTreeSizes
from medusa_core.engine.outputs import StepStats
from medusa_core.engine.sequence import Sequence
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`source` None drafts nothing. `size` learns from the step, begun at `context` cached tokens."""

    size: AdaptiveTreeSize
    context: int
    source: DraftSource | None = None
    nodes: int = 1
    depth: int = 0

    @property
    def baseline_seconds(self) -> float:
        """What a step without speculation takes here; 0.0 if unknown."""
        return self.size.times.seconds(1, self.context)

    def observe(self, stats: StepStats) -> None:
        """Learn what the step cost. One that found nothing to draft tells nothing, nor does a named tree."""
        if self.nodes == 1 or (self.nodes > 1 and stats.tree_nodes > 1):
            self.size.observe(self.nodes, self.context, 1 + sum(stats.accepted), stats.seconds)


class StepPlanner:
    """Knows the sources and how large trees pay for each kind of request."""

    def __init__(
        self,
        sources: Mapping[DraftSourceName, DraftSource],
        sizes: AdaptiveTreeSizes,
        context_length: int,
    ) -> None:
        self._sources, self._sizes, self._context_length = sources, sizes, context_length

    def source_of(self, params: SamplingParams) -> DraftSource | None:
        """What drafts for a request, and so has to be told of its tokens; None if nothing does."""
        if params.speculation.mode is SpeculationMode.OFF:
            return None
        return self._sources.get(params.speculation.source)

    def mode_of(self, params: SamplingParams) -> SpeculationMode:
        """OFF also where there is nothing to draft with."""
        return SpeculationMode.OFF if self.source_of(params) is None else params.speculation.mode

    def plan(self, sequence: Sequence) -> StepPlan:
        """Nothing is drafted where the budget or context ends: no draft could be kept, or have a position."""
        speculation, context = sequence.params.speculation, sequence.num_cached
        source, size = self.source_of(sequence.params), self._sizes.of(sequence.params)
        if source is None or sequence.budget <= 1:
            return StepPlan(size, context)
        nodes = size.next_nodes if source.is_adaptive(speculation) else 0
        if nodes == 1:
            return StepPlan(size, context)
        depth = source.max_depth(speculation, nodes)
        if sequence.num_tokens + depth > self._context_length:
            return StepPlan(size, context)
        return StepPlan(size, context, source, nodes, depth)
