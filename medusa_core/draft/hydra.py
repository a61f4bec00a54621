"""Hydra heads: drafts that see the drafted tokens before them (arXiv 2402.05109 §3, §4).

Head i (0-based) maps [h, E(root), E(x_1), ..., E(x_i)], of width (i+2)E, to the token after: a first block
R x + r + SiLU(W x + b), then L - 1 residual blocks x + SiLU(W x + b), then an output layer. h is the
backbone's hidden state, or with a `PrefixLayer` (Hydra++) that layer's output; E the backbone's embedding.

Shapes: B slots, N paths, J tokens of a path, S tokens, K heads, E hidden size, V output rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.head_stack import HeadStack, gated, initial_rows
from medusa_core.draft.heads import TrainingBatch, last_of_each
from medusa_core.draft.prefix import PrefixLayer
from medusa_core.draft.read_program import PrefixReader
from medusa_core.model.kv_cache import CacheRows, CacheShape
from medusa_core.model.packed import PackedLinear, pack_linears

Embed = Callable[[Tensor], Tensor]
"""Token ids [...] -> embeddings [..., E], as the backbone's own embedding module gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HydraShape:
    """K heads of L layers over hidden size E, drafting V tokens."""

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int


class HydraHeads(HeadStack):
    """Hydra heads: a `HeadStack` with biased output layers after first blocks that see the path.

    `first_weights[i]` [2, E, (i+2)E] and `first_biases[i]` [2, E] stack W over R; the other L - 1 layers are
    blocks. `embed` belongs to the backbone: neither trained nor saved here. `dropout` applies before every
    layer, in training only.
    """

    num_first = 1

    def __init__(
        self,
        shape: HydraShape,
        *,
        embed: Embed,
        prefix: PrefixLayer | None = None,
        shared_output: Tensor | None = None,
        token_map: Tensor | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            **asdict(shape), shared_output=shared_output, token_map=token_map, dtype=dtype, device=device
        )
        self.shape = shape
        # In a tuple: the module itself would become a part of this one, and be trained and saved along.
        self._borrowed = (embed,)
        self.prefix = prefix
        self.reader = None if prefix is None else PrefixReader(prefix, shape.num_heads + 1)
        self.dropout = dropout

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

        heads, hidden = shape.num_heads, shape.hidden_size
        self.first_weights = nn.ParameterList(zeros(2, hidden, (k + 2) * hidden) for k in range(heads))
        self.first_biases = nn.ParameterList(zeros(2, hidden) for _ in range(heads))
        self.output_bias_KV = None if self.is_shared else zeros(heads, shape.vocab_size)

    @classmethod
    def new(
        cls,
        shape: HydraShape,
        *,
        lm_head_weight: Tensor,
        embed: Embed,
        prefix: PrefixLayer | None = None,
        shared: bool = False,
        token_map: Tensor | None = None,
        dropout: float = 0.0,
    ) -> "HydraHeads":
        """Fresh heads in the dtype and on the device of `lm_head_weight` [>= V, E].

        They start by passing h on to a copy of the backbone's output layer (or that layer, if `shared`).
        """
        rows = initial_rows(lm_head_weight, shape.vocab_size, shape.hidden_size, token_map)
        heads = cls(
            shape,
            embed=embed,
            prefix=prefix,
            shared_output=lm_head_weight if shared else None,
            token_map=token_map,
            dropout=dropout,
            dtype=rows.dtype,
            device=rows.device,
        )
        heads.start_from(rows)
        with torch.no_grad():
            for weight in heads.first_weights:
                weight[1, :, : shape.hidden_size].fill_diagonal_(1.0)
        return heads

    @property
    def embed_module(self) -> nn.Module | None:
        """The backbone's embedding, if it is a module."""
        embed = self._borrowed[0]
        return embed if isinstance(embed, nn.Module) else None

    @property
    def cache_shape(self) -> CacheShape | None:
        """Keys and values of the prefix layer."""
        return None if self.prefix is None else self.prefix.cache_shape

    @torch.inference_mode()
    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows | None) -> Tensor:
        """What the next drafts come from [B, E], after so many more committed tokens in each row."""
        if self.reader is None:
            return last_of_each(hidden_BUE, counts)
        assert cache is not None
        return self.reader.read(hidden_BUE.to(self.dtype), counts, cache)

    @torch.inference_mode()
    def contextualize(self, hidden_BSE: Tensor) -> Tensor:
        """What `read` would have returned at every position of whole sequences."""
        return hidden_BSE if self.prefix is None else self.prefix(hidden_BSE.to(self.dtype))

    def level_logits(self, level: int, hidden_BE: Tensor, paths_BNJ: Tensor) -> Tensor:
        """Logits [B, N, V] of head `level` after each of N paths (root first, J = level + 1 token ids)."""
        embedded_BNX = self._embed(paths_BNJ).to(self.dtype).flatten(2)
        hidden_BNE = hidden_BE.to(self.dtype)[:, None].expand(-1, paths_BNJ.shape[1], -1)
        inputs = torch.cat([hidden_BNE, embedded_BNX], dim=-1)
        if self.packed:
            return self.packed[level](inputs)
        features = self._first(level, inputs)
        for weight, bias in zip(self.block_weights, self.block_biases, strict=True):
            features = features + functional.silu(functional.linear(features, weight[level], bias[level]))
        bias_V = None if self.output_bias_KV is None else self.output_bias_KV[level]
        return functional.linear(features, self.output_weight(level), bias_V)

    def features(self, batch: TrainingBatch, source_KN: Tensor) -> Tensor:
        """What the output layers see [K, N, E] with the data's own tokens as path (teacher forcing)."""
        hidden = batch.hidden_BSE
        if self.prefix is not None:
            hidden = self.prefix(hidden, batch.positions_BS)
        hidden_NE, tokens_N = hidden.flatten(0, 1), batch.tokens_BS.flatten()
        firsts = []
        for head, source_N in enumerate(source_KN):
            # A head without a source for some target points at position 0, where its loss weighs nothing; the
            # path must exist all the same.
            path_NJ = source_N[:, None] + 1 + torch.arange(head + 1, device=source_N.device)
            path_NJ = path_NJ.clamp(max=len(tokens_N) - 1)
            embedded_NX = self._embed(tokens_N[path_NJ]).to(hidden.dtype).flatten(1)
            firsts.append(
                self._first(head, self._drop(torch.cat([hidden_NE[source_N], embedded_NX], dim=-1)))
            )
        dropout = self.dropout if self.training else 0.0
        return self._drop(self.blocks(torch.stack(firsts), dropout=dropout))

    @property
    def output_bias(self) -> Tensor | None:
        return self.output_bias_KV

    def pack(self, *, pack: bool = True, shared_output: PackedLinear | None = None) -> None:
        super().pack(pack=pack, shared_output=shared_output)
        self.first_weights, self.first_biases = nn.ParameterList(), nn.ParameterList()
        self.output_bias_KV = None
        if self.prefix is not None:
            pack_linears(self.prefix, pack=pack)

    def _embed(self, token_ids: Tensor) -> Tensor:
        return self._borrowed[0](token_ids)

    def _packed_first(self, head: int) -> PackedLinear:
        return PackedLinear(self.first_weights[head].flatten(0, 1), self.first_biases[head].flatten())

    def _first(self, head: int, inputs: Tensor) -> Tensor:
        """The first block: inputs [..., (head+2)E] -> [..., E]. W and R in one product."""
        weight, bias = self.first_weights[head].to(inputs.dtype), self.first_biases[head].to(inputs.dtype)
        return gated(functional.linear(inputs, weight.flatten(0, 1), bias.flatten()))

    def _drop(self, rows: Tensor) -> Tensor:
        return functional.dropout(rows, self.dropout, training=self.training) if self.dropout else rows
