"""Medusa-1 heads: K independent guessers on one hidden state (paper §2.1, arXiv 2401.10774).

Head k is L residual blocks x + SiLU(W x + b), then an output layer without bias. Weights of the K heads are
stored stacked, so that one matrix product serves all heads. Files are the business of
`medusa_core.checkpoints`.

Shapes: B slots, N rows, K heads, E hidden size, V output rows.
"""

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.draft.head_stack import HeadStack, initial_rows
from medusa_core.draft.heads import TrainingBatch


class MedusaHeads(HeadStack):
    """Medusa-1 heads: a `HeadStack` of L blocks whose output layers have no bias."""

    @classmethod
    def new(
        cls,
        *,
        hidden_size: int,
        vocab_size: int,
        num_heads: int,
        num_layers: int,
        lm_head_weight: Tensor,
        shared: bool = False,
        token_map: Tensor | None = None,
    ) -> "MedusaHeads":
        """Fresh heads in the dtype and on the device of `lm_head_weight` [>= V, E].

        Blocks start as the identity (W = 0, b = 0: the slope of SiLU at 0 is 1/2, so they still learn) and
        the output layers as copies of the backbone's rows, or as those rows themselves if `shared`.
        """
        rows = initial_rows(lm_head_weight, vocab_size, hidden_size, token_map)
        heads = cls(
            num_heads=num_heads,
            num_layers=num_layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            shared_output=lm_head_weight if shared else None,
            token_map=token_map,
            dtype=rows.dtype,
            device=rows.device,
        )
        heads.start_from(rows)
        return heads

    def draft_logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits [B, K, V] from the hidden states [B, E] (after the final norm) that decided the roots.

        All heads see the same rows here, so their first blocks are one linear layer of K * E outputs.
        """
        hidden_BE = hidden_BE.to(self.dtype)
        if self.packed:
            return torch.stack([head(hidden_BE) for head in self.packed], dim=1)
        weight_KEE, bias_KE = self.block_weights[0], self.block_biases[0]
        inner = functional.linear(hidden_BE, weight_KEE.flatten(0, 1), bias_KE.flatten())
        inner_KBE = inner.unflatten(1, (self.num_heads, self.hidden_size)).transpose(0, 1)
        features_KBE = self.blocks(hidden_BE + functional.silu(inner_KBE), first=1)
        return self._project(features_KBE).transpose(0, 1)

    def features(self, batch: TrainingBatch, source_KN: Tensor) -> Tensor:
        """What the output layers see [K, N, E], head k starting from its own positions [K, N] (training)."""
        return self.blocks(batch.hidden_BSE.flatten(0, 1)[source_KN])

    def _project(self, features_KBE: Tensor) -> Tensor:
        """Logits [K, B, V].

        One product for all heads beats a loop over them. For a single float32 row on a CPU, weight @ column
        is up to 1.5 times as fast as row @ weight; in bfloat16, and for several rows, it is the slower one
        (measured on AVX-512 at V = 4096, E = 256 and 2048, K = 4).
        """
        if self.output_KVE is None:
            return functional.linear(features_KBE, self.output_weight(0))
        row_on_cpu = features_KBE.shape[1] == 1 and features_KBE.device.type == "cpu"
        if row_on_cpu and features_KBE.dtype == torch.float32:
            return torch.bmm(self.output_KVE, features_KBE.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(features_KBE, self.output_KVE.transpose(1, 2))
