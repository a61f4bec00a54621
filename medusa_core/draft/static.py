"""Drafters of one topology for every step: the paper's tree attention (arXiv 2401.10774 §2.1.2).

Shapes: B rows, K heads, N parents of a level, J tokens of a path, V vocabulary, T tree nodes (root included),
D depth.
"""

import torch
from torch import Tensor, nn

from medusa_core.draft.coupling import LevelScores
from medusa_core.draft.draft_tree import Origin, TreeTensors
from medusa_core.draft.top_scores import top_scores
from medusa_core.draft.tree import Tree
from medusa_core.draft.tree_shape import ancestors_TT, candidate_index, lineage_TD


class StaticTopology(nn.Module):
    """A tree's topology, to be filled with tokens."""

    depths_T: Tensor
    parents_T: Tensor
    ancestors_TT: Tensor

    def __init__(self, tree: Tree, device: torch.device) -> None:
        super().__init__()
        tables = {
            "depths_T": torch.tensor(tree.depths),
            "parents_T": torch.tensor(tree.parents),
            "ancestors_TT": ancestors_TT(tree),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def forward(self, tokens_BT: Tensor) -> TreeTensors:
        """This tree with tokens, the roots first."""
        rows = tokens_BT.shape[0]
        return (
            tokens_BT,
            self.depths_T.expand(rows, -1),
            self.parents_T.expand(rows, -1),
            self.ancestors_TT.expand(rows, -1, -1),
            (self.depths_T > 0).expand(rows, -1) * int(Origin.HEADS),
        )


class StaticDrafter(nn.Module):
    """For heads that draft all depths at once."""

    candidates_T: Tensor

    def __init__(self, tree: Tree, device: torch.device) -> None:
        super().__init__()
        self.size, self.max_depth, self._width = tree.size, tree.depth, tree.width
        self.topology = StaticTopology(tree, device)
        index = candidate_index(tree, self._width).to(device)
        self.register_buffer("candidates_T", index, persistent=False)

    def forward(self, scores_BKV: Tensor, roots_B: Tensor, divisors_BK: Tensor) -> TreeTensors:
        """By rank alone: `divisors_BK` change none."""
        _, ranks = top_scores(scores_BKV[:, : self.max_depth], self._width)
        drafted = ranks.flatten(1)[:, self.candidates_T]
        return self.topology(torch.cat([roots_B[:, None], drafted], dim=1))


class StaticLevelDrafter(nn.Module):
    """For heads that see the drafted path; each parent with children is asked once."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        super().__init__()
        self.size, self.max_depth = tree.size, tree.depth
        self.topology = StaticTopology(tree, device)
        levels = [_StaticLevel(tree, depth, device) for depth in range(tree.depth)]
        self.levels = nn.ModuleList(levels)

    def forward(self, scores: LevelScores, roots_B: Tensor, divisors_BK: Tensor) -> TreeTensors:
        """By rank alone: `divisors_BK` change none."""
        tokens = roots_B[:, None]
        for depth, level in enumerate(self.levels):
            rows = level(scores, depth, tokens)
            tokens = torch.cat([tokens, scores.token_ids(rows)], dim=1)
        return self.topology(tokens)


class _StaticLevel(nn.Module):
    """A level of a static tree: its parents' paths as node indices [N, J], its M nodes' places in N * R."""

    paths_NJ: Tensor
    children_M: Tensor

    def __init__(self, tree: Tree, depth: int, device: torch.device) -> None:
        super().__init__()
        below = [path for path in tree.paths if len(path) == depth + 1]
        parents = sorted({path[:-1] for path in below})
        index = {path: node for node, path in enumerate(((), *tree.paths))}
        nodes = torch.tensor([index[path] for path in parents])
        self._width = max(path[-1] for path in below) + 1
        places = torch.tensor([parents.index(path[:-1]) * self._width + path[-1] for path in below])
        paths = lineage_TD(tree)[nodes][:, : depth + 1].to(device)
        self.register_buffer("paths_NJ", paths, persistent=False)
        self.register_buffer("children_M", places.to(device), persistent=False)

    def forward(self, scores: LevelScores, depth: int, tokens_BT: Tensor) -> Tensor:
        """Rows of the logits that its nodes are; `tokens_BT` of the levels above."""
        _, ranks = top_scores(scores.score(depth, tokens_BT[:, self.paths_NJ]), self._width)
        return ranks.flatten(1)[:, self.children_M]
