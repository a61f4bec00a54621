"""Propose: from the heads' scores to a tree of drafts.

Shapes: B slots, K heads, V vocabulary, R candidates per head, P paths of a superset, T tree nodes (root
included). Scores are the heads' logits, at temperature > 0 plus the very noise the target will draw with
(coupled drafting, design §4): the tree then holds the heads' guesses of that draw. Only the hit rate depends
on it, never the output.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.draft.tree import Tree, superset_paths

IMPOSSIBLE = -1e4  # log-probability; finite, so that its children still rank below it


@dataclass(frozen=True)
class DraftTree:
    """Drafts to verify. `depths_BT` 0 for the root; `parents_BT` the root is its own parent."""

    tokens_BT: Tensor
    depths_BT: Tensor
    parents_BT: Tensor
    ancestors_BTT: Tensor
    max_depth: int


class Drafter(Protocol):
    """Chooses the tree's shape and fills it from what heads say of all depths at once."""

    size: int
    max_depth: int

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        """Fill a tree of `size` nodes from scores; `taus` turn a head's scores into probabilities."""


# A head does not know the tokens in between, so its distribution is a blend of sharper ones and its logits
# differ less than the target's: at full weight the noise decides too much. The demo heads' first guesses are
# right most often between 0.6 and 0.9 (benchmarks/noise_weight.py; T = 1, head 4: .181 at 1.0, .192 at 0.8).
NOISE_WEIGHT = 0.8


def couple(
    logits_BKV: Tensor, temperature: float, noise_KV: Tensor | None, token_map_V: Tensor | None = None
) -> Tensor:
    """Scores that guess the target's seeded draw; the logits themselves at temperature 0.

    The noise has a row per depth, or one for all K, and a column per token of the backbone's vocabulary, of
    which the heads know those in `token_map_V`, or the first.
    """
    logits = logits_BKV.float()
    if temperature == 0.0 or noise_KV is None:
        return logits
    noise_KV = noise_KV[: logits.shape[1]]
    noise_KV = noise_KV[:, : logits.shape[2]] if token_map_V is None else noise_KV[:, token_map_V]
    return logits + NOISE_WEIGHT * temperature * noise_KV


def root_tree(roots_B: Tensor) -> DraftTree:
    """The tree of one node: ordinary decoding."""
    zero = torch.zeros_like(roots_B)[:, None]
    return DraftTree(roots_B[:, None], zero, zero, torch.ones_like(zero, dtype=torch.bool)[:, :, None], 0)


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
            self.tree.depth,
        )

    def candidate_index(self, width: int) -> Tensor:
        """For each drafted node its place in the flattened candidates [K * width]."""
        places = [(len(path) - 1) * width + path[-1] for path in self.tree.paths]
        return torch.tensor(places, dtype=torch.long, device=self.device)


class StaticDrafter:
    """The same topology every step: the paper's tree attention (§2.1.2)."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.size, self.max_depth = tree.size, tree.depth
        self._width = tree.width
        self._shape = TreeShape(tree, device)
        self._index = self._shape.candidate_index(self._width)

    def draft(self, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]) -> DraftTree:
        candidates = scores_BKV[:, : self.max_depth].topk(self._width, dim=-1).indices.flatten(1)
        return self._shape.filled(torch.cat([roots_B[:, None], candidates[:, self._index]], dim=1))


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
        # Stable: of equal paths the earlier, hence a parent before its child, so the choice is prefix-closed.
        order = joint_BP.sort(dim=1, descending=True, stable=True).indices[:, : self.size - 1]
        chosen = functional.pad(order.sort(dim=1).values + 1, (1, 0))
        slots, device = chosen.shape[0], chosen.device
        new_index = torch.zeros(slots, self._parents.shape[0], dtype=torch.long, device=device)
        new_index.scatter_(1, chosen, torch.arange(self.size, device=device).expand_as(chosen))
        lineage = new_index.gather(1, self._lineage[chosen].flatten(1)).unflatten(1, (self.size, -1))
        ancestors = torch.zeros(slots, self.size, self.size, dtype=torch.bool, device=device)
        drafted = tokens_BR.gather(1, self._index[chosen[:, 1:] - 1])
        return DraftTree(
            torch.cat([roots_B[:, None], drafted], dim=1),
            self._depths[chosen],
            new_index.gather(1, self._parents[chosen]),
            ancestors.scatter_(2, lineage, True),
            self.max_depth,
        )

    def _candidates(self, scores_BKV: Tensor, taus: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of every head's best ranks, flattened; a zero follows the latter."""
        scores = scores_BKV[:, : self.max_depth]
        scores = scores / _divisors(taus[: self.max_depth], scores.device)
        best = scores.log_softmax(dim=-1).topk(self._width, dim=-1)
        log_probs = best.values.flatten(1)
        # Never above 0, by rounding, so no child beats its parent; nor NaN or -inf, from heads that overflow.
        log_probs = log_probs.nan_to_num_(nan=IMPOSSIBLE).clamp_(min=IMPOSSIBLE, max=0.0)
        return best.indices.flatten(1), functional.pad(log_probs, (0, 1))


@lru_cache(maxsize=256)
def _divisors(taus: tuple[float, ...], device: torch.device) -> Tensor:
    """taus [1, K, 1] on the device: a copy in every step would make the host wait for the heads."""
    return torch.tensor(taus, device=device)[None, :, None]
