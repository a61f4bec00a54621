"""The noise of a step's positions as one static program: tensors in, tensors out, no decision on the host.

Runs eagerly as it is; `torch.export` takes it with a dynamic number of positions.
"""

from torch import Tensor, nn

from medusa_core.engine.sampling import noise_of_keys


class NoiseProgram(nn.Module):
    """`noise_of_keys` for all of a vocabulary."""

    vocabulary_V: Tensor

    def __init__(self, vocabulary_V: Tensor) -> None:
        super().__init__()
        self.register_buffer("vocabulary_V", vocabulary_V)

    def forward(self, keys_BP: Tensor) -> Tensor:
        """Keys of `noise_keys` (int64) -> standard Gumbel noise [B, P, V] (float32)."""
        return noise_of_keys(keys_BP, self.vocabulary_V)
