"""Inputs of draft programs for heads of the tiny model."""

import torch
from torch import Tensor

from medusa_core.engine.sampling import gumbel_noise


def draft_inputs(seed: int, temperature: float) -> tuple[Tensor, ...]:
    """Of one row; at temperature 0 without noise."""
    generator = torch.Generator().manual_seed(seed)
    hidden, divisors = torch.randn(1, 64, generator=generator), torch.tensor([[0.7, 1.0, 1.4, 2.0]])
    greedy = (hidden, torch.tensor([seed % 320]), divisors)
    if temperature == 0.0:
        return greedy
    return *greedy, torch.tensor([temperature]), gumbel_noise(seed, range(5), torch.arange(320))[None]
