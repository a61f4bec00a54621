"""The noise of a step's positions as one static program: tensors in, tensors out, no decision on the host.

Runs eagerly as it is; `torch.export` takes it with a dynamic number of positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from medusa_core.engine.sampling import noise_of_keys
from medusa_core.programs.program import Argument, Program


class NoiseProgram(Program):
    """`noise_of_keys` for all of a vocabulary."""

    vocabulary_V: Tensor

    def __init__(self, vocabulary_V: Tensor) -> None:
        super().__init__()
        self.register_buffer("vocabulary_V", vocabulary_V)

    def example(self) -> tuple[Argument, ...]:
        """Five positions of one row."""
        return (torch.zeros(1, 5, dtype=torch.long),)

    def sizes(self) -> tuple[Any, ...]:
        """Any number of positions."""
        return ({1: Dim("positions", min=2, max=1024)},)

    def forward(self, keys_BP: Tensor) -> Tensor:
        """Keys of `noise_keys` (int64) -> standard Gumbel noise [B, P, V] (float32)."""
        return noise_of_keys(keys_BP, self.vocabulary_V)
