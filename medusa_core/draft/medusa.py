"""Medusa-1 heads: K independent guessers on one hidden state (paper §2.1, arXiv 2401.10774).

Head k is L residual blocks x + SiLU(W x + b), then an output layer without bias. Weights of the K heads are
stored stacked, so that one matrix product serves all heads. Files are the business of
`medusa_core.checkpoints`.

Shapes: B slots, N rows, K heads, E hidden size, V output rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.heads import TrainingBatch, last_of_each
from medusa_core.model.kv_cache import CacheRows, CacheShape


class MedusaHeads(nn.Module):
    """K heads of L residual blocks with an output layer per head, or one shared with the backbone.

    `output_KVE` is a parameter [K, V, E], or None where the heads share `shared_output_VE`, the backbone's
    own output layer: a buffer that is neither trained nor saved. `token_map` [V]: the token ids of the output
    rows (reduced draft vocabulary); None: rows 0..V-1 are tokens 0..V-1.
    """

    shared_output_VE: Tensor | None
    token_map_V: Tensor | None

    def __init__(
        self,
        *,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        shared_output: Tensor | None = None,
        token_map: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_layers < 1:
            raise ValueError(f"heads need at least one head and one layer, not {num_heads} and {num_layers}")
        self._num_heads, self.num_layers = num_heads, num_layers
        self.hidden_size, self._vocab_size = hidden_size, vocab_size
        square = (num_heads, hidden_size, hidden_size)
        self.block_weights = nn.ParameterList(
            nn.Parameter(torch.zeros(square, dtype=dtype, device=device)) for _ in range(num_layers)
        )
        self.block_biases = nn.ParameterList(
            nn.Parameter(torch.zeros(square[:2], dtype=dtype, device=device)) for _ in range(num_layers)
        )
        own_map = None if token_map is None else token_map.to(device=device, dtype=torch.long)
        self.register_buffer("token_map_V", own_map, persistent=False)
        shared = None
        if shared_output is not None:
            shared = output_rows(shared_output, vocab_size, token_map).to(device, dtype)
        self.register_buffer("shared_output_VE", shared, persistent=False)
        self.output_KVE: nn.Parameter | None = None
        if shared is None:
            output = torch.zeros((num_heads, vocab_size, hidden_size), dtype=dtype, device=device)
            self.output_KVE = nn.Parameter(output)

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
        rows = output_rows(lm_head_weight, vocab_size, token_map)
        if rows.shape != (vocab_size, hidden_size):
            raise ValueError(
                f"lm_head {tuple(lm_head_weight.shape)} lacks {vocab_size} rows of {hidden_size}"
            )
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
        if heads.output_KVE is not None:
            with torch.no_grad():
                heads.output_KVE.copy_(rows.expand_as(heads.output_KVE))
        return heads

    @property
    def num_heads(self) -> int:
        """K, the greatest depth of a tree these heads can fill."""
        return self._num_heads

    @property
    def vocab_size(self) -> int:
        """V, output rows; may be fewer than the backbone's."""
        return self._vocab_size

    @property
    def token_map(self) -> Tensor | None:
        """Token id [V] of each output row; None: they are the same."""
        return self.token_map_V

    @property
    def is_shared(self) -> bool:
        """Whether the output layer is the backbone's."""
        return self.output_KVE is None

    @property
    def cache_shape(self) -> CacheShape | None:
        """None: the last hidden state is all these heads need."""
        return None

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows | None) -> Tensor:
        """The last of the newly committed tokens' hidden states [B, E]."""
        return last_of_each(hidden_BUE, counts)

    def contextualise(self, hidden_BSE: Tensor) -> Tensor:
        """What `read` would have returned at every position: the hidden states themselves."""
        return hidden_BSE

    @torch.inference_mode()
    def draft_logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits [B, K, V] from the hidden states [B, E] (after the final norm) that decided the roots.

        All heads see the same rows here, so their first blocks are one linear layer of K * E outputs.
        """
        hidden_BE = hidden_BE.to(self.block_weights[0].dtype)
        weight_KEE, bias_KE = self.block_weights[0], self.block_biases[0]
        inner = functional.linear(hidden_BE, weight_KEE.flatten(0, 1), bias_KE.flatten())
        inner_KBE = inner.unflatten(1, (self._num_heads, self.hidden_size)).transpose(0, 1)
        features_KBE = self._blocks(hidden_BE + functional.silu(inner_KBE), first=1)
        return self._project(features_KBE).transpose(0, 1)

    def features(self, batch: TrainingBatch, source_KN: Tensor) -> Tensor:
        """What the output layers see [K, N, E], head k starting from its own positions [K, N] (training)."""
        return self._blocks(batch.hidden_BSE.flatten(0, 1)[source_KN], first=0)

    @property
    def output(self) -> Tensor:
        """Output layers [K, V, E], or the shared one [V, E]."""
        return self.output_weight(0) if self.output_KVE is None else self.output_KVE

    @property
    def output_bias(self) -> Tensor | None:
        """None: Medusa's output layers have no bias."""
        return None

    def output_weight(self, head: int) -> Tensor:
        """Output layer [V, E] of one head."""
        if self.output_KVE is not None:
            return self.output_KVE[head]
        assert self.shared_output_VE is not None
        return self.shared_output_VE

    def _blocks(self, rows_KNE: Tensor, *, first: int) -> Tensor:
        for weight, bias in list(zip(self.block_weights, self.block_biases, strict=True))[first:]:
            weight, bias = weight.to(rows_KNE.dtype), bias.to(rows_KNE.dtype)
            inner = torch.baddbmm(bias[:, None], rows_KNE, weight.transpose(1, 2))
            rows_KNE = rows_KNE + functional.silu(inner)
        return rows_KNE

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


def output_rows(lm_head_weight: Tensor, vocab_size: int, token_map: Tensor | None) -> Tensor:
    """The backbone's output rows [V, E] of the tokens that heads draft."""
    weight = lm_head_weight.detach()
    return weight[:vocab_size] if token_map is None else weight[token_map.to(weight.device)]
