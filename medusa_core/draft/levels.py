"""Dynamic trees of heads that see the drafted path (Hydra): level by level, a level's parents all at once.

Shapes: B rows, N parents expanded at a level, J tokens of a path, M nodes kept per level, P of all levels, D
greatest depth, T tree nodes (root included), V rows of the heads' logits.
"""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from medusa_core.draft.coupling import LevelScores
from medusa_core.draft.draft_tree import TreeTensors
from medusa_core.draft.dynamic import choose_best, tree_of_lineages
from medusa_core.draft.top_scores import IMPOSSIBLE, top_scores


@dataclass(slots=True)
class _Pool:
    """Candidates level by level, the root first, each level best first: parents stand before their children.

    `joint`: log-probability of the path. `lineage`: places in the pool from the root to the candidate, which
    fills those beyond its own depth.
    """

    tokens: list[Tensor] = field(default_factory=list)
    joint: list[Tensor] = field(default_factory=list)
    lineage: list[Tensor] = field(default_factory=list)


class DynamicLevelDrafter(nn.Module):
    """Each step the likeliest nodes, by the product of calibrated probabilities along their path.

    Every level keeps its best nodes and expands the best of those; of all that were kept, the best T - 1 are
    the tree. A level keeps as many as the tree has room for below a chain, and expands two for every five of
    them. Half would be all that could each have a child in the tree, but gains no tokens (demo heads at 16
    nodes: 4.33 a step with both) and makes every product slower.
    """

    depths_P: Tensor
    places_P: Tensor

    def __init__(self, nodes: int, num_heads: int, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        drafted = nodes - 1
        self.max_depth = min(num_heads, drafted)
        self._kept: list[int] = []
        self._expanded: list[int] = []
        parents = 1
        for depth in range(self.max_depth):
            self._expanded.append(parents)
            self._kept.append(min(drafted - depth, parents * vocab_size))
            parents = min(self._kept[-1], max(1, (drafted - depth) * 2 // 5))
        starts = list(accumulate(self._kept, initial=1))  # where each level begins in the pool
        self.size = min(nodes, starts[-1])
        depths = [0, *(depth for depth, kept in enumerate(self._kept, 1) for _ in range(kept))]
        self.register_buffer("depths_P", torch.tensor(depths, device=device), persistent=False)
        self.register_buffer("places_P", torch.arange(starts[-1], device=device), persistent=False)
        self._spans = [slice(first, end) for first, end in pairwise(starts)]

    def forward(self, scores: LevelScores, roots_B: Tensor, divisors_BK: Tensor) -> TreeTensors:
        """`divisors_BK` make each head's scores probabilities; one row may stand for all B."""
        paths_BNJ = roots_B[:, None, None]
        lineage = torch.zeros_like(paths_BNJ).expand(-1, -1, self.max_depth + 1)
        pool = _Pool([roots_B[:, None]], [torch.zeros_like(roots_B, dtype=torch.float32)[:, None]], [lineage])
        for depth in range(self.max_depth):
            paths_BNJ = self._grow(pool, scores, depth, divisors_BK[:, depth], paths_BNJ)
        chosen, new_index = choose_best(torch.cat(pool.joint[1:], dim=1), self.size)
        lineage_BPD = torch.cat(pool.lineage, dim=1)
        lineage_BTD = lineage_BPD.gather(1, chosen[:, :, None].expand(-1, -1, self.max_depth + 1))
        tokens_BT = torch.cat(pool.tokens, dim=1).gather(1, chosen)
        return tree_of_lineages(tokens_BT, self.depths_P[chosen], lineage_BTD, new_index)

    def _grow(
        self, pool: _Pool, scores: LevelScores, depth: int, divisor_B: Tensor, paths_BNJ: Tensor
    ) -> Tensor:
        """Ask for children of the best nodes of `depth`, keep the best; returns the next paths to expand."""
        score_BNV = scores.score(depth, paths_BNJ) / divisor_B[:, None, None]
        parent_BN = pool.joint[-1][:, : paths_BNJ.shape[1]]
        joint_BNV = score_BNV + (parent_BN - score_BNV.logsumexp(dim=2))[:, :, None]
        values, places = top_scores(joint_BNV.flatten(1), self._kept[depth])
        parents = torch.div(places, score_BNV.shape[2], rounding_mode="floor")
        above_BM = parent_BN.gather(1, parents)
        # Of heads that overflow, too: a child never beats its parent, and has a finite value.
        joint = torch.clamp(values.nan_to_num(nan=IMPOSSIBLE), above_BM + IMPOSSIBLE, above_BM)
        tokens = scores.token_ids(places % score_BNV.shape[2])
        pool.tokens.append(tokens)
        pool.joint.append(joint)
        pool.lineage.append(self._lineage(pool.lineage[-1], parents, depth))
        if depth + 1 == self.max_depth:
            return paths_BNJ
        count = self._expanded[depth + 1]
        above = paths_BNJ.gather(1, parents[:, :count, None].expand(-1, -1, depth + 1))
        return torch.cat([above, tokens[:, :count, None]], dim=2)

    def _lineage(self, above_BMD: Tensor, parents: Tensor, depth: int) -> Tensor:
        """Of the children that a level of `depth` got."""
        width = self.max_depth + 1
        shared = above_BMD[:, :, : depth + 1].gather(1, parents[:, :, None].expand(-1, -1, depth + 1))
        own = self.places_P[self._spans[depth]]
        return torch.cat([shared, own[None, :, None].expand(len(parents), -1, width - depth - 1)], dim=2)
