"""Propose: from the heads' scores to a tree of drafts.

Shapes: B slots, K heads, V vocabulary, R candidates per head, P paths of a superset, T tree nodes (root included).
Scores are the heads' logits, at temperature > 0 plus the very noise the target will draw with (coupled drafting,
design §4): the tree then holds the heads' guesses of that draw. Only the hit rate depends on it, never the output.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from medusa_core.tree import Tree, superset_paths


@dataclass(frozen=True)
class DraftTree:
    """Drafts to verify. `depths_BT` 0 for the root; `parents_BT` the root is its own parent."""

    tokens_BT: Tensor
    depths_BT: Tensor
    parents_BT: Tensor
    ancestors_BTT: Tensor
    max_depth: int


class Drafter(Protocol):
    """Chooses the tree's shape and fills it."""

    size: int
    max_depth: int

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        """Fill a tree of `size` nodes from scores; `taus` turn a head's scores into probabilities."""


def couple(logits_BKV: Tensor, temperature: float, noise_KV: Tensor | None) -> Tensor:
    """Scores that guess the target's seeded draw; the logits themselves at temperature 0."""
    logits = logits_BKV.float()
    if temperature == 0.0 or noise_KV is None:
        return logits
    return logits + temperature * noise_KV[: logits.shape[1], : logits.shape[2]]


def root_tree(roots_B: Tensor) -> DraftTree:
    """The tree of one node: ordinary decoding."""
    zero = torch.zeros_like(roots_B)[:, None]
    return DraftTree(roots_B[:, None], zero, zero, torch.ones_like(zero, dtype=torch.bool)[:, :, None], 0)


class _Shape:
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

    def candidate_index(self, width: int) -> Tensor:
        """For each drafted node its place in the flattened candidates [K * width]."""
        places = [(len(path) - 1) * width + path[-1] for path in self.tree.paths]
        return torch.tensor(places, dtype=torch.long, device=self.device)


class StaticDrafter:
    """The same topology every step: the paper's tree attention (§2.1.2)."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.size, self.max_depth = tree.size, tree.depth
        self._width = tree.width
        self._shape = _Shape(tree, device)
        self._index = self._shape.candidate_index(self._width)

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        candidates = scores_BKV[:, : self.max_depth].topk(self._width, dim=-1).indices.flatten(1)
        tokens = torch.cat([roots_B[:, None], candidates[:, self._index]], dim=1)
        slots = roots_B.shape[0]
        return DraftTree(
            tokens,
            self._shape.depths_T.expand(slots, -1),
            self._shape.parents_T.expand(slots, -1),
            self._shape.ancestors_TT.expand(slots, -1, -1),
            self.max_depth,
        )


class DynamicDrafter:
    """Each step the likeliest nodes, by the product of calibrated head probabilities along their path.

    They are taken from a static superset of paths that is guaranteed to hold them, so all shapes are static.
    """

    def __init__(self, nodes: int, num_heads: int, vocab_size: int, device: torch.device) -> None:
        drafted = min(nodes - 1, vocab_size)
        superset = Tree("superset", superset_paths(drafted, num_heads, drafted))
        self.size, self.max_depth = drafted + 1, superset.depth
        self._width = superset.width
        shape = _Shape(superset, device)
        self._index = shape.candidate_index(self._width)
        self._depths, self._ancestors = shape.depths_T, shape.ancestors_TT
        self._parents = shape.parents_T
        # Row p: where the log-probabilities along path p stand among K * R values; unused places point at a zero.
        blank = superset.depth * self._width
        rows = [
            [depth * self._width + rank for depth, rank in enumerate(path)] + [blank] * (superset.depth - len(path))
            for path in superset.paths
        ]
        self._along_path = torch.tensor(rows, device=device)

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        scores = scores_BKV[:, : self.max_depth]
        scores = scores / scores.new_tensor(taus[: self.max_depth])[None, :, None]
        best = scores.topk(self._width, dim=-1)
        log_probs = (best.values - scores.logsumexp(dim=-1, keepdim=True)).flatten(1)
        # An impossible candidate (-inf) must not tie with its own children.
        log_probs = torch.nn.functional.pad(log_probs.clamp_(min=-1e4), (0, 1))
        joint_BP = log_probs[:, self._along_path].sum(dim=-1)
        # Stable: of equal paths the earlier, hence a parent before its child, so the choice is prefix-closed.
        order = joint_BP.sort(dim=1, descending=True, stable=True).indices[:, : self.size - 1]
        chosen = torch.nn.functional.pad(order.sort(dim=1).values + 1, (1, 0))
        drafted = best.indices.flatten(1).gather(1, self._index[chosen[:, 1:] - 1])
        new_index = torch.zeros(chosen.shape[0], self._parents.shape[0], dtype=torch.long, device=chosen.device)
        new_index.scatter_(1, chosen, torch.arange(self.size, device=chosen.device).expand_as(chosen))
        return DraftTree(
            torch.cat([roots_B[:, None], drafted], dim=1),
            self._depths[chosen],
            new_index.gather(1, self._parents[chosen]),
            self._ancestors[chosen[:, :, None], chosen[:, None, :]],
            self.max_depth,
        )
