"""Head modules from weights and weights of modules.

Modules stack the heads' tensors; files hold one tensor a head. `weights_of` gives views of the former.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from medusa_core.checkpoints.checks import check_keys, check_shape
from medusa_core.checkpoints.hydra_format import PREFIX
from medusa_core.checkpoints.weights import HeadWeights, HydraWeights, Linear, MedusaWeights
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Fit:
    """What heads are fitted to: arguments of `load_heads`, and how many output `rows` [V] they get."""

    source: str
    rows: int
    lm_head_weight: Tensor | None
    embed: Callable[[Tensor], Tensor] | None
    backbone_config: PreTrainedConfig | None
    dtype: torch.dtype
    device: torch.device | str


def build_heads(weights: HeadWeights, fit: Fit) -> MedusaHeads | HydraHeads:
    """The heads with these weights. Raises `CheckpointError` if `fit` lacks what such heads need."""
    options: dict[str, Any] = {
        "shared_output": None if weights.outputs else fit.lm_head_weight,
        "token_map": weights.token_map,
        "dtype": fit.dtype,
        "device": fit.device,
    }
    sizes: dict[str, Any] = {
        "num_heads": weights.num_heads,
        "num_layers": weights.num_layers,
        "hidden_size": weights.hidden_size,
        "vocab_size": fit.rows,
    }
    heads: MedusaHeads | HydraHeads
    if isinstance(weights, HydraWeights):
        if fit.embed is None:
            raise CheckpointError(
                f"{fit.source}: Hydra heads need the backbone's embedding, which was not given"
            )
        prefix = None if weights.prefix is None else _prefix_layer(weights.prefix, fit)
        heads = HydraHeads(HydraShape(**sizes), embed=fit.embed, prefix=prefix, **options)
    else:
        heads = MedusaHeads(**sizes, **options)
    fill(heads, weights)
    return heads


def _prefix_layer(tensors: dict[str, Tensor], fit: Fit) -> PrefixLayer:
    """Hydra++'s layer, of the backbone's shape, with the file's weights."""
    if fit.backbone_config is None:
        raise CheckpointError(
            f"{fit.source}: a prefix layer needs the backbone's config, which was not given"
        )
    layer = PrefixLayer(prefix_config(fit.backbone_config), dtype=fit.dtype, device=fit.device)
    expected = layer.model.state_dict()
    check_keys(
        f"{fit.source}: the prefix layer is not one of this backbone's kind",
        {PREFIX + key for key in expected},
        [PREFIX + key for key in tensors],
    )
    with torch.no_grad():
        for key, parameter in expected.items():
            check_shape(fit.source, PREFIX + key, tensors[key], tuple(parameter.shape))
            parameter.copy_(tensors[key])
    return layer


def weights_of(heads: MedusaHeads | HydraHeads) -> HeadWeights:
    """Views of the heads' parameters; no output layers if they share the backbone's."""
    return _hydra_weights(heads) if isinstance(heads, HydraHeads) else medusa_weights(heads)


def medusa_weights(heads: MedusaHeads) -> MedusaWeights:
    """Views of the heads' parameters."""
    outputs = () if heads.output_KVE is None else tuple(Linear(weight) for weight in heads.output_KVE)
    return MedusaWeights(blocks=_blocks(heads), outputs=outputs, token_map=heads.token_map)


@torch.no_grad()
def fill(heads: MedusaHeads | HydraHeads, weights: HeadWeights) -> None:
    """Copy weights into the heads' linear layers, converting dtype and device.

    Rows beyond the heads' vocabulary (padding) are dropped; a bias that the weights lack is zero.
    """
    for target, own in zip(weights_of(heads).linears, weights.linears, strict=True):
        target.weight.copy_(own.weight[: len(target.weight)])
        if target.bias is not None and own.bias is not None:
            target.bias.copy_(own.bias[: len(target.bias)])
        elif target.bias is not None:
            target.bias.zero_()


def _hydra_weights(heads: HydraHeads) -> HydraWeights:
    firsts = list(zip(heads.first_weights, heads.first_biases, strict=True))
    outputs: tuple[Linear, ...] = ()
    if heads.output_KVE is not None and heads.output_bias_KV is not None:
        outputs = tuple(map(Linear, heads.output_KVE, heads.output_bias_KV))
    return HydraWeights(
        linear=tuple(Linear(weight[0], bias[0]) for weight, bias in firsts),
        residual=tuple(Linear(weight[1], bias[1]) for weight, bias in firsts),
        blocks=_blocks(heads),
        outputs=outputs,
        prefix=None if heads.prefix is None else dict(heads.prefix.model.state_dict()),
        token_map=heads.token_map,
    )


def _blocks(heads: MedusaHeads | HydraHeads) -> tuple[tuple[Linear, ...], ...]:
    layers = list(zip(heads.block_weights, heads.block_biases, strict=True))
    return tuple(
        tuple(Linear(weight[head], bias[head]) for weight, bias in layers) for head in range(heads.num_heads)
    )
