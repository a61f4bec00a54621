"""Head files into `MedusaHeads` or `HydraHeads`: read, checked against the backbone, stacked."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from medusa_core.checkpoints.formats import (
    MODELOPT_PREFIX,
    is_vllm_key,
    parse_medusa,
    refuse_differences,
)
from medusa_core.checkpoints.head_files import HeadFile, read_heads
from medusa_core.checkpoints.hydra_format import PREFIX, parse_hydra
from medusa_core.checkpoints.quantized import dequantise
from medusa_core.checkpoints.weights import HeadWeights, HydraWeights, Linear, MedusaWeights, check_shape
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.errors import CheckpointError

CLAIMED_HEADS = ("medusa_num_heads", "hydra_num_heads", "num_medusa_heads")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Fit:
    """What heads are fitted to: `load_heads`'s arguments, and how many output `rows` [V] they get."""

    source: str
    rows: int
    lm_head_weight: Tensor | None
    embed: Callable[[Tensor], Tensor] | None
    backbone_config: PreTrainedConfig | None
    dtype: torch.dtype
    device: torch.device | str


def load_heads(
    path: str | Path,
    *,
    hidden_size: int,
    vocab_size: int,
    lm_head_weight: Tensor | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    backbone_config: PreTrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MedusaHeads | HydraHeads:
    """Heads of any layout from a file, a directory or a Hub repository, checked against the backbone.

    `vocab_size` is the number of tokens that exist, V. `lm_head_weight` [>= V, E] is the backbone's output
    layer: needed by heads that share it, and its rows beyond V say how far the heads' own may be padded.
    `embed` is the backbone's input embedding (a function, not its module, which would become a part of the
    heads), which Hydra heads need, and `backbone_config` its text config,
    from which the shape of a prefix layer follows. Rows of padding are dropped; heads with fewer than V rows
    never draft the tokens beyond, those with a token map only its tokens. On the meta device they are shapes
    without bytes, to see what they would take. Raises `CheckpointError`.
    """
    file = read_heads(path)
    weights = parse_weights(file, hidden_size)
    _check_token_ids(file.source, weights.token_map, vocab_size)
    fit = _Fit(
        source=file.source,
        rows=_check_vocabulary(file.source, weights, vocab_size, lm_head_weight),
        lm_head_weight=lm_head_weight,
        embed=embed,
        backbone_config=backbone_config,
        dtype=dtype,
        device=device,
    )
    heads = _hydra_heads(weights, fit) if isinstance(weights, HydraWeights) else _medusa_heads(weights, fit)
    if torch.device(device).type != "meta":
        _remark(file, weights, vocab_size)
    return heads.eval().requires_grad_(False)


def parse_weights(file: HeadFile, hidden_size: int | None = None) -> HeadWeights:
    """The tensors of any layout in their places. `hidden_size` None: whatever the file has."""
    weights: HeadWeights
    if file.is_hydra:
        weights = parse_hydra(file.source, file.tensors, file.config, hidden_size)
    else:
        tensors = file.tensors
        if any(key.startswith(MODELOPT_PREFIX) for key in tensors):
            tensors = dequantise(file.source, tensors)
        weights = parse_medusa(file.source, tensors, hidden_size)
        if any(is_vllm_key(key) for key in tensors):
            weights = _scaled(weights, _logit_scale(file))
    return weights


def with_backbone_output(weights: MedusaWeights, lm_head_weight: Tensor | None) -> MedusaWeights:
    """One output layer for all heads (layout D) becomes the backbone's, where it is that, else one a head."""
    if len(weights.outputs) != 1 or weights.num_heads == 1:
        return weights
    if lm_head_weight is not None and _equals_rows(weights.outputs[0], lm_head_weight, weights.token_map):
        return replace(weights, outputs=())
    return replace(weights, outputs=weights.outputs * weights.num_heads)


def _equals_rows(output: Tensor, lm_head_weight: Tensor, token_map: Tensor | None) -> bool:
    rows = torch.arange(len(output)) if token_map is None else token_map
    if int(rows.max()) >= len(lm_head_weight):
        return False
    if lm_head_weight.is_meta:
        return True  # the common case, and the smaller guess at their size
    theirs = lm_head_weight[rows.to(lm_head_weight.device)].cpu()
    return torch.equal(output.to(theirs.dtype), theirs)


def _scaled(weights: MedusaWeights, scale: float) -> MedusaWeights:
    """The scale of layout D's logits as part of the output layers."""
    if scale == 1.0:
        return weights
    return replace(weights, outputs=tuple((o.float() * scale).to(o.dtype) for o in weights.outputs))


def _logit_scale(file: HeadFile) -> float:
    scale = file.config.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(
            f"{file.source}: logit_scale in config.json is {scale!r}, not a positive number"
        )
    return float(scale)


def _remark(file: HeadFile, weights: HeadWeights, vocab_size: int) -> None:
    """Say what is odd: few rows, or a wrong config.json (published ones claim 2 heads for files of 5)."""
    held, rows = weights.num_heads, weights.rows
    claims = CLAIMED_HEADS + (("num_heads",) if any(map(is_vllm_key, file.tensors)) else ())
    for name in claims:
        claimed = file.config.get(name)
        if claimed is not None and claimed != held:
            log.info("%s: config.json says %s heads, the file holds %d", file.source, claimed, held)
    if weights.token_map is None and rows is not None and rows < vocab_size:
        log.warning("%s: heads know only the first %d of %d tokens", file.source, rows, vocab_size)


def _check_token_ids(source: str, token_map: Tensor | None, vocab_size: int) -> None:
    if token_map is not None and int(token_map.max()) >= vocab_size:
        raise CheckpointError(
            f"{source}: token_map names token {int(token_map.max())}, the backbone has {vocab_size} tokens"
        )


def _check_vocabulary(
    source: str, weights: HeadWeights, vocab_size: int, lm_head_weight: Tensor | None
) -> int:
    """Output rows the heads get."""
    if not weights.outputs and lm_head_weight is None:
        raise CheckpointError(f"{source}: these heads share the backbone's output layer, which was not given")
    if weights.token_map is not None:
        return len(weights.token_map)
    limit = vocab_size if lm_head_weight is None else max(vocab_size, len(lm_head_weight))
    rows = weights.rows
    if rows is None:
        return min(vocab_size, limit if lm_head_weight is None else len(lm_head_weight))
    if rows > limit:
        raise CheckpointError(f"{source}: heads have a vocabulary of {rows}, the backbone's is {limit}")
    return min(rows, vocab_size)


def _medusa_heads(weights: MedusaWeights, fit: _Fit) -> MedusaHeads:
    weights = with_backbone_output(weights, fit.lm_head_weight)
    heads = MedusaHeads(
        num_heads=weights.num_heads,
        num_layers=weights.num_layers,
        hidden_size=weights.hidden_size,
        vocab_size=fit.rows,
        shared_output=None if weights.outputs else fit.lm_head_weight,
        token_map=weights.token_map,
        dtype=fit.dtype,
        device=fit.device,
    )
    _fill_medusa(heads, weights)
    return heads


def _hydra_heads(weights: HydraWeights, fit: _Fit) -> HydraHeads:
    if fit.embed is None:
        raise CheckpointError(f"{fit.source}: Hydra heads need the backbone's embedding, which was not given")
    shape = HydraShape(
        num_heads=weights.num_heads,
        num_layers=weights.num_layers,
        hidden_size=weights.hidden_size,
        vocab_size=fit.rows,
    )
    heads = HydraHeads(
        shape,
        embed=fit.embed,
        prefix=None if weights.prefix is None else _prefix_layer(weights.prefix, fit),
        shared_output=None if weights.outputs else fit.lm_head_weight,
        token_map=weights.token_map,
        dtype=fit.dtype,
        device=fit.device,
    )
    _fill_hydra(heads, weights)
    return heads


def _prefix_layer(tensors: dict[str, Tensor], fit: _Fit) -> PrefixLayer:
    """Hydra++'s layer, of the backbone's shape, with the file's weights in it."""
    if fit.backbone_config is None:
        raise CheckpointError(
            f"{fit.source}: a prefix layer needs the backbone's config, which was not given"
        )
    layer = PrefixLayer(prefix_config(fit.backbone_config), dtype=fit.dtype, device=fit.device)
    expected = layer.model.state_dict()
    refuse_differences(
        f"{fit.source}: the prefix layer is not one of this backbone's kind",
        {PREFIX + key for key in expected},
        [PREFIX + key for key in tensors],
    )
    with torch.no_grad():
        for key, parameter in expected.items():
            check_shape(fit.source, PREFIX + key, tensors[key], tuple(parameter.shape))
            parameter.copy_(tensors[key])
    return layer


@torch.no_grad()
def _fill_medusa(heads: MedusaHeads, weights: MedusaWeights) -> None:
    """Copy the file's tensors into the stacked parameters, converting dtype and device."""
    for head, blocks in enumerate(weights.blocks):
        for layer, block in enumerate(blocks):
            _fill(heads.block_weights[layer][head], heads.block_biases[layer][head], block)
        if heads.output_KVE is not None:
            heads.output_KVE[head].copy_(weights.outputs[head][: heads.vocab_size])


@torch.no_grad()
def _fill_hydra(heads: HydraHeads, weights: HydraWeights) -> None:
    for head, blocks in enumerate(weights.blocks):
        for index, first in enumerate((weights.linear[head], weights.residual[head])):
            _fill(heads.first_weights[head][index], heads.first_biases[head][index], first)
        for layer, block in enumerate(blocks):
            _fill(heads.block_weights[layer][head], heads.block_biases[layer][head], block)
        if heads.output_KVE is not None and heads.output_bias_KV is not None:
            _fill(heads.output_KVE[head], heads.output_bias_KV[head], weights.outputs[head])


def _fill(weight: Tensor, bias: Tensor, linear: Linear) -> None:
    """The first rows of `linear`; without a bias of its own, zeros."""
    weight.copy_(linear.weight[: len(weight)])
    if linear.bias is None:
        bias.zero_()
    else:
        bias.copy_(linear.bias[: len(bias)])
