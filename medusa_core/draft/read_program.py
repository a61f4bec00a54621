"""The read program: Hydra++'s prefix attention over a step's committed tokens, tensors in and tensors out.

Nothing in it is decided on the host: new tokens are padded, lengths are tensors, keys and values are written
by index. Shapes: B rows, U new tokens with padding, E hidden size, W columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.draft.prefix import PrefixLayer
from medusa_core.model.kv_cache import CacheRows
from medusa_core.model.static_rows import StaticRows, bucket
from medusa_core.programs.program import Argument, Program, cache_sizes, width_sizes
from medusa_core.programs.switch import Switch


class ReadProgram(Program):
    """What a draft program starts from, after each row's newly committed tokens."""

    def __init__(self, prefix: PrefixLayer, step_tokens: int) -> None:
        """It is compiled for `step_tokens` new tokens."""
        super().__init__()
        self.prefix, self._step_tokens = prefix, step_tokens

    def facts(self) -> object:
        return (self._step_tokens, self.prefix.config.to_json_string(use_diff=False))

    def example(self) -> tuple[Argument, ...]:
        """One row in one of two slots."""
        shape, dtype, zero = self.prefix.cache_shape, self.prefix.dtype, torch.zeros(1, dtype=torch.long)
        return (
            torch.zeros(1, self._step_tokens, self.prefix.config.hidden_size, dtype=dtype),
            zero + 1,
            zero.clone(),
            zero.clone(),
            torch.arange(50),
            torch.zeros(1, 2, 2, shape.num_kv_heads, 200, shape.head_dim, dtype=dtype),
        )

    def sizes(self) -> tuple[Any, ...]:
        """Any width and cache."""
        slots, capacity = cache_sizes()
        return (None, None, None, None, {0: width_sizes()}, {2: slots, 4: capacity})

    def forward(
        self,
        hidden_BUE: Tensor,
        counts_B: Tensor,
        slots_B: Tensor,
        lengths_B: Tensor,
        columns_W: Tensor,
        storage_L2BHCD: Tensor,
    ) -> Tensor:
        """The layer's output [B, E] at each row's last new token, of which it has `counts_B`.

        `lengths_B`: tokens read before; `columns_W`: 0 ... W-1, W at least the greatest length + U. Keys and
        values go to the rows `slots_B` of `storage_L2BHCD`.
        """
        rows = StaticRows(storage_L2BHCD, slots_B, lengths_B, columns_W)
        return self.prefix.read(hidden_BUE, counts_B, rows)


class PrefixReader:
    """A `ReadProgram` with its inputs made of the host's values.

    `run` is called for up to `step_tokens` new tokens, padded to so many. More than those, of a prompt, the
    program reads as it is.
    """

    def __init__(self, prefix: PrefixLayer, step_tokens: int) -> None:
        self.run = Switch(ReadProgram(prefix, step_tokens))
        self._step_tokens = step_tokens

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows) -> Tensor:
        """Output [B, E] at each row's last new token; `cache` then holds all `counts` of them."""
        missing = self._step_tokens - hidden_BUE.shape[1]
        run = self.run.as_it_is if missing < 0 else self.run
        if missing > 0:
            hidden_BUE = functional.pad(hidden_BUE, (0, 0, 0, missing))
        device = hidden_BUE.device
        needed = max(cache.lengths) + hidden_BUE.shape[1]
        width = bucket(needed, cache.storage_L2BHCD.shape[4] - 1)
        packed = torch.tensor([counts, cache.slots, cache.lengths], device=device)
        columns_W = torch.arange(width, device=device)
        (hidden_BE,) = run(hidden_BUE, *packed.unbind(), columns_W, cache.storage_L2BHCD)
        cache.advance(counts)
        return hidden_BE
