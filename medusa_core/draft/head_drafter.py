"""A draft program with its inputs made of the host's values, and a `DraftTree` of its outputs.

Shapes: B rows, E hidden size, K heads, P positions, V vocabulary.
"""

from functools import lru_cache

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.program import DraftProgram
from medusa_core.draft.tree import Tree
from medusa_core.programs.switch import Switch


class HeadDrafter:
    """Fills trees of `size` nodes (root included) and at most `max_depth` levels.

    `run` is called with the program's inputs.
    """

    def __init__(self, program: DraftProgram) -> None:
        self.run = Switch(program)
        self.size, self.max_depth = program.size, program.max_depth
        self._vocab_size = program.vocab_size

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
        device = hidden_BE.device
        inputs = [hidden_BE, roots_B, _row(taus, device)[None]]
        if temperature > 0.0 and noise_BPV is not None:
            inputs += [_row((temperature,), device), noise_BPV]
        elif self.run.compiled is not None:  # for draws, of which greedy ones are a case
            inputs += [_row((0.0,), device), _silence(self.max_depth + 1, self._vocab_size, device)]
        tokens_BT, depths_BT, parents_BT, ancestors_BTT, origins_BT = self.run(*inputs)
        return DraftTree(tokens_BT, depths_BT, parents_BT, ancestors_BTT, origins_BT, self.max_depth)


def make_drafter(
    heads: DraftHeads, shape: Tree | int, device: torch.device, vocab_size: int | None = None
) -> HeadDrafter:
    """See `DraftProgram`."""
    return HeadDrafter(DraftProgram(heads, shape, device, vocab_size))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for whoever asks next, in whatever mode
def _row(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32 on the device: a copy in every step would make the host wait for the heads."""
    return torch.tensor(values, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _silence(positions: int, vocab_size: int, device: torch.device) -> Tensor:
    """No noise [1, P, V]."""
    return torch.zeros(1, positions, vocab_size, device=device)
