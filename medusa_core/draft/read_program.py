"""The read program: Hydra++'s prefix attention over a step's committed tokens, tensors in and tensors out.

Nothing in it is decided on the host: a path is padded, lengths are tensors, keys and values are written by
index. Shapes: B rows, T tokens of a forward pass, U = a path's greatest length, E hidden size, W columns.
"""

import torch
from torch import Tensor, nn

from medusa_core.draft.prefix import PrefixLayer
from medusa_core.model.static_rows import StaticRows


class ReadProgram(nn.Module):
    """What a draft program starts from, after each row's newly committed tokens."""

    def __init__(self, prefix: PrefixLayer) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(
        self,
        hidden_BTE: Tensor,
        path_BU: Tensor,
        counts_B: Tensor,
        slots_B: Tensor,
        lengths_B: Tensor,
        columns_W: Tensor,
        storage_L2BHCD: Tensor,
    ) -> Tensor:
        """The layer's output [B, E] at each row's last new token.

        Of the hidden states of a forward pass, each row's first `counts_B` of `path_BU` (int64 indices) are
        new; the rest pads. `lengths_B`: tokens read before; `columns_W`: 0 ... W-1, W at least the greatest
        length + U. The keys and values go to `storage_L2BHCD`, of which `slots_B` are the rows.
        """
        place_BUE = path_BU[:, :, None].expand(-1, -1, hidden_BTE.shape[2])
        rows = StaticRows(storage_L2BHCD, slots_B, lengths_B, columns_W)
        output_BUE = self.prefix.read(hidden_BTE.gather(1, place_BUE).to(storage_L2BHCD.dtype), rows)
        last_B1E = (counts_B - 1)[:, None, None].expand(-1, 1, output_BUE.shape[2])
        return output_BUE.gather(1, last_B1E)[:, 0]

    def example_inputs(self, hidden_BTE: Tensor, storage_L2BHCD: Tensor, depth: int) -> tuple[Tensor, ...]:
        """Inputs to trace the program with: T and W may be dynamic, U is `depth` + 1."""
        device, zero_B = (
            hidden_BTE.device,
            torch.zeros(len(hidden_BTE), dtype=torch.long, device=hidden_BTE.device),
        )
        path_BU = zero_B[:, None].expand(-1, depth + 1).clone()
        columns_W = torch.arange(min(256, storage_L2BHCD.shape[4]), device=device)
        return (
            hidden_BTE,
            path_BU,
            zero_B + 1,
            torch.arange(len(zero_B), device=device),
            zero_B,
            columns_W,
            storage_L2BHCD,
        )
