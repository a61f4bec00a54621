"""An engine around an inflated model: real text and acceptance at a 1.2 B model's memory traffic."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from medusa_core.config import EngineConfig
from medusa_core.engine import Engine
from medusa_core.errors import ConfigError
from medusa_core.heads.base import DraftHeads
from medusa_core.heads.medusa import MedusaHeads
from medusa_core.inflate import InflatedShape, RandomFill, inflate_head_parameter, inflate_model
from medusa_core.loading import load_parts, resolve_device, resolve_dtype

SHAPES = {"1b": InflatedShape()}


def inflated_engine(
    model: str | Path, heads: str | Path | None, config: EngineConfig, shape: InflatedShape, *, seed: int = 0
) -> Engine:
    """Like `Engine.from_pretrained`, padded to `shape`; a model that does not fit is a `ConfigError`.

    The small model is read in float32, so that rescaled norm weights are rounded to the final dtype once.
    """
    parts = load_parts(model, heads, replace(config, dtype="float32"))
    dtype = resolve_dtype(config.dtype, resolve_device(config.device), model)
    big = inflate_model(parts.backbone.model, shape, dtype=dtype, seed=seed)
    wide = None if parts.heads is None else inflate_heads(parts.heads, big, seed=seed)
    return Engine.from_parts(big, parts.chat, wide, config, parts.calibration)


@torch.no_grad()
def inflate_heads(heads: DraftHeads, inflated: LlamaForCausalLM, *, seed: int = 0) -> MedusaHeads:
    """Medusa heads for an inflated model, in its dtype, with the logits and output rows of the given ones."""
    if not isinstance(heads, MedusaHeads):
        raise ConfigError(f"only Medusa heads can be inflated, not {type(heads).__name__}")
    weight = inflated.lm_head.weight
    wide = MedusaHeads(
        num_heads=heads.num_heads,
        num_layers=heads.num_layers,
        hidden_size=inflated.config.hidden_size,
        vocab_size=heads.vocab_size,
        shared_output=weight if heads.is_shared else None,
        dtype=weight.dtype,
        device=weight.device,
    )
    fill = RandomFill(dtype=weight.dtype, device=weight.device, seed=seed + 1)
    for target, own in zip(wide.parameters(), heads.parameters(), strict=True):
        inflate_head_parameter(target, own, fill)
    return wide.eval().requires_grad_(False)
