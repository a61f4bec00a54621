"""What Medusa and Hydra heads share: residual blocks stacked over the heads, and their output layers.

For training and in files weights are stacked, so that one product serves all heads. To serve on a CPU they
are packed layer by layer.

Shapes: K heads, N rows, U new tokens, E hidden size, V output rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.heads import last_of_each
from medusa_core.model.kv_cache import CacheRows, CacheShape
from medusa_core.model.packed import PackedLinear


class PackedHead(nn.Module):
    """One head's layers; `first`, if its kind has one, is a `gated` block before the residual ones."""

    def __init__(self, first: PackedLinear | None, blocks: list[PackedLinear], output: PackedLinear) -> None:
        super().__init__()
        self.first, self.blocks, self.output = first, nn.ModuleList(blocks), output

    def forward(self, rows: Tensor) -> Tensor:
        """Inputs of the head's first layer -> logits [..., V]."""
        if self.first is not None:
            rows = gated(self.first(rows))
        for block in self.blocks:
            rows = rows + functional.silu(block(rows))
        logits: Tensor = self.output(rows)
        return logits


class HeadStack(nn.Module):
    """K heads with residual blocks x + SiLU(W x + b), each [K, E, E], and an output layer per head, or one.

    `output_KVE` is a parameter [K, V, E], or None where the heads share `shared_output_VE`, the backbone's
    own output layer (`is_shared`): a buffer that is neither trained nor saved. `token_map_V`: the token ids
    of the output rows (reduced draft vocabulary); None: rows 0..V-1 are tokens 0..V-1.
    """

    num_first = 0  # layers of a kind's own before the residual blocks
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
        """Raises `ValueError` without heads or layers."""
        super().__init__()
        self.num_heads, self.num_layers = num_heads, num_layers
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        if num_heads < 1 or num_layers < 1:
            raise ValueError(f"heads need at least one head and one layer, not {num_heads} and {num_layers}")

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

        blocks = range(num_layers - self.num_first)
        self.block_weights = nn.ParameterList(zeros(num_heads, hidden_size, hidden_size) for _ in blocks)
        self.block_biases = nn.ParameterList(zeros(num_heads, hidden_size) for _ in blocks)
        own_map = None if token_map is None else token_map.to(device=device, dtype=torch.long)
        self.register_buffer("token_map_V", own_map, persistent=False)
        shared = None
        if shared_output is not None:
            shared = output_rows(shared_output, vocab_size, token_map).to(device, dtype)
        self.register_buffer("shared_output_VE", shared, persistent=False)
        self.output_KVE = zeros(num_heads, vocab_size, hidden_size) if shared is None else None
        self.is_shared = shared is not None
        self.packed = nn.ModuleList()  # a `PackedHead` each, once packed

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and logits."""
        return next(self.parameters()).dtype

    @property
    def token_map(self) -> Tensor | None:
        """Token id [V] of each output row; None: they are the same."""
        return self.token_map_V

    @property
    def cache_shape(self) -> CacheShape | None:
        """None: the last hidden state is all these heads need."""
        return None

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows | None) -> Tensor:
        """The last of the newly committed tokens' hidden states [B, E]."""
        return last_of_each(hidden_BUE, counts)

    def contextualize(self, hidden_BSE: Tensor) -> Tensor:
        """What `read` would have returned at every position: the hidden states themselves."""
        return hidden_BSE

    @property
    def output(self) -> Tensor:
        """Output layers [K, V, E], or the shared one [V, E]."""
        return self.output_weight(0) if self.output_KVE is None else self.output_KVE

    @property
    def output_bias(self) -> Tensor | None:
        """Output biases [K, V]."""
        return None

    def output_weight(self, head: int) -> Tensor:
        """Output layer [V, E] of one head."""
        if self.output_KVE is not None:
            return self.output_KVE[head]
        assert self.shared_output_VE is not None
        return self.shared_output_VE

    def pack(self, *, pack: bool = True, shared_output: PackedLinear | None = None) -> None:
        """Replace all weights by `PackedLinear`s, to serve on a CPU: such heads neither train nor are saved.

        `pack` False: for the structure only. `shared_output`: the backbone's packed output layer, in place of
        a copy, where it has just the rows that these heads share.
        """
        packed = nn.ModuleList(self._packed_heads(shared_output))
        for layer in packed.modules():
            if pack and isinstance(layer, PackedLinear):
                layer.pack()
        self.packed = packed
        self.block_weights, self.block_biases = nn.ParameterList(), nn.ParameterList()
        self.output_KVE = self.shared_output_VE = None

    def _packed_heads(self, shared_output: PackedLinear | None) -> Iterator[PackedHead]:
        if self.is_shared and shared_output is None:
            shared_output = PackedLinear(self.output_weight(0))
        layers = list(zip(self.block_weights, self.block_biases, strict=True))
        for head in range(self.num_heads):
            blocks = [PackedLinear(weight[head], bias[head]) for weight, bias in layers]
            bias_KV = self.output_bias
            bias_V = None if bias_KV is None else bias_KV[head]
            output = shared_output or PackedLinear(self.output_weight(head), bias_V)
            yield PackedHead(self._packed_first(head), blocks, output)

    def _packed_first(self, head: int) -> PackedLinear | None:
        """Of the block of a kind's own before the residual ones, if there is one."""
        return None

    def start_from(self, output_VE: Tensor) -> None:
        """Make every output layer of the heads' own a copy of the backbone's rows."""
        if self.output_KVE is not None:
            with torch.no_grad():
                self.output_KVE.copy_(output_VE.expand_as(self.output_KVE))

    def blocks(self, rows_KNE: Tensor, *, first: int = 0, dropout: float = 0.0) -> Tensor:
        """Each head's rows through its residual blocks from `first` on; dropout stands before each."""
        for weight, bias in list(zip(self.block_weights, self.block_biases, strict=True))[first:]:
            weight, bias = weight.to(rows_KNE.dtype), bias.to(rows_KNE.dtype)
            inputs = functional.dropout(rows_KNE, dropout) if dropout else rows_KNE
            inner = torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))
            rows_KNE = rows_KNE + functional.silu(inner)
        return rows_KNE


def gated(both: Tensor) -> Tensor:
    """R x + SiLU(W x) of a product [..., 2E], in which W x stands before R x."""
    inner, through = both.chunk(2, dim=-1)
    return through + functional.silu(inner)


def output_rows(lm_head_weight: Tensor, vocab_size: int, token_map: Tensor | None) -> Tensor:
    """The backbone's output rows [V, E] of the tokens that heads draft."""
    weight = lm_head_weight.detach()
    return weight[:vocab_size] if token_map is None else weight[token_map.to(weight.device)]


def initial_rows(
    lm_head_weight: Tensor, vocab_size: int, hidden_size: int, token_map: Tensor | None
) -> Tensor:
    """`output_rows` for fresh heads of these sizes. Raises `ValueError` if there are too few."""
    rows = output_rows(lm_head_weight, vocab_size, token_map)
    if rows.shape != (vocab_size, hidden_size):
        raise ValueError(f"lm_head {tuple(lm_head_weight.shape)} lacks {vocab_size} rows of {hidden_size}")
    return rows
