"""A static tree's topology as tensors. Shapes: T tree nodes (root included), D depth."""

import torch
from torch import Tensor

from medusa_core.draft.tree import Tree


def lineage_TD(tree: Tree) -> Tensor:
    """Nodes from the root [T, D+1] to each node, which fills the places beyond its own depth."""
    rows = [[0] * (tree.depth + 1)]
    for node in range(1, tree.size):
        depth, above = tree.depths[node], rows[tree.parents[node]]
        rows.append([*above[:depth], *[node] * (tree.depth + 1 - depth)])
    return torch.tensor(rows)


def ancestors_TT(tree: Tree) -> Tensor:
    """True where the column's node is the row's or an ancestor of it."""
    mask = torch.zeros(tree.size, tree.size, dtype=torch.bool)
    for node, above in enumerate(tree.ancestors):
        mask[node, list(above)] = True
    return mask


def candidate_index(tree: Tree, width: int) -> Tensor:
    """For each drafted node its place in the heads' flattened candidates [K * width]."""
    places = [(len(path) - 1) * width + path[-1] for path in tree.paths]
    return torch.tensor(places, dtype=torch.long)
