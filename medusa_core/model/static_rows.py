"""Slots of a cache written by index: where a row goes and how much is read is in tensors, not on the host.

Shapes: S slots, B rows, H key/value heads, T new tokens, W columns, C capacity, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_core.model.kv_cache import KVCache


class StaticLayer(CacheLayerMixin):
    """One layer's keys and values [S, H, C, D], of which a batch's rows lie in `slots_B`."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slots_B: Tensor, columns_BT: Tensor, width: int) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self._slots_B, self._columns_BT, self._width = slots_B, columns_BT, width
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is given at construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write T tokens [B, H, T, D] at their columns; return the rows' first columns [B, H, W, D]."""
        place = (self._slots_B[:, None], slice(None), self._columns_BT)
        # An index before and one after a slice put what they choose first: [B, T, H, D].
        self._keys[place] = key_states.transpose(1, 2)
        self._values[place] = value_states.transpose(1, 2)
        return self._keys[self._slots_B, :, : self._width], self._values[self._slots_B, :, : self._width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._width, 0

    def get_seq_length(self) -> int:
        return self._width - self._columns_BT.shape[1]

    def get_max_length(self) -> int:
        return int(self._keys.shape[2])


class StaticRows(Cache):
    """A batch's rows as a model's `past_key_values`."""

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        slots_B: Tensor,
        columns_BT: Tensor,
        width: int,
    ) -> None:
        self._static = [
            StaticLayer(k, v, slots_B, columns_BT, width) for k, v in zip(keys, values, strict=True)
        ]
        super().__init__(layers=list(self._static))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self._static[layer_idx].update(key_states, value_states)


def layers_of(cache: KVCache) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's keys and values [S, H, C, D]: views of the slots' memory."""
    return [pair[0] for pair in cache.storage_L2BHCD], [pair[1] for pair in cache.storage_L2BHCD]


def bucket(length: int, capacity: int, smallest: int = 128) -> int:
    """Columns W to attend over so that `length` fit: few different widths, so that few kernels are made.

    Multiples of an eighth of the next power of two, at least `smallest` apart.
    """
    step = max(smallest, (1 << (length - 1).bit_length()) // 8) if length > 1 else smallest
    return min(capacity, -(-length // step) * step)


def columns_after(lengths_B: Tensor, count: int) -> Tensor:
    """The `count` columns after each row's committed ones [B, count]."""
    return lengths_B[:, None] + torch.arange(count, device=lengths_B.device)
