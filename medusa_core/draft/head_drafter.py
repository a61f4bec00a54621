"""Heads and the tree they fill: from what heads say to a `DraftTree`, whatever their kind.

Shapes: B rows, E hidden size, P positions, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from medusa_core.draft.coupling import couple
from medusa_core.draft.draft_tree import DraftTree
from medusa_core.draft.dynamic import DynamicDrafter
from medusa_core.draft.heads import DraftHeads, ParallelHeads, SequentialHeads
from medusa_core.draft.level_scores import LevelScores
from medusa_core.draft.levels import DynamicLevelDrafter
from medusa_core.draft.static import StaticDrafter, StaticLevelDrafter
from medusa_core.draft.tree import Tree
from medusa_core.errors import ConfigError


class HeadDrafter(Protocol):
    """Fills trees of at most `size` nodes (root included) and `max_depth` levels."""

    @property
    def size(self) -> int: ...

    @property
    def max_depth(self) -> int: ...

    def draft(
        self,
        hidden_BE: Tensor,
        roots_B: Tensor,
        taus: tuple[float, ...],
        temperature: float = 0.0,
        noise_BPV: Tensor | None = None,
    ) -> DraftTree:
        """`hidden_BE`: what the heads returned when they last `read`; `noise_BPV`: the target's, per depth.

        `taus` turn each head's scores into probabilities.
        """


@dataclass(frozen=True, slots=True)
class ParallelDrafter:
    """For heads that draft all depths at once."""

    heads: ParallelHeads
    filler: StaticDrafter | DynamicDrafter

    @property
    def size(self) -> int:
        return self.filler.size

    @property
    def max_depth(self) -> int:
        return self.filler.max_depth

    def draft(
        self,
        hidden_BE: Tensor,
        roots_B: Tensor,
        taus: tuple[float, ...],
        temperature: float = 0.0,
        noise_BPV: Tensor | None = None,
    ) -> DraftTree:
        logits = self.heads.draft_logits(hidden_BE)[:, : self.max_depth]
        token_map = self.heads.token_map
        tree = self.filler.draft(couple(logits, temperature, noise_BPV, token_map), roots_B, taus)
        if token_map is None:
            return tree
        drafted = token_map[tree.tokens_BT[:, 1:]]
        return replace(tree, tokens_BT=torch.cat([tree.tokens_BT[:, :1], drafted], dim=1))


@dataclass(frozen=True, slots=True)
class SequentialDrafter:
    """For heads that are asked level by level, as they see the path."""

    heads: SequentialHeads
    filler: StaticLevelDrafter | DynamicLevelDrafter

    @property
    def size(self) -> int:
        return self.filler.size

    @property
    def max_depth(self) -> int:
        return self.filler.max_depth

    def draft(
        self,
        hidden_BE: Tensor,
        roots_B: Tensor,
        taus: tuple[float, ...],
        temperature: float = 0.0,
        noise_BPV: Tensor | None = None,
    ) -> DraftTree:
        scores = LevelScores(self.heads, hidden_BE, temperature, noise_BPV)
        return self.filler.draft(scores, roots_B, taus)


def make_drafter(heads: DraftHeads, shape: Tree | int, device: torch.device) -> HeadDrafter:
    """Drafts always the same tree, or each step the likeliest nodes: as many as `shape` says, root included.

    Fewer where the heads cannot name so many. Raises `ConfigError` for what is no kind of heads.
    """
    if isinstance(heads, SequentialHeads):
        if isinstance(shape, Tree):
            return SequentialDrafter(heads, StaticLevelDrafter(shape, device))
        return SequentialDrafter(heads, DynamicLevelDrafter(shape, heads.num_heads, heads.vocab_size))
    if isinstance(heads, ParallelHeads):
        if isinstance(shape, Tree):
            return ParallelDrafter(heads, StaticDrafter(shape, device))
        return ParallelDrafter(heads, DynamicDrafter(shape, heads.num_heads, heads.vocab_size, device))
    raise ConfigError(f"{type(heads).__name__} drafts neither all depths at once nor level by level")
