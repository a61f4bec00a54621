"""Dynamic trees of heads that draft all depths at once (Medusa): each step its likeliest nodes.

Shapes: B rows, K heads, V vocabulary, R candidates per head, P paths of a superset, T tree nodes (root
included). Scores are the heads' logits, at temperature > 0 coupled with the target's noise.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.draft.draft_tree import DraftTree, Origin
from medusa_core.draft.static import TreeShape
from medusa_core.draft.tree import Tree, superset_paths

IMPOSSIBLE = -1e4  # log-probability; finite, so that its children still rank below it


class DynamicDrafter:
    """Each step the likeliest nodes, by the product of calibrated head probabilities along their path.

    They are taken from a static superset of paths that is guaranteed to hold them, so all shapes are static.
    """

    def __init__(self, nodes: int, num_heads: int, vocab_size: int, device: torch.device) -> None:
        drafted = min(nodes - 1, vocab_size)
        superset = Tree("superset", superset_paths(drafted, num_heads, drafted))
        self.size, self.max_depth = drafted + 1, superset.depth
        self._width = superset.width
        shape = TreeShape(superset, device)
        self._index = shape.candidate_index(self._width)
        self._depths, self._parents = shape.depths_T, shape.parents_T
        self._lineage = shape.lineage_TD
        # Row p: where the log-probabilities along path p stand among K * R values; unused places: at a zero.
        blank = superset.depth * self._width
        rows = [
            [depth * self._width + rank for depth, rank in enumerate(path)]
            + [blank] * (superset.depth - len(path))
            for path in superset.paths
        ]
        self._along_path = torch.tensor(rows, device=device)

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        tokens_BR, log_probs_BR = self._candidates(scores_BKV, taus)
        joint_BP = log_probs_BR[:, self._along_path].sum(dim=-1)
        chosen, new_index = choose_best(joint_BP, self.size)
        lineage = new_index.gather(1, self._lineage[chosen].flatten(1)).unflatten(1, (self.size, -1))
        ancestors = torch.zeros(len(chosen), self.size, self.size, dtype=torch.bool, device=chosen.device)
        drafted = tokens_BR.gather(1, self._index[chosen[:, 1:] - 1])
        return DraftTree(
            torch.cat([roots_B[:, None], drafted], dim=1),
            self._depths[chosen],
            new_index.gather(1, self._parents[chosen]),
            ancestors.scatter_(2, lineage, True),
            (self._depths[chosen] > 0) * int(Origin.HEADS),
            self.max_depth,
        )

    def _candidates(self, scores_BKV: Tensor, taus: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of every head's best ranks, flattened; a zero follows the latter."""
        scores = scores_BKV[:, : self.max_depth]
        scores = scores / _divisors(taus[: self.max_depth], scores.device)
        ranks, log_probs = best_ranks(scores, self._width)
        return ranks.flatten(1), functional.pad(log_probs.flatten(1), (0, 1))


def best_ranks(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest of the last dimension, and their log-probabilities."""
    best = scores.log_softmax(dim=-1).topk(width, dim=-1)
    # Never above 0, by rounding, so no child beats its parent; nor NaN or -inf, from heads that overflow.
    return best.indices, best.values.nan_to_num_(nan=IMPOSSIBLE).clamp_(min=IMPOSSIBLE, max=0.0)


def choose_best(joint_BP: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The root and the likeliest of P drafts below it, in their order [B, size]; and where each node of all
    stands among those [B, P+1].

    Stable: of equal drafts the earlier, hence a parent before its child, so the choice is prefix-closed.
    """
    order = joint_BP.sort(dim=1, descending=True, stable=True).indices[:, : size - 1]
    chosen = functional.pad(order.sort(dim=1).values + 1, (1, 0))
    new_index = joint_BP.new_zeros(len(joint_BP), joint_BP.shape[1] + 1, dtype=torch.long)
    new_index.scatter_(1, chosen, torch.arange(size, device=chosen.device).expand_as(chosen))
    return chosen, new_index


@lru_cache(maxsize=256)
def _divisors(taus: tuple[float, ...], device: torch.device) -> Tensor:
    """taus [1, K, 1] on the device: a copy in every step would make the host wait for the heads."""
    return torch.tensor(taus, device=device)[None, :, None]
