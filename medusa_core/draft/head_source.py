"""Drafts of Medusa, Hydra and Hydra++ heads, and what these remember of each sequence.

Shapes: B rows, U committed tokens not read yet, E hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medusa_core.draft.draft_tree import DraftTree, root_tree, stack_rows
from medusa_core.draft.head_trees import HeadTrees
from medusa_core.draft.source import Committed, DraftBatch
from medusa_core.model.kv_cache import KVCache
from medusa_core.sampling_params import SpeculationParams

MAX_UNREAD = 512  # hidden states kept before they are read, drafts or not


class HeadSource:
    """Heads with their trees; per slot the hidden states they have not read, and Hydra++'s cache.

    Hidden states are read when drafts are asked for: a step without speculation costs the heads nothing.
    """

    def __init__(self, trees: HeadTrees, draft_cache: KVCache | None = None) -> None:
        """`draft_cache`: the memory of heads that have a `cache_shape`."""
        self.heads, self.calibration = trees.heads, trees.calibration
        self.trees, self.draft_cache = trees, draft_cache
        self._unread: dict[int, Tensor] = {}

    def check(self, speculation: SpeculationParams) -> None:
        self.trees.check(speculation.tree)

    def is_adaptive(self, speculation: SpeculationParams) -> bool:
        return self.trees.is_adaptive(speculation.tree)

    def max_depth(self, speculation: SpeculationParams, nodes: int) -> int:
        return self.trees.drafter(speculation.tree, nodes).max_depth

    def start(self, slot: int) -> None:
        self._unread.pop(slot, None)
        if self.draft_cache is not None:
            self.draft_cache.truncate(slot, 0)

    def assume_read(self, slot: int, count: int) -> None:
        """Count so many tokens as read, whatever the cache's rows hold: to time steps at that length."""
        if self.draft_cache is not None:
            self.draft_cache.advance(slot, count)

    def observe(self, committed: Committed) -> None:
        slot = committed.slot
        if self.draft_cache is None:  # the last hidden state is all that such heads need
            last = committed.path[-1]
            self._unread[slot] = committed.hidden_TE[last : last + 1]
            return
        new_UE, before = committed.features_UE, self._unread.get(slot)
        self._unread[slot] = new_UE if before is None else torch.cat([before, new_UE])
        if committed.root is None or len(self._unread[slot]) > MAX_UNREAD:
            unread_UE = self._unread[slot]
            if len(unread_UE) > 1:
                self._unread[slot] = unread_UE[:-1]
                self._read((slot,))
            self._unread[slot] = unread_UE[-1:]  # so that there is something to draft from

    def propose(self, batch: DraftBatch) -> DraftTree:
        hidden_BE = self._read(batch.slots)
        groups: dict[tuple[str, int, float], list[int]] = {}
        for row, (params, nodes) in enumerate(zip(batch.params, batch.nodes, strict=True)):
            groups.setdefault((params.speculation.tree, nodes, params.temperature), []).append(row)
        parts = []
        for key, rows in groups.items():
            own = rows if len(groups) > 1 else slice(None)  # rows of one kind need no copy
            parts.append((rows, self._draft(*key, batch, own, hidden_BE[own])))
        return stack_rows(parts)

    def _draft(
        self,
        tree: str,
        nodes: int,
        temperature: float,
        batch: DraftBatch,
        own: list[int] | slice,
        hidden_BE: Tensor,
    ) -> DraftTree:
        roots_B = batch.roots_B[own]
        if nodes <= 1 and self.trees.is_adaptive(tree):
            return root_tree(roots_B)
        taus = self.calibration.taus(temperature, self.heads.num_heads)
        drafter = self.trees.drafter(tree, nodes)
        noise_BPV = batch.draft_noise(drafter.max_depth) if temperature > 0.0 else None
        if noise_BPV is not None:
            noise_BPV = noise_BPV[own]
        return drafter.draft(hidden_BE, roots_B, taus, temperature, noise_BPV)

    def _read(self, slots: Sequence[int]) -> Tensor:
        """Have the heads read what they have not; returns what the next drafts come from [B, E]."""
        unread = [self._unread[slot] for slot in slots]
        counts = [len(rows) for rows in unread]
        hidden_BUE = pad_sequence(unread, batch_first=True) if len(unread) > 1 else unread[0][None]
        rows = None if self.draft_cache is None else self.draft_cache.rows(tuple(slots))
        hidden_BE = self.heads.read(hidden_BUE, counts, rows)
        if rows is not None:
            for slot in slots:
                self._unread[slot] = self._unread[slot][:0]
        return hidden_BE
