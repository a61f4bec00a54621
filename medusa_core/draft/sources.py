"""The draft sources of an engine; among them heads and n-grams under one root, with one budget of nodes."""

import math
from collections.abc import Mapping

from medusa_core.draft.draft_tree import DraftTree, join_roots
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.ngram import NgramSource, as_tree
from medusa_core.draft.source import Committed, DraftBatch, DraftSource
from medusa_core.sampling_params import DraftSourceName, SpeculationParams

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
        budgets = zip(batch.slots, batch.nodes, strict=True)
        found = [self._ngrams.drafts(slot, nodes // 2 + 1) for slot, nodes in budgets]
        # Rounded up, so that no tree is larger than its budget.
        taken = [math.ceil(len(drafts) / STEP) * STEP for drafts in found]
        rest = tuple(max(1, nodes - count) for nodes, count in zip(batch.nodes, taken, strict=True))
        heads = self._heads.propose(batch.with_nodes(rest))
        return join_roots(heads, as_tree(found, batch.roots_B)) if any(found) else heads


def build_sources(heads: HeadSource | None) -> Mapping[DraftSourceName, DraftSource]:
    """By the name that a request asks for; without heads there are n-grams alone."""
    ngrams = NgramSource()
    if heads is None:
        return {DraftSourceName.NGRAM: ngrams}
    return {
        DraftSourceName.HEADS: heads,
        DraftSourceName.NGRAM: ngrams,
        DraftSourceName.BOTH: MergedSource(heads, ngrams),
    }
