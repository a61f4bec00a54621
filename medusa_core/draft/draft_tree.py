"""A tree of drafts as tensors: what a source proposes and one forward pass verifies.

Shapes: B rows, T tree nodes (root included). The root is node 0; parents precede their children.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional

TreeTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""tokens_BT, depths_BT, parents_BT, ancestors_BTT and origins_BT of a `DraftTree`."""


class Origin(IntEnum):
    """Who decided or drafted a token; the root and whatever pads a tree are the model's own."""

    MODEL = 0
    HEADS = 1
    NGRAM = 2


@dataclass(frozen=True)
class DraftTree:
    """Drafts to verify. `depths_BT` 0 for the root; `parents_BT` the root is its own parent.

    `ancestors_BTT` is True where the column's node is the row's node or an ancestor of it; `origins_BT` holds
    `Origin` values.
    """

    tokens_BT: Tensor
    depths_BT: Tensor
    parents_BT: Tensor
    ancestors_BTT: Tensor
    origins_BT: Tensor
    max_depth: int

    @property
    def size(self) -> int:
        """T, padding included."""
        return int(self.tokens_BT.shape[1])

    def paths_BTD(self) -> Tensor:
        """Nodes from the root to each node [B, T, D+1], which fills the places beyond its own depth."""
        depths = torch.where(self.ancestors_BTT, self.depths_BT[:, None, :], self.max_depth + 1)
        path = depths.argsort(dim=2, stable=True)[:, :, : self.max_depth + 1]
        place = torch.arange(path.shape[2], device=path.device)
        return path.gather(2, torch.minimum(place.expand_as(path), self.depths_BT[:, :, None]))


def root_tree(roots_B: Tensor) -> DraftTree:
    """The tree of one node: ordinary decoding."""
    zero = torch.zeros_like(roots_B)[:, None]
    itself = torch.ones_like(zero, dtype=torch.bool)[:, :, None]
    return DraftTree(roots_B[:, None], zero, zero, itself, zero, 0)


def join_roots(first: DraftTree, second: DraftTree) -> DraftTree:
    """Both trees under one root, the first's nodes before the second's."""
    count = first.size
    moved = torch.where(second.parents_BT == 0, 0, second.parents_BT + count - 1)
    above = functional.pad(first.ancestors_BTT, (0, second.size - 1))
    below = second.ancestors_BTT[:, 1:]
    below = torch.cat([below[:, :, :1], functional.pad(below[:, :, 1:], (count - 1, 0))], dim=2)
    return DraftTree(
        torch.cat([first.tokens_BT, second.tokens_BT[:, 1:]], dim=1),
        torch.cat([first.depths_BT, second.depths_BT[:, 1:]], dim=1),
        torch.cat([first.parents_BT, moved[:, 1:]], dim=1),
        torch.cat([above, below], dim=1),
        torch.cat([first.origins_BT, second.origins_BT[:, 1:]], dim=1),
        max(first.max_depth, second.max_depth),
    )


def stack_rows(parts: Sequence[tuple[Sequence[int], DraftTree]]) -> DraftTree:
    """One tree of all rows, each part given with the rows it is for; small trees are padded."""
    if len(parts) == 1:
        return parts[0][1]
    size = max(tree.size for _, tree in parts)
    depth = max(tree.max_depth for _, tree in parts)
    padded = [pad_tree(tree, size) for _, tree in parts]
    places = torch.tensor([row for rows, _ in parts for row in rows], device=padded[0].tokens_BT.device)
    order = places.argsort()
    fields = ("tokens_BT", "depths_BT", "parents_BT", "ancestors_BTT", "origins_BT")
    joined = {name: torch.cat([getattr(tree, name) for tree in padded])[order] for name in fields}
    return DraftTree(**joined, max_depth=depth)


def pad_tree(tree: DraftTree, size: int) -> DraftTree:
    """With nodes that are never on a path: of the root's token and depth, seen by nobody but themselves."""
    missing = size - tree.size
    if missing == 0:
        return tree
    itself = torch.eye(size, dtype=torch.bool, device=tree.tokens_BT.device)
    ancestors = functional.pad(tree.ancestors_BTT, (0, missing, 0, missing))
    ancestors[:, tree.size :] |= itself[tree.size :]
    return replace(
        tree,
        tokens_BT=torch.cat([tree.tokens_BT, tree.tokens_BT[:, :1].expand(-1, missing)], dim=1),
        depths_BT=functional.pad(tree.depths_BT, (0, missing)),
        parents_BT=functional.pad(tree.parents_BT, (0, missing)),
        ancestors_BTT=ancestors,
        origins_BT=functional.pad(tree.origins_BT, (0, missing)),
    )
