"""A draft program with its inputs made of the host's values, and a `DraftTree` of its outputs.

Shapes: B rows, E hidden size, K heads, P positions, V vocabulary.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree, TreeTensors
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.program import DraftProgram
from medusa_core.draft.tree import Tree


class HeadDrafter:
    """Fills trees of `size` nodes (root included) and at most `max_depth` levels.

    `run` is called with the program's inputs: the program itself, or what was compiled from it.
    """

    def __init__(self, program: DraftProgram) -> None:
        self.program = program
        self.run: Callable[..., TreeTensors] = program
        self.size, self.max_depth = program.size, program.max_depth

    @torch.inference_mode()
    def draft(
        self,
        hidden_BE: Tensor,
        roots_B: Tensor,
        taus: tuple[float, ...],
        temperature: float,
        noise_BPV: Tensor | None,
    ) -> DraftTree:
        """A tree of what the heads `read`, for rows of one temperature.

        `taus` make each head's scores probabilities; `noise_BPV`: the target's, a row per depth.
        """
        inputs = [hidden_BE, roots_B, _row(taus, hidden_BE.device)[None]]
        if temperature > 0.0 and noise_BPV is not None:
            inputs += [_row((temperature,), hidden_BE.device), noise_BPV]
        return DraftTree(*self.run(*inputs), self.max_depth)


def make_drafter(heads: DraftHeads, shape: Tree | int, device: torch.device) -> HeadDrafter:
    """See `DraftProgram`."""
    return HeadDrafter(DraftProgram(heads, shape, device))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for whoever asks next, in whatever mode
def _row(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32 on the device: a copy in every step would make the host wait for the heads."""
    return torch.tensor(values, device=device)
