"""Which keys each new token may see: its slot's committed ones, and among the new ones its ancestors.

Shapes: B rows, T new tokens, W = max(n) + T columns, n committed tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def visible_columns(lengths: Sequence[int], among_BTT: Tensor) -> Tensor:
    """[B, T, W]: True on a row's own `lengths` committed columns and, after them, where `among` is."""
    count = among_BTT.shape[2]
    lengths_B11 = torch.tensor(lengths, device=among_BTT.device)[:, None, None]
    place_B1W = torch.arange(max(lengths) + count, device=among_BTT.device) - lengths_B11
    column_BTW = place_B1W.clamp(0, count - 1).expand(-1, among_BTT.shape[1], -1)
    return (place_B1W < 0) | (among_BTT.gather(2, column_BTW) & (place_B1W < count))


def causal(count: int, device: torch.device) -> Tensor:
    """[1, T, T]: each of `count` tokens in a row sees those before it and itself."""
    return torch.ones(1, count, count, dtype=torch.bool, device=device).tril()


def additive_mask(visible_BTW: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, W]: 0 where visible, the dtype's minimum elsewhere."""
    mask = torch.zeros(visible_BTW.shape, dtype=dtype, device=visible_BTW.device)
    return mask.masked_fill_(~visible_BTW, torch.finfo(dtype).min)[:, None]
