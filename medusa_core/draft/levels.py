"""Dynamic trees of heads that see the drafted path (Hydra): level by level, a level's parents all at once.

Shapes: B rows, N parents expanded at a level, J tokens of a path, M nodes kept per level, T tree nodes (root
included), V rows of the heads' logits.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from medusa_core.draft.coupling import LevelScores
from medusa_core.draft.draft_tree import DraftTree, Origin
from medusa_core.draft.dynamic import best_ranks, choose_best

MAX_CANDIDATES = 10  # ranks a parent's children can have; the published trees use no more either


@dataclass(slots=True)
class _Pool:
    """Candidates level by level, the root first, each level best first: parents stand before their children.

    `parents`: places in the pool, the root its own.
    """

    tokens: list[Tensor]
    joint: list[Tensor]
    parents: list[Tensor]


class DynamicLevelDrafter:
    """Each step the likeliest nodes, by the product of calibrated probabilities along their path.

    Every level keeps its best nodes and expands the best of those; of all that were kept, the best T - 1 are
    the tree. A level is never asked for nodes that could not all be in the tree with their ancestors.
    """

    def __init__(self, nodes: int, num_heads: int, vocab_size: int) -> None:
        self._drafted = nodes - 1
        self.max_depth = min(num_heads, self._drafted)
        self._width = min(MAX_CANDIDATES, vocab_size)
        parents = 1
        self._kept: list[int] = []
        self._expanded: list[int] = []
        for depth in range(self.max_depth):
            self._expanded.append(parents)
            self._kept.append(min(self._drafted - depth, parents * self._width))
            # p parents of this level with a child each, below a chain: depth + 2p nodes.
            parents = min(self._kept[-1], max(1, (self._drafted - depth) // 2))
        self._starts = [0, *accumulate(self._kept, initial=1)]  # where each level begins in the pool
        self.size = min(nodes, self._starts[-1])

    def draft(self, scores: LevelScores, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        zero = torch.zeros_like(roots_B)[:, None]
        pool = _Pool([roots_B[:, None]], [zero.float()], [zero])
        paths_BNJ = roots_B[:, None, None]
        for depth in range(self.max_depth):
            if self._is_settled(pool):
                break
            paths_BNJ = self._grow(pool, scores, depth, taus[depth], paths_BNJ)
        return self._choose(pool)

    def _is_settled(self, pool: _Pool) -> bool:
        """Whether no deeper node could be among the best: then the remaining heads need not be asked.

        On a CPU only: elsewhere asking would make the host wait for the device.
        """
        levels = len(pool.joint)
        if self._starts[levels] < self.size or pool.joint[0].device.type != "cpu":
            return False
        last = torch.cat(pool.joint[1:], dim=1).topk(self.size - 1, dim=1).values[:, -1]
        return bool((pool.joint[-1][:, 0] <= last).all())

    def _grow(self, pool: _Pool, scores: LevelScores, depth: int, tau: float, paths_BNJ: Tensor) -> Tensor:
        """Ask for children of the best nodes of `depth`, keep the best; returns the next paths to expand."""
        ranks, log_probs = best_ranks(scores.score(depth, paths_BNJ) / tau, self._width)
        joint = (pool.joint[-1][:, : paths_BNJ.shape[1], None] + log_probs).flatten(1)
        kept = joint.topk(self._kept[depth], dim=1)
        parents = torch.div(kept.indices, self._width, rounding_mode="floor")
        tokens = scores.token_ids(ranks.flatten(1).gather(1, kept.indices))
        pool.tokens.append(tokens)
        pool.joint.append(kept.values)
        pool.parents.append(parents + self._starts[depth])
        if depth + 1 == self.max_depth:
            return paths_BNJ
        count = self._expanded[depth + 1]
        above = paths_BNJ.gather(1, parents[:, :count, None].expand(-1, -1, depth + 1))
        return torch.cat([above, tokens[:, :count, None]], dim=2)

    def _choose(self, pool: _Pool) -> DraftTree:
        """The tree of the root and the best others."""
        chosen, new_index = choose_best(torch.cat(pool.joint[1:], dim=1), self.size)
        tokens, parents = torch.cat(pool.tokens, dim=1), torch.cat(pool.parents, dim=1)
        parents_BT = new_index.gather(1, parents.gather(1, chosen))
        ancestors, far = torch.eye(self.size, dtype=torch.bool, device=tokens.device), parents_BT
        ancestors_BTT = ancestors.expand(tokens.shape[0], -1, -1)
        for _ in range(self.max_depth.bit_length()):  # each round reaches twice as far up
            rows = far[:, :, None].expand(-1, -1, self.size)
            ancestors_BTT = ancestors_BTT | ancestors_BTT.gather(1, rows)
            far = far.gather(1, far)
        depths_BT = ancestors_BTT.sum(dim=2) - 1
        origins_BT = (depths_BT > 0) * int(Origin.HEADS)
        return DraftTree(
            tokens.gather(1, chosen), depths_BT, parents_BT, ancestors_BTT, origins_BT, self.max_depth
        )
