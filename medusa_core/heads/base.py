"""The protocol every kind of draft head follows, so that nothing else knows which kind it runs."""

from typing import Protocol

from torch import Tensor


class DraftHeads(Protocol):
    """K heads drafting the tokens after the root; head k (0-based) drafts depth k + 1 of the tree."""

    @property
    def num_heads(self) -> int:
        """K, the greatest depth of a tree these heads can fill."""

    @property
    def vocab_size(self) -> int:
        """Output rows; may be fewer than the backbone's."""

    def draft_logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits [B, K, V] from the hidden states [B, E] (after the final norm) that decided the roots."""
