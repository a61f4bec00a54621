"""Drafts of heads and of n-grams under one root, with one budget of nodes."""

from medusa_core.draft.draft_tree import DraftTree, join_roots, stack_rows
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.ngram import NgramSource, as_tree
from medusa_core.draft.source import Committed, DraftBatch
from medusa_core.sampling_params import SpeculationParams

STEP = 4  # sizes of the heads' share differ by this much, so that few drafters are built


class MergedSource:
    """N-grams take what they find worth drafting, at most half of the budget; the heads have the rest."""

    def __init__(self, heads: HeadSource, ngrams: NgramSource) -> None:
        self._heads, self._ngrams = heads, ngrams

    def check(self, speculation: SpeculationParams) -> None:
        self._heads.check(speculation)
        self._ngrams.check(speculation)

    def is_adaptive(self, speculation: SpeculationParams) -> bool:
        return True

    def max_depth(self, speculation: SpeculationParams, nodes: int) -> int:
        parts = (self._heads, self._ngrams)
        return max(part.max_depth(speculation, nodes) for part in parts)

    def start(self, slot: int) -> None:
        self._heads.start(slot)
        self._ngrams.start(slot)

    def observe(self, committed: Committed) -> None:
        self._heads.observe(committed)
        self._ngrams.observe(committed)

    def propose(self, batch: DraftBatch) -> DraftTree:
        found = [
            self._ngrams.drafts(slot, nodes // 2 + 1)
            for slot, nodes in zip(batch.slots, batch.nodes, strict=True)
        ]
        # Rounded up, so that no tree is larger than its budget.
        rest = [
            max(1, nodes - -(-len(drafts) // STEP) * STEP)
            for nodes, drafts in zip(batch.nodes, found, strict=True)
        ]
        heads = self._heads.propose(batch.with_nodes(tuple(rest)))
        if not any(found):
            return heads
        ngrams = [([row], as_tree(drafts, batch.roots_B[row : row + 1])) for row, drafts in enumerate(found)]
        return join_roots(heads, stack_rows(ngrams))
