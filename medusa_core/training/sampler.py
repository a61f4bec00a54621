"""Sampler that groups dialogues of similar length into batches."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL_BATCHES = 64


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then groups dialogues of similar length into batches, so that little of a batch is padding.

    Each epoch's order depends on the seed and the epoch's number alone: a resumed run continues it exactly,
    which transformers' own sampler of this kind, drawing from the global generator, does not.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        pool_size, size = self._batch_size * POOL_BATCHES, self._batch_size
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=self._lengths.__getitem__)
            batches = [pool[i : i + size] for i in range(0, len(pool), size)]
            # A batch that is not full stays last: elsewhere it would shift those behind it.
            full = len(pool) // size
            for batch in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
                yield from batches[batch]
