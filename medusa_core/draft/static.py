"""Drafters of one topology for every step: the paper's tree attention (arXiv 2401.10774 §2.1.2).

Shapes: B rows, K heads, N parents of a level, J tokens of a path, V vocabulary, T tree nodes (root included),
D depth.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medusa_core.draft.coupling import LevelScores
from medusa_core.draft.draft_tree import DraftTree, Origin
from medusa_core.draft.tree import Tree


class TreeShape:
    """A tree's topology as tensors on a device."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.tree = tree
        self.device = device

    @cached_property
    def depths_T(self) -> Tensor:
        return torch.tensor(self.tree.depths, device=self.device)

    @cached_property
    def parents_T(self) -> Tensor:
        return torch.tensor(self.tree.parents, device=self.device)

    @cached_property
    def ancestors_TT(self) -> Tensor:
        mask = torch.zeros(self.tree.size, self.tree.size, dtype=torch.bool)
        for node, above in enumerate(self.tree.ancestors):
            mask[node, list(above)] = True
        return mask.to(self.device)

    @cached_property
    def origins_T(self) -> Tensor:
        return (self.depths_T > 0) * int(Origin.HEADS)

    @cached_property
    def lineage_TD(self) -> Tensor:
        """Nodes from the root [T, D+1] to each node, which fills the places beyond its own depth."""
        rows = [[0] * (self.tree.depth + 1)]
        for node in range(1, self.tree.size):
            depth, above = self.tree.depths[node], rows[self.tree.parents[node]]
            rows.append([*above[:depth], *[node] * (self.tree.depth + 1 - depth)])
        return torch.tensor(rows, device=self.device)

    def filled(self, tokens_BT: Tensor) -> DraftTree:
        """This topology with tokens, the roots first."""
        slots = tokens_BT.shape[0]
        return DraftTree(
            tokens_BT,
            self.depths_T.expand(slots, -1),
            self.parents_T.expand(slots, -1),
            self.ancestors_TT.expand(slots, -1, -1),
            self.origins_T.expand(slots, -1),
            self.tree.depth,
        )

    def candidate_index(self, width: int) -> Tensor:
        """For each drafted node its place in the flattened candidates [K * width]."""
        places = [(len(path) - 1) * width + path[-1] for path in self.tree.paths]
        return torch.tensor(places, dtype=torch.long, device=self.device)


class StaticDrafter:
    """For heads that draft all depths at once."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.size, self.max_depth = tree.size, tree.depth
        self._width = tree.width
        self._shape = TreeShape(tree, device)
        self._index = self._shape.candidate_index(self._width)

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        candidates = scores_BKV[:, : self.max_depth].topk(self._width, dim=-1).indices.flatten(1)
        return self._shape.filled(torch.cat([roots_B[:, None], candidates[:, self._index]], dim=1))


class StaticLevelDrafter:
    """For heads that see the drafted path; each parent with children is asked once."""

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
