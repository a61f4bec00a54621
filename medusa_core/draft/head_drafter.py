"""Heads and the tree they fill: from what heads say to a `DraftTree`, whatever their kind.

Shapes: B rows, E hidden size, P positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from medusa_core.draft.coupling import LevelScores, couple
from medusa_core.draft.draft_tree import DraftTree
from medusa_core.draft.dynamic import DynamicDrafter
from medusa_core.draft.heads import DraftHeads, ParallelHeads, SequentialHeads
from medusa_core.draft.levels import DynamicLevelDrafter
from medusa_core.draft.static import StaticDrafter, StaticLevelDrafter
from medusa_core.draft.tree import Tree
from medusa_core.errors import ConfigError

Draft = Callable[[Tensor, Tensor, tuple[float, ...], float, Tensor | None], DraftTree]
"""hidden states [B, E] that the heads `read`, roots [B], taus that make each head's scores probabilities, the
temperature, and the target's noise [B, P, V], a row per depth -> a tree."""


@dataclass(frozen=True, slots=True)
class HeadDrafter:
    """Fills trees of `size` nodes (root included) and at most `max_depth` levels."""

    size: int
    max_depth: int
    draft: Draft


def make_drafter(heads: DraftHeads, shape: Tree | int, device: torch.device) -> HeadDrafter:
    """Drafts always the same tree, or each step the likeliest nodes: as many as `shape` says, root included.

    Fewer where the heads cannot name so many. Raises `ConfigError` for what is no kind of heads.
    """
    if isinstance(heads, SequentialHeads):
        by_level = (
            StaticLevelDrafter(shape, device)
            if isinstance(shape, Tree)
            else DynamicLevelDrafter(shape, heads.num_heads, heads.vocab_size)
        )
        return HeadDrafter(by_level.size, by_level.max_depth, partial(_draft_by_level, heads, by_level))
    if isinstance(heads, ParallelHeads):
        at_once = (
            StaticDrafter(shape, device)
            if isinstance(shape, Tree)
            else DynamicDrafter(shape, heads.num_heads, heads.vocab_size, device)
        )
        return HeadDrafter(at_once.size, at_once.max_depth, partial(_draft_at_once, heads, at_once))
    raise ConfigError(f"{type(heads).__name__} drafts neither all depths at once nor level by level")


def _draft_at_once(
    heads: ParallelHeads,
    filler: StaticDrafter | DynamicDrafter,
    hidden_BE: Tensor,
    roots_B: Tensor,
    taus: tuple[float, ...],
    temperature: float,
    noise_BPV: Tensor | None,
) -> DraftTree:
    logits = heads.draft_logits(hidden_BE)[:, : filler.max_depth]
    tree = filler.draft(couple(logits, temperature, noise_BPV, heads.token_map), roots_B, taus)
    if heads.token_map is None:
        return tree
    drafted = heads.token_map[tree.tokens_BT[:, 1:]]
    return replace(tree, tokens_BT=torch.cat([tree.tokens_BT[:, :1], drafted], dim=1))


def _draft_by_level(
    heads: SequentialHeads,
    filler: StaticLevelDrafter | DynamicLevelDrafter,
    hidden_BE: Tensor,
    roots_B: Tensor,
    taus: tuple[float, ...],
    temperature: float,
    noise_BPV: Tensor | None,
) -> DraftTree:
    return filler.draft(LevelScores(heads, hidden_BE, temperature, noise_BPV), roots_B, taus)
