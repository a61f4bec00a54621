"""Propose for heads that see the drafted path (Hydra): level by level, all parents of a level at once.

Shapes: B slots, N parents expanded at a level, R candidates per parent, M nodes kept per level, P nodes of
the pool, T tree nodes (root included), D depth, V rows of the heads' logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.decoding.drafting import IMPOSSIBLE, DraftTree, TreeShape, couple
from medusa_core.heads.base import SequentialHeads
from medusa_core.tree import Tree

MAX_CANDIDATES = 10  # ranks a parent's children can have; the published trees use no more either


@dataclass(frozen=True, slots=True)
class LevelScores:
    """What the heads say of each level's candidates; coupled with the target's noise if there is any."""

    heads: SequentialHeads
    hidden_BE: Tensor
    temperature: float
    noise_KV: Tensor | None

    def score(self, level: int, paths_BNJ: Tensor) -> Tensor:
        """Float32 [B, N, V] of the tokens after each path (ids, the root first, J = level + 1)."""
        logits = self.heads.level_logits(level, self.hidden_BE, paths_BNJ)
        noise = None if self.noise_KV is None else self.noise_KV[level : level + 1]
        return couple(logits, self.temperature, noise, self.heads.token_map)

    def token_ids(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the logits."""
        token_map = self.heads.token_map
        return rows if token_map is None else token_map[rows]


