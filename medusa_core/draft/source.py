"""What proposes drafts in a step: heads, the drafter that suits their kind, and their calibration."""

from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from medusa_core.draft.dynamic import Drafter, DraftTree, DynamicDrafter, StaticDrafter, couple
from medusa_core.draft.heads import DraftHeads, ParallelHeads, SequentialHeads
from medusa_core.draft.levels import DynamicLevelDrafter, LevelScores, StaticLevelDrafter
from medusa_core.draft.tree import Tree
from medusa_core.errors import ConfigError


class Speculator(Protocol):
    """Proposes a tree of drafts behind the roots."""

    @property
    def heads(self) -> DraftHeads: ...

    @property
    def max_depth(self) -> int:
        """Of its trees, hence the most drafts a step can accept."""

    def propose(
        self, hidden_BE: Tensor, roots_B: Tensor, temperature: float, noise_KV: Tensor | None
    ) -> DraftTree:
        """`hidden_BE`: what the heads returned when they last `read`; `noise_KV`: the target's, per depth."""


@dataclass(frozen=True, slots=True)
class ParallelSpeculator:
    """For heads that draft all depths at once.

    `taus` turn each head's scores into probabilities. `coupled` False drafts without the target's noise (only
    to measure what coupling gains).
    """

    heads: ParallelHeads
    drafter: Drafter
    taus: tuple[float, ...]
    coupled: bool = True

    @property
    def max_depth(self) -> int:
        return self.drafter.max_depth

    def propose(
        self, hidden_BE: Tensor, roots_B: Tensor, temperature: float, noise_KV: Tensor | None
    ) -> DraftTree:
        logits = self.heads.draft_logits(hidden_BE)[:, : self.max_depth]
        token_map = self.heads.token_map
        scores = couple(logits, temperature, noise_KV if self.coupled else None, token_map)
        tree = self.drafter.draft(scores, roots_B, self.taus)
        if token_map is None:
            return tree
        drafted = token_map[tree.tokens_BT[:, 1:]]
        return replace(tree, tokens_BT=torch.cat([tree.tokens_BT[:, :1], drafted], dim=1))


@dataclass(frozen=True, slots=True)
class SequentialSpeculator:
    """For heads that are asked level by level, as they see the path; fields as in `ParallelSpeculator`."""

    heads: SequentialHeads
    drafter: StaticLevelDrafter | DynamicLevelDrafter
    taus: tuple[float, ...]
    coupled: bool = True

    @property
    def max_depth(self) -> int:
        return self.drafter.max_depth

    def propose(
        self, hidden_BE: Tensor, roots_B: Tensor, temperature: float, noise_KV: Tensor | None
    ) -> DraftTree:
        noise_KV = noise_KV if self.coupled else None
        scores = LevelScores(self.heads, hidden_BE, temperature, noise_KV)
        return self.drafter.draft(scores, roots_B, self.taus)


AnyDrafter = Drafter | StaticLevelDrafter | DynamicLevelDrafter


def static_drafter(heads: DraftHeads, tree: Tree, device: torch.device) -> AnyDrafter:
    """Drafts a tree of always the same topology, which the heads must be able to fill."""
    return StaticLevelDrafter(tree, device) if is_sequential(heads) else StaticDrafter(tree, device)


def dynamic_drafter(heads: DraftHeads, nodes: int, device: torch.device) -> AnyDrafter:
    """Drafts the likeliest `nodes` (root included; fewer where the heads cannot name so many)."""
    if is_sequential(heads):
        return DynamicLevelDrafter(nodes, heads.num_heads, heads.vocab_size)
    return DynamicDrafter(nodes, heads.num_heads, heads.vocab_size, device)


def make_speculator(
    heads: DraftHeads, drafter: AnyDrafter, taus: tuple[float, ...], *, coupled: bool = True
) -> Speculator:
    """`drafter` must have been made for these heads."""
    if isinstance(drafter, StaticLevelDrafter | DynamicLevelDrafter):
        return SequentialSpeculator(cast(SequentialHeads, heads), drafter, taus, coupled)
    return ParallelSpeculator(cast(ParallelHeads, heads), drafter, taus, coupled)


def is_sequential(heads: DraftHeads) -> bool:
    """Whether these heads see the drafted path. Raises `ConfigError` for what is no kind of heads."""
    if isinstance(heads, SequentialHeads):
        return True
    if isinstance(heads, ParallelHeads):
        return False
    raise ConfigError(f"{type(heads).__name__} drafts neither all depths at once nor level by level")
