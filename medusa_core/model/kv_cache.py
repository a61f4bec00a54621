"""Key/value cache in slots: owns the memory and each slot's committed length; knows nothing of trees or text.

One tensor [L, 2, B, H, C, D] holds every layer's keys and values: L layers, B slots, H key/value heads, C
capacity in tokens, D head dimension. A forward pass writes its T rows at [n, n+T) after a slot's committed
length n; `keep` moves the accepted ones to n (the trim of the Medusa paper, §2.2), and whatever is not
committed is overwritten later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a token's keys and values take: L layers, H key/value heads, D head dimension."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Of one slot."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


class KVCache:
    """The slots' memory: allocated once, handed out slot by slot.

    Raises `ConfigError` if memory does not hold it.
    """

    def __init__(
        self, shape: CacheShape, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.num_layers, 2, slots, shape.num_kv_heads, capacity, shape.head_dim)
        try:
            self.storage_L2BHCD = torch.zeros(size, dtype=dtype, device=device)
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            gib = shape.bytes_per_token(dtype) * slots * capacity / 2**30
            raise ConfigError(
                f"a cache of {slots} slots of {capacity} tokens needs {gib:.1f} GiB, which are not free: "
                "lower slots or max_length"
            ) from error
        self.capacity = capacity
        self.lengths = [0] * slots
        self._free = list(reversed(range(slots)))
        self._rows: dict[tuple[int, ...], CacheRows] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """Take a free slot for a prompt; the caller checks `num_free` first.

        Returns the slot and how many of the prompt's first tokens it holds already: a seam for prefix reuse,
        0 as long as slots forget what they held.
        """
        slot = self._free.pop()
        self.lengths[slot] = 0
        return slot, 0

    def release(self, slot: int) -> None:
        assert slot not in self._free
        self._free.append(slot)

    def rows(self, slots: tuple[int, ...]) -> "CacheRows":
        """These slots as a model's `past_key_values`, in this order."""
        if slots not in self._rows:
            self._rows[slots] = CacheRows(self, slots)
        return self._rows[slots]

    def keep(self, slots_B: Tensor, lengths_B: Tensor, path_BD: Tensor) -> None:
        """Move a path's rows (node indices of the last forward pass, root first) to where n ends.

        Static in shape: all D rows move, those after the accepted ones for nothing. Lengths do not change:
        `advance` follows when the host knows how many count.
        """
        if path_BD.shape[1] > 1:  # else the root is in its place
            move_rows(self.storage_L2BHCD, slots_B, lengths_B, path_BD)

    def advance(self, slot: int, count: int) -> None:
        """Commit `count` rows after the slot's own."""
        self.lengths[slot] += count
        assert self.lengths[slot] <= self.capacity

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"cannot truncate {self.lengths[slot]} tokens to {length}")
        self.lengths[slot] = length


def move_rows(storage_L2BHCD: Tensor, slots_B: Tensor, lengths_B: Tensor, path_BD: Tensor) -> None:
    """Copy rows n + `path_BD` of each slot to n, n + 1, ...; all are read before the first is written."""
    source_BD = lengths_B[:, None] + path_BD
    target_BD = lengths_B[:, None] + torch.arange(path_BD.shape[1], device=path_BD.device)
    rows_B1 = slots_B[:, None]
    # Advanced indices on both sides of a slice come first: [B, D, L, 2, H, head dim].
    storage_L2BHCD[:, :, rows_B1, :, target_BD] = storage_L2BHCD[:, :, rows_B1, :, source_BD]


class RowsLayer(CacheLayerMixin):
    """One layer of some slots, as transformers' attention modules see it."""

    is_sliding = False

    def __init__(self, cache: KVCache, slots: tuple[int, ...], layer: int) -> None:
        super().__init__()
        self._lengths, self._slots, self._capacity = cache.lengths, slots, cache.capacity
        storage_2BHCD = cache.storage_L2BHCD[layer]
        self._rows = [storage_2BHCD[:, slot] for slot in slots]
        span = range(slots[0], slots[0] + len(slots))
        neighbors = slots == tuple(span)  # then their rows are read where they lie
        self._all = (storage_2BHCD[:, span.start : span.stop] if neighbors else storage_2BHCD).unbind()
        self._order = None if neighbors else list(slots)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is given at construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write T rows [B, H, T, D] after each slot's own; return [B, H, max(n)+T, D]."""
        count, end = key_states.shape[2], 0
        for row, (slot, rows_2HCD) in enumerate(zip(self._slots, self._rows, strict=True)):
            start = self._lengths[slot]
            rows_2HCD[0, :, start : start + count] = key_states[row]
            rows_2HCD[1, :, start : start + count] = value_states[row]
            end = max(end, start + count)
        keys, values = (part[:, :, :end] for part in self._all)
        return (keys, values) if self._order is None else (keys[self._order], values[self._order])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(self._lengths[slot] for slot in self._slots)

    def get_max_length(self) -> int:
        return self._capacity


class CacheRows(Cache):
    """Some slots of a `KVCache` as the rows of a batch, passed to a model as `past_key_values`."""

    def __init__(self, cache: KVCache, slots: tuple[int, ...]) -> None:
        self._cache, self.slots = cache, slots
        self._rows_layers = [RowsLayer(cache, slots, layer) for layer in range(len(cache.storage_L2BHCD))]
        super().__init__(layers=list(self._rows_layers))

    @property
    def storage_L2BHCD(self) -> Tensor:
        """Of all slots."""
        return self._cache.storage_L2BHCD

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens n of each row."""
        return tuple(self._cache.lengths[slot] for slot in self.slots)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self._rows_layers[layer_idx].update(key_states, value_states)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first rows of the last forward pass, in order, as many as each row's count."""
        for slot, count in zip(self.slots, counts, strict=True):
            self._cache.advance(slot, count)
