"""The protocol every kind of draft head follows, so that nothing else knows which kind it runs.

Heads draft from the hidden states of committed tokens, which they `read` as a sequence grows. Then two kinds
differ: those whose guesses depend on nothing else (`ParallelHeads`, Medusa), and those that also see the
drafted tokens before (`SequentialHeads`, Hydra), asked level by level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from medusa_core.model.kv_cache import CacheRows, CacheShape


@runtime_checkable
class DraftHeads(Protocol):
    """K heads drafting the tokens after the root; head k (0-based) drafts depth k + 1 of the tree."""

    @property
    def num_heads(self) -> int:
        """K, the greatest depth of a tree these heads can fill."""

    @property
    def vocab_size(self) -> int:
        """V, rows of the logits; may be fewer than the backbone's."""

    @property
    def token_map(self) -> Tensor | None:
        """Token id [V] of each row of the logits (reduced draft vocabulary); None: they are the same."""

    @property
    def cache_shape(self) -> CacheShape | None:
        """The cache `read` needs beside the backbone's, if any."""

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows | None) -> Tensor:
        """Take in hidden states (after the final norm) of newly committed tokens: each row's first `counts`.

        Returns what the next drafts come from [B, E]. `cache`: the rows' memory of `cache_shape`.
        """

    def contextualize(self, hidden_BSE: Tensor) -> Tensor:
        """What `read` would have returned at every position of whole sequences [B, S, E]."""


@runtime_checkable
class ParallelHeads(DraftHeads, Protocol):
    """Heads that need only what `read` returned."""

    def draft_logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits [B, K, V]."""


@runtime_checkable
class SequentialHeads(DraftHeads, Protocol):
    """Heads that depend on the path drafted so far."""

    def level_logits(self, level: int, hidden_BE: Tensor, paths_BNJ: Tensor) -> Tensor:
        """Logits [B, N, V] of head `level` after N paths of token ids, the root first: J = level + 1."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What heads learn from: hidden states [B, S, E] of token ids [B, S].

    `positions_BS` start over where another dialogue begins in the same row; None: one dialogue a row.
    """

    hidden_BSE: Tensor
    tokens_BS: Tensor
    positions_BS: Tensor | None = None


class TrainableHeads(DraftHeads, Protocol):
    """What the trainer needs of heads, whatever their kind."""

    @property
    def output(self) -> Tensor:
        """Output layers [K, V, E], or the one shared with the backbone [V, E]."""

    @property
    def output_bias(self) -> Tensor | None:
        """Output biases [K, V]."""

    def features(self, batch: TrainingBatch, source_KN: Tensor) -> Tensor:
        """What the output layers see [K, N, E].

        `source_KN`: positions in [B * S] whose hidden states head k starts from; at t it predicts t + 2 + k.
        """

    def to(self, dtype: torch.dtype, /) -> Self:
        """Parameters converted in place (`torch.nn.Module.to`)."""


def last_of_each(rows_BUE: Tensor, counts: Sequence[int]) -> Tensor:
    """Each row's last counted entry [B, E]."""
    if len(counts) == 1:
        return rows_BUE[:, counts[0] - 1]
    places = torch.tensor(counts, device=rows_BUE.device) - 1
    return rows_BUE[torch.arange(len(counts), device=rows_BUE.device), places]
