"""The read program: Hydra++'s prefix attention over a step's committed tokens, tensors in and tensors out.

Nothing in it is decided on the host: new tokens are padded, lengths are tensors, keys and values are written
by index. Shapes: B rows, U new tokens with padding, E hidden size, W columns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.prefix import PrefixLayer
from medusa_core.model.kv_cache import CacheRows
from medusa_core.model.static_rows import StaticRows

WIDTHS = 128  # W is a multiple of it, so that a compiled program sees few widths


class ReadProgram(nn.Module):
    """What a draft program starts from, after each row's newly committed tokens."""

    def __init__(self, prefix: PrefixLayer) -> None:
        super().__init__()
        self.prefix = prefix

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

    def example_inputs(self, hidden_BUE: Tensor, storage_L2BHCD: Tensor) -> tuple[Tensor, ...]:
        """Inputs to trace the program with; W may be dynamic, at most the storage's capacity."""
        zero_B = torch.zeros(len(hidden_BUE), dtype=torch.long, device=hidden_BUE.device)
        slots_B = torch.arange(len(zero_B), device=zero_B.device)
        columns_W = torch.arange(storage_L2BHCD.shape[4] // 2, device=zero_B.device)
        return hidden_BUE, zero_B + 1, slots_B, zero_B, columns_W, storage_L2BHCD


class PrefixReader:
    """A `ReadProgram` with its inputs made of the host's values.

    `run` is called for up to `step_tokens` new tokens, padded to so many: the program itself, or what was
    compiled from it. More than those, of a prompt, the program reads.
    """

    def __init__(self, prefix: PrefixLayer, step_tokens: int) -> None:
        self.program = ReadProgram(prefix)
        self.run: Callable[..., Tensor] = self.program
        self._step_tokens = step_tokens

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows) -> Tensor:
        """Output [B, E] at each row's last new token; `cache` then holds all `counts` of them."""
        missing = self._step_tokens - hidden_BUE.shape[1]
        run = self.program if missing < 0 else self.run
        if missing > 0:
            hidden_BUE = functional.pad(hidden_BUE, (0, 0, 0, missing))
        device = hidden_BUE.device
        needed = max(cache.lengths) + hidden_BUE.shape[1]
        width = min(-(-needed // WIDTHS) * WIDTHS, cache.storage_L2BHCD.shape[4])
        packed = torch.tensor([counts, cache.slots, cache.lengths], device=device)
        columns_W = torch.arange(width, device=device)
        hidden_BE = run(hidden_BUE, *packed.unbind(), columns_W, cache.storage_L2BHCD)
        cache.advance(counts)
        return hidden_BE
