"""Reads draft heads: any layout's files, checked against the backbone, as `MedusaHeads` or `HydraHeads`."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from medusa_core.checkpoints.head_files import HeadFile, read_heads
from medusa_core.checkpoints.hydra_format import is_hydra, parse_hydra
from medusa_core.checkpoints.medusa_format import MODELOPT_PREFIX, is_vllm_key, parse_medusa
from medusa_core.checkpoints.modules import Fit, build_heads
from medusa_core.checkpoints.quantized import dequantize
from medusa_core.checkpoints.weights import HeadWeights, Linear, MedusaWeights
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import CheckpointError

CLAIMED_HEADS = ("medusa_num_heads", "hydra_num_heads", "num_medusa_heads")

logger = logging.getLogger(__name__)


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

    `vocab_size` is the number of tokens that exist, V. `lm_head_weight` [>= V, E], the backbone's output
    layer, is needed by heads that share it; its rows beyond V say how far the heads' own may be padded.
    Hydra heads need `embed`, the backbone's input embedding, and those with a prefix layer its text config.
    Rows of padding are dropped. Heads with fewer than V rows never draft the tokens beyond, those with a
    token map only its tokens. On the meta device they take no memory. Raises `CheckpointError`.
    """
    file = read_heads(path)
    weights = parse_weights(file, hidden_size)
    _check_token_ids(file.source, weights.token_map, vocab_size)
    rows = _output_rows(file.source, weights, vocab_size, lm_head_weight)
    if isinstance(weights, MedusaWeights):
        weights = with_backbone_output(weights, lm_head_weight)
    fit = Fit(file.source, rows, lm_head_weight, embed, backbone_config, dtype, device)
    heads = build_heads(weights, fit)
    if torch.device(device).type != "meta":
        _log_oddities(file, weights, vocab_size)
    return heads.eval().requires_grad_(False)


def parse_weights(file: HeadFile, hidden_size: int | None = None) -> HeadWeights:
    """The checked tensors of any layout. `hidden_size` None accepts any."""
    if is_hydra(file.tensors):
        return parse_hydra(file.source, file.tensors, file.config, hidden_size)
    tensors = file.tensors
    if any(key.startswith(MODELOPT_PREFIX) for key in tensors):
        tensors = dequantize(file.source, tensors)
    weights = parse_medusa(file.source, tensors, hidden_size)
    return _scaled(weights, _logit_scale(file)) if any(map(is_vllm_key, tensors)) else weights


def with_backbone_output(weights: MedusaWeights, lm_head_weight: Tensor | None) -> MedusaWeights:
    """One output layer for all heads (layout D) becomes the backbone's if it equals it, else one a head."""
    if len(weights.outputs) != 1 or weights.num_heads == 1:
        return weights
    output = weights.outputs[0].weight
    if lm_head_weight is not None and _equals_rows(output, lm_head_weight, weights.token_map):
        return replace(weights, outputs=())
    return replace(weights, outputs=weights.outputs * weights.num_heads)


def _equals_rows(output: Tensor, lm_head_weight: Tensor, token_map: Tensor | None) -> bool:
    rows = torch.arange(len(output)) if token_map is None else token_map
    if int(rows.max()) >= len(lm_head_weight):
        return False
    if lm_head_weight.is_meta:
        return True  # the common case, and the smaller estimate of their size
    theirs = lm_head_weight[rows.to(lm_head_weight.device)].cpu()
    return torch.equal(output.to(theirs.dtype), theirs)


def _scaled(weights: MedusaWeights, scale: float) -> MedusaWeights:
    """The scale of layout D's logits as part of the output layers."""
    if scale == 1.0:
        return weights
    scaled = [(o.weight.float() * scale).to(o.weight.dtype) for o in weights.outputs]
    return replace(weights, outputs=tuple(map(Linear, scaled)))


def _logit_scale(file: HeadFile) -> float:
    scale = file.config.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(
            f"{file.source}: logit_scale in config.json is {scale!r}, not a positive number"
        )
    return float(scale)


def _log_oddities(file: HeadFile, weights: HeadWeights, vocab_size: int) -> None:
    """Log a wrong config.json (published ones claim 2 heads for files of 5) and a short vocabulary."""
    held, rows = weights.num_heads, weights.rows
    claims = CLAIMED_HEADS + (("num_heads",) if any(map(is_vllm_key, file.tensors)) else ())
    for name in claims:
        claimed = file.config.get(name)
        if claimed is not None and claimed != held:
            logger.info("%s: config.json says %s heads, the file holds %d", file.source, claimed, held)
    if weights.token_map is None and rows is not None and rows < vocab_size:
        logger.warning("%s: heads know only the first %d of %d tokens", file.source, rows, vocab_size)


def _check_token_ids(source: str, token_map: Tensor | None, vocab_size: int) -> None:
    if token_map is not None and int(token_map.max()) >= vocab_size:
        raise CheckpointError(
            f"{source}: token_map names token {int(token_map.max())}, the backbone has {vocab_size} tokens"
        )


def _output_rows(source: str, weights: HeadWeights, vocab_size: int, lm_head_weight: Tensor | None) -> int:
    """Output rows the heads get, padding dropped."""
    if not weights.outputs and lm_head_weight is None:
        raise CheckpointError(f"{source}: these heads share the backbone's output layer, which was not given")
    if weights.token_map is not None:
        return len(weights.token_map)
    given = vocab_size if lm_head_weight is None else len(lm_head_weight)
    rows, limit = given if weights.rows is None else weights.rows, max(vocab_size, given)
    if rows > limit:
        raise CheckpointError(f"{source}: heads have a vocabulary of {rows}, the backbone's is {limit}")
    return min(rows, vocab_size)