class StaticLevelDrafter:
    """The same topology every step; each parent with children is asked once."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.size, self.max_depth = tree.size, tree.depth
        self._shape = TreeShape(tree, device)
        self._levels = [_StaticLevel.of(tree, self._shape, depth) for depth in range(tree.depth)]

    def draft(self, scores: LevelScores, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        tokens = roots_B[:, None]
        for depth, level in enumerate(self._levels):
            candidates = scores.score(depth, tokens[:, level.paths_NJ]).topk(level.width, dim=-1).indices
            rows = candidates.flatten(1)[:, level.children]
            tokens = torch.cat([tokens, scores.token_ids(rows)], dim=1)
        return self._shape.filled(tokens)


@dataclass(frozen=True, slots=True)
class _StaticLevel:
    """A level of a static tree: its parents' paths as node indices [N, J], its nodes' places in N * R."""

    paths_NJ: Tensor
    children: Tensor
    width: int

    @classmethod
    def of(cls, tree: Tree, shape: TreeShape, depth: int) -> "_StaticLevel":
        below = [path for path in tree.paths if len(path) == depth + 1]
        parents = sorted({path[:-1] for path in below})
        index = {path: node for node, path in enumerate(((), *tree.paths))}
        nodes = torch.tensor([index[path] for path in parents], device=shape.device)
        width = max(path[-1] for path in below) + 1
        places = [parents.index(path[:-1]) * width + path[-1] for path in below]
        return cls(shape.lineage_TD[nodes][:, : depth + 1], torch.tensor(places, device=shape.device), width)


@dataclass(slots=True)
class _Pool:
    """Candidates of all levels so far, the root first: parents always stand before their children.

    `lineage_BPD`: pool indices from the root to each node, which fills the places beyond its own depth.
    """

    tokens_BP: Tensor
    joint_BP: Tensor
    lineage_BPD: Tensor
    depths_P: list[int]


class DynamicLevelDrafter:
    """Each step the likeliest nodes, by the product of calibrated probabilities along their path.

    Every level keeps its best nodes and expands the best of those; of all that were kept, the best T - 1 are
    the tree. A level is never asked for nodes that could not all be in the tree with their ancestors.
    """

    def __init__(self, nodes: int, num_heads: int, vocab_size: int) -> None:
        self._drafted = nodes - 1
        self.max_depth = min(num_heads, self._drafted)
        self._width = min(MAX_CANDIDATES, vocab_size)
        pool, parents = 1, 1
        self._kept: list[int] = []
        self._expanded: list[int] = []
        for depth in range(self.max_depth):
            self._expanded.append(parents)
            self._kept.append(min(self._drafted - depth, parents * self._width))
            pool += self._kept[-1]
            # p parents of this level with a child each, below a chain: depth + 2p nodes.
            parents = min(self._kept[-1], max(1, (self._drafted - depth) // 2))
        self.size = min(nodes, pool)

    def draft(self, scores: LevelScores, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        pool = self._root(roots_B)
        for depth in range(self.max_depth):
            if self._is_settled(pool):
                break
            self._grow(pool, scores, depth, taus[depth])
        return self._choose(pool)

    def _is_settled(self, pool: _Pool) -> bool:
        """Whether no deeper node could be among the best: then the remaining heads need not be asked.

        On a CPU only: elsewhere asking would make the host wait for the device.
        """
        if len(pool.depths_P) < self.size or pool.joint_BP.device.type != "cpu":
            return False
        last = pool.joint_BP[:, 1:].topk(self.size - 1, dim=1).values[:, -1]
        newest = pool.joint_BP[:, pool.depths_P.index(pool.depths_P[-1])]  # the best of the deepest level
        return bool((newest <= last).all())

    def _root(self, roots_B: Tensor) -> _Pool:
        zero = torch.zeros_like(roots_B)[:, None]
        lineage = zero[:, :, None].expand(-1, -1, self.max_depth + 1)
        return _Pool(roots_B[:, None], zero.float(), lineage, [0])

    def _grow(self, pool: _Pool, scores: LevelScores, depth: int, tau: float) -> None:
        """Expand the best nodes of `depth`, which come last in the pool, best first; keep the best found."""
        first = len(pool.depths_P) - (self._kept[depth - 1] if depth else 1)
        count, width = self._expanded[depth], self._width
        parents = slice(first, first + count)
        lineage = pool.lineage_BPD[:, parents]
        paths = pool.tokens_BP.gather(1, lineage[:, :, : depth + 1].flatten(1)).unflatten(1, (count, -1))
        best = (scores.score(depth, paths) / tau).log_softmax(dim=-1).topk(width, dim=-1)
        # Never above 0, by rounding, so no child beats its parent; nor NaN or -inf, from heads that overflow.
        log_probs = best.values.nan_to_num_(nan=IMPOSSIBLE).clamp_(min=IMPOSSIBLE, max=0.0)
        joint = (pool.joint_BP[:, parents, None] + log_probs).flatten(1)
        kept = joint.topk(self._kept[depth], dim=1)
        tokens = scores.token_ids(best.indices.flatten(1).gather(1, kept.indices))
        parent = torch.div(kept.indices, width, rounding_mode="floor")[:, :, None].expand(
            -1, -1, lineage.shape[2]
        )
        start = len(pool.depths_P)
        own = torch.arange(start, start + self._kept[depth], device=tokens.device)
        lineage = lineage.gather(1, parent)
        lineage[:, :, depth + 1 :] = own[:, None]
        pool.tokens_BP = torch.cat([pool.tokens_BP, tokens], dim=1)
        pool.joint_BP = torch.cat([pool.joint_BP, kept.values], dim=1)
        pool.lineage_BPD = torch.cat([pool.lineage_BPD, lineage], dim=1)
        pool.depths_P += [depth + 1] * self._kept[depth]

    def _choose(self, pool: _Pool) -> DraftTree:
        """The root and the best others; of equals the earlier, hence parents before their children."""
        order = pool.joint_BP[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, : self.size - 1]
        chosen = functional.pad(order.sort(dim=1).values + 1, (1, 0))
        slots, device = chosen.shape[0], chosen.device
        new_index = torch.zeros_like(pool.tokens_BP)
        new_index.scatter_(1, chosen, torch.arange(self.size, device=device).expand_as(chosen))
        wide = chosen[:, :, None].expand(-1, -1, self.max_depth + 1)
        lineage = new_index.gather(1, pool.lineage_BPD.gather(1, wide).flatten(1)).unflatten(
            1, (self.size, -1)
        )
        depths_BT = torch.tensor(pool.depths_P, device=device)[chosen]
        above = (depths_BT - 1).clamp_(min=0)[:, :, None]
        ancestors = torch.zeros(slots, self.size, self.size, dtype=torch.bool, device=device)
        return DraftTree(
            pool.tokens_BP.gather(1, chosen),
            depths_BT,
            lineage.gather(2, above)[:, :, 0],
            ancestors.scatter_(2, lineage, True),
            self.max_depth,
        )
