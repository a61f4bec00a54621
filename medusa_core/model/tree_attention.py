"""Attention of a tree's nodes over their slot's rows, through transformers' attention interface.

A node's ancestors lie at other columns than the same tokens would after they were committed, and a kernel
that rounds in between, or sums in blocks, lets that show in the last bits. Here every number is the same
wherever a row or column lies: scores are float32 products of one row with one column each, sums of
exponentials are taken in float64, and values are summed column by column, one after the other: what is not
visible adds a zero in between, which changes nothing.

Shapes: B rows, T nodes, H query heads, K key/value heads, G = H / K, W columns, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

REPRODUCIBLE, FAST = "medusa_tree", "medusa_tree_fast"


def tree_attention(
    weighted_sum: Callable[[Tensor, Tensor], Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Queries [B, H, T, D] over keys and values [B, K, W, D] -> [B, T, H, D].

    Boolean masks [B, 1, T, W] (True: visible) are a tree's; whatever has another mask, or none, is attended
    to as transformers does with `sdpa`. `weighted_sum` of weights [B, K, N, W] and values [B, K, W, D] is
    [B, K, N, D].
    """
    if attention_mask is None or attention_mask.dtype is not torch.bool:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, nodes, size = query.shape
    groups = heads // key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    rows = (query.float() * scale).contiguous().view(batch, key.shape[1], groups * nodes, size)
    scores = (rows @ key.float().transpose(2, 3)).view(batch, key.shape[1], groups, nodes, -1)
    scores = scores.masked_fill(~attention_mask[:, :, None], -torch.inf)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp().flatten(2, 3)
    total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    output = (weighted_sum(weights, value) / total).to(query.dtype).view(batch, heads, nodes, size)
    return output.transpose(1, 2).contiguous(), None


def _one_by_one(weights: Tensor, value: Tensor) -> Tensor:
    """Sums that do not depend on where a column lies."""
    if torch.compiler.is_exporting():
        # The compiler makes a loop of it: column after column, a vector of D at a time, no product in memory.
        return (weights[..., None] * value.float()[:, :, None]).sum(dim=-2)
    return weights.double() @ value.double()  # sums in any order are the same once they are rounded


def _at_once(weights: Tensor, value: Tensor) -> Tensor:
    """A product, whose last bits depend on where a column lies."""
    return weights @ value.float()


def use_tree_attention(model: PreTrainedModel, *, reproducible: bool = True) -> str:
    """Have the model's layers attend through `tree_attention`; returns what they did before.

    Raises `ValueError` if they cannot.
    """
    for name, weighted_sum in ((REPRODUCIBLE, _one_by_one), (FAST, _at_once)):
        ALL_ATTENTION_FUNCTIONS.register(name, partial(tree_attention, weighted_sum))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    current = model.config._attn_implementation
    if current not in ("sdpa", REPRODUCIBLE, FAST):
        raise ValueError(f"its attention is {current!r}, not 'sdpa'")
    model.set_attn_implementation(REPRODUCIBLE if reproducible else FAST)
    return str(current)


def restore_attention(model: PreTrainedModel, name: str) -> None:
    """Attend as before `use_tree_attention`."""
    model.set_attn_implementation(name)
