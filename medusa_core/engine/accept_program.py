"""A step's second phase, *process + accept + commit*, as one static program.

Tensors in, one packed tensor out, nothing decided on the host: it runs eagerly as it is, and `torch.export`
takes it with dynamic T and D. `EagerRunner.accept` is the reference, which also decides what this cannot.

Shapes: B rows, T tree nodes, D tree depth, P > D positions, V vocabulary; L2BHCD: `KVCache`'s storage.
"""

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from medusa_core.engine.acceptance import longest_path, match_drafts
from medusa_core.engine.logits_processors import surely_kept, without_excluded
from medusa_core.model.kv_cache import CacheShape, move_rows
from medusa_core.programs.program import Argument, Program, cache_sizes, node_sizes
from medusa_core.sampling_params import SamplingParams, SpeculationMode


class AcceptProgram(Program):
    """Accepts a path per row and moves its keys and values to follow the committed ones.

    Filters (top-k, top-p, min-p) are not applied exactly, as sorting takes longer than all the rest. Most of
    what they exclude is left out before the draw, and then each filter is asked whether it surely keeps the
    winners on the accepted path. If one may not, the row is *undecided*: then no row's keys and values have
    moved, so that the caller can run the reference on the same inputs.
    """

    can_repeat = False  # rows that have moved would be moved again

    def __init__(self, cache: CacheShape, vocab_size: int, dtype: torch.dtype, *, sampled: bool) -> None:
        """`sampled`: whether it is compiled for rows that draw."""
        super().__init__()
        self._cache, self._vocab_size, self._dtype, self._sampled = cache, vocab_size, dtype, sampled

    def facts(self) -> object:
        return (self._cache, self._vocab_size, self._dtype, self._sampled)

    def example(self) -> tuple[Argument, ...]:
        """One row of 16 nodes at most 5 deep, in one of two slots."""
        zeros, nodes, cache = torch.zeros(1, 16, dtype=torch.long), 16, self._cache
        size = (cache.num_layers, 2, 2, cache.num_kv_heads, 200, cache.head_dim)
        arguments: tuple[Argument, ...] = (
            torch.zeros(1, nodes, self._vocab_size, dtype=self._dtype),
            *(zeros.clone() for _ in range(3)),
            torch.eye(nodes, dtype=torch.bool)[None],
            zeros.clone(),
            zeros[:, 0].clone(),
            zeros[:, 0].clone(),
            torch.arange(6),
            torch.zeros(size, dtype=self._dtype),
        )
        if not self._sampled:
            return arguments
        return (*arguments, torch.ones(1, 4), torch.zeros(1, 7, self._vocab_size))

    def sizes(self) -> tuple[Any, ...]:
        """Any tree, depth, number of positions and cache; one row."""
        nodes, places = node_sizes(), {0: Dim("places", min=2, max=1024)}
        slots, capacity = cache_sizes()
        rows = ({1: nodes}, {1: nodes}, {1: nodes}, {1: nodes}, {1: nodes, 2: nodes}, {1: nodes}, None, None)
        sizes: tuple[Any, ...] = (*rows, places, {2: slots, 4: capacity})
        return (*sizes, None, {1: Dim("positions", min=2, max=1024)}) if self._sampled else sizes

    @staticmethod
    def can_take(params: SamplingParams) -> bool:
        """Whether this decides a request's rows, processors that are not of its parameters aside.

        All but typical acceptance.
        """
        return params.is_greedy or params.speculation.mode is not SpeculationMode.TYPICAL

    def forward(  # noqa: PLR0913 - a compiled program takes its tensors one by one
        self,
        logits_BTV: Tensor,
        tokens_BT: Tensor,
        depths_BT: Tensor,
        parents_BT: Tensor,
        ancestors_BTT: Tensor,
        origins_BT: Tensor,
        slots_B: Tensor,
        lengths_B: Tensor,
        places_D: Tensor,
        storage_L2BHCD: Tensor,
        sampling_B4: Tensor | None = None,
        noise_BPV: Tensor | None = None,
    ) -> Tensor:
        """What the step decided, int64 [B, 3 (D + 1) + 2 + T + 1].

        Per row: path, its tokens, its origins (D + 1 each, the root again beyond the accepted drafts), number
        of accepted drafts, next root, depths of all nodes, 1 if undecided. `places_D`: 0..D. `sampling_B4`:
        temperature, top_k, top_p, min_p (0, 0, 1, 0 are off), with `noise_BPV` of the positions after the
        root; both absent if all rows are greedy. All are contiguous; `storage_L2BHCD` is changed in place.
        """
        logits_BTV = logits_BTV.float()
        if sampling_B4 is None or noise_BPV is None:
            targets_BT = logits_BTV.argmax(dim=-1)
        else:
            left_BTV = without_excluded(logits_BTV, sampling_B4)
            targets_BT = _draw(left_BTV, depths_BT, sampling_B4[:, 0], noise_BPV)
        right_BT = match_drafts(tokens_BT, parents_BT, targets_BT)
        accepted = longest_path(right_BT, ancestors_BTT, depths_BT, places_D.shape[0] - 1)
        path_BD = accepted.path_BD
        undecided_B = torch.zeros_like(lengths_B, dtype=torch.bool)
        if sampling_B4 is not None:
            winners_BD = targets_BT.gather(1, path_BD)
            rows_B1 = torch.arange(path_BD.shape[0], device=path_BD.device)[:, None]
            undecided_B = ~surely_kept(logits_BTV[rows_B1, path_BD], winners_BD, sampling_B4).all(dim=1)
        # A row that is where it belongs does not move: so a step that is run again finds all as it was.
        moved_BD = torch.where(undecided_B.any(), places_D, path_BD)
        move_rows(storage_L2BHCD, slots_B, lengths_B, moved_BD)
        return torch.cat(
            [
                path_BD,
                tokens_BT.gather(1, path_BD),
                origins_BT.gather(1, path_BD),
                accepted.count_B[:, None],
                targets_BT.gather(1, accepted.leaf_B[:, None]),
                depths_BT,
                undecided_B[:, None].long(),
            ],
            dim=1,
        )


def _draw(logits_BTV: Tensor, depths_BT: Tensor, temperature_B: Tensor, noise_BPV: Tensor) -> Tensor:
    """Each node's own token [B, T]: at temperature 0 the noise, which is finite, adds nothing."""
    rows_B1 = torch.arange(depths_BT.shape[0], device=depths_BT.device)[:, None]
    noise_BTV = noise_BPV[rows_B1, depths_BT]
    return (logits_BTV + temperature_B[:, None, None] * noise_BTV).argmax(dim=-1)
