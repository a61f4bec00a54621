"""Slots of a cache, their lengths as tensors: rows are written by index, attention sees a fixed width.

Nothing is decided on the host, so a model can run over it compiled, with one program for every length.
Shapes: B rows, U new tokens, H key/value heads, C capacity, W columns, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, slots=True)
class StaticRows:
    """Where a batch's rows lie in a cache's storage [L, 2, slots, H, C, D], and their committed lengths.

    `columns_W`: 0 ... W-1; no row may reach beyond them.
    """

    storage_L2BHCD: Tensor
    slots_B: Tensor
    lengths_B: Tensor
    columns_W: Tensor

    def positions_BU(self, count: int) -> Tensor:
        """Of so many tokens after each row's committed ones."""
        return self.lengths_B[:, None] + torch.arange(count, device=self.lengths_B.device)

    def as_cache(self, positions_BU: Tensor) -> Cache:
        """For a model's forward pass over tokens at these positions."""
        return Cache(
            layers=[_StaticLayer(self, layer, positions_BU) for layer in range(len(self.storage_L2BHCD))]
        )


class _StaticLayer(CacheLayerMixin):
    """One layer, as transformers' attention modules see it."""

    is_sliding = False

    def __init__(self, rows: StaticRows, layer: int, positions_BU: Tensor) -> None:
        super().__init__()
        self._rows, self._layer, self._positions_BU = rows, layer, positions_BU
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is given at construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new rows [B, H, U, D] at their positions; return [B, H, W, D]."""
        slots_B, width = self._rows.slots_B, self._rows.columns_W.shape[0]
        storage, layer_11 = self._rows.storage_L2BHCD, torch.full_like(slots_B[:1, None], self._layer)
        for part, new in enumerate((key_states, value_states)):
            part_11 = torch.full_like(layer_11, part)
            # Every index a tensor, on no view: a compiled program then writes to the storage, not to a copy.
            # Indices on both sides of a slice come first: [B, U, H, D].
            storage[layer_11, part_11, slots_B[:, None], :, self._positions_BU] = new.transpose(1, 2)
        keys, values = storage[self._layer, 0, :, :, :width], storage[self._layer, 1, :, :, :width]
        return keys.index_select(0, slots_B), values.index_select(0, slots_B)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.columns_W.shape[0], 0

    def get_seq_length(self) -> int:
        return 0  # positions are given

    def get_max_length(self) -> int:
        return int(self._rows.storage_L2BHCD.shape[4])


def bucket(length: int, limit: int, smallest: int = 128) -> int:
    """Columns W to attend over so that `length` fit: few different widths, at most `limit`.

    Multiples of an eighth of the next power of two, at least `smallest` apart.
    """
    step = max(smallest, (1 << length.bit_length()) // 8)
    return min(limit, -(-length // step) * step)
