"""Parameters of head modules as plain weights, and weights copied into them.

Modules stack the heads' tensors; files hold one tensor a head. Both functions see the same views.
"""

import torch

from medusa_core.checkpoints.weights import HeadWeights, HydraWeights, Linear, MedusaWeights
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads


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
