"""Key/value cache in slots. Owns the memory and each slot's committed length; knows nothing of trees or text.

One tensor `storage` [L, 2, B, H, C, D] holds every layer's keys and values: L layers, B slots, H key/value
heads, C capacity in tokens, D head dimension. A forward pass writes its T rows at [n, n+T) behind the
committed length n; `commit` keeps the accepted rows (the trim of the paper, §2.2), anything not committed is
overwritten later.

Draft heads with attention of their own (Hydra++) keep their keys and values in a *follower*: the same slots
of another shape, whose length trails the slot's and never exceeds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a token's keys and values take: L layers, H key/value heads, D head dimension."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Of one slot."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


class SlotLayer(CacheLayerMixin):
    """One layer of one slot, as transformers' attention modules see it."""

    is_sliding = False

    def __init__(self, keys_BHCD: Tensor, values_BHCD: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys_BHCD, values_BHCD
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is given at construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write T rows [1, H, T, D] behind the committed ones; return all n+T rows."""
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """One slot of a `KVCache`, passed to the model as `past_key_values` (batch of one)."""

    def __init__(self, storage_L2HCD: Tensor, follower: "SlotCache | None" = None) -> None:
        self.follower = follower
        self._storage = storage_L2HCD
        self._slot_layers = [SlotLayer(layer[0][None], layer[1][None]) for layer in storage_L2HCD]
        super().__init__(layers=list(self._slot_layers))
        self._length = 0

    @property
    def length(self) -> int:
        """Committed tokens n."""
        return self._length

    @property
    def capacity(self) -> int:
        return int(self._storage.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self._slot_layers[layer_idx].update(key_states, value_states)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows of `path` (node indices of the last forward pass, root first) and drop the rest."""
        start = self._length
        moved = [(i, node) for i, node in enumerate(path) if node != i]
        if moved:
            first = moved[0][0]
            source = torch.tensor(path[first:], device=self._storage.device) + start
            rows = self._storage.index_select(3, source)
            self._storage[:, :, :, start + first : start + len(path)] = rows
        self._set_length(start + len(path))

    def append(self, count: int) -> None:
        """Commit the first `count` rows of the last forward pass in order (prefill)."""
        self._set_length(self._length + count)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._set_length(length)
        if self.follower is not None:
            self.follower.truncate(min(length, self.follower.length))

    def _set_length(self, length: int) -> None:
        assert length <= self.capacity
        self._length = length
        for layer in self._slot_layers:
            layer.length = length


class KVCache:
    """The slots' memory, and their followers' if given a shape: allocated once, handed out slot by slot."""

    def __init__(
        self,
        shape: CacheShape,
        *,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        follower: CacheShape | None = None,
    ) -> None:
        def allocate(shape: CacheShape) -> Tensor:
            size = (shape.num_layers, 2, slots, shape.num_kv_heads, capacity, shape.head_dim)
            return torch.zeros(size, dtype=dtype, device=device)

        self.storage_L2BHCD = allocate(shape)
        followers: list[SlotCache | None] = [None] * slots
        if follower is not None:
            storage = allocate(follower)
            followers = [SlotCache(storage[:, :, slot]) for slot in range(slots)]
        self.slots = [SlotCache(self.storage_L2BHCD[:, :, slot], followers[slot]) for slot in range(slots)]
        self._free = list(reversed(range(slots)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """Take a free slot, emptied; the caller checks `num_free` first."""
        slot = self._free.pop()
        self.slots[slot].truncate(0)
        return slot

    def release(self, slot: int) -> None:
        assert slot not in self._free
        self._free.append(slot)
