"""An engine with inflated model and heads: the small model's text and acceptance at a 1.2 B model's cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from medusa_core.benchmark.inflate import (
    InflatedShape,
    RandomFill,
    inflate_layer,
    inflate_model,
    inflate_norm,
)
from medusa_core.checkpoints.modules import weights_of
from medusa_core.checkpoints.weights import Linear
from medusa_core.config import EngineConfig
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.engine.engine import Engine
from medusa_core.errors import ConfigError
from medusa_core.loading.devices import resolve_device, resolve_dtype
from medusa_core.loading.loader import load_parts

SHAPES = {"1b": InflatedShape()}


def inflated_engine(
    model: str | Path, heads: str | Path | None, config: EngineConfig, shape: InflatedShape
) -> Engine:
    """Like `Engine.from_pretrained`, padded to `shape`; a model that does not fit is a `ConfigError`.

    The small model is read in float32, so that rescaled norm weights are rounded to the final dtype once.
    """
    parts = load_parts(model, heads, replace(config, dtype="float32"))
    dtype = resolve_dtype(config.dtype, resolve_device(config.device), model)
    big = inflate_model(parts.backbone.model, shape, dtype=dtype)
    wide = None if parts.heads is None else inflate_heads(parts.heads, big)
    return Engine.from_parts(big, parts.chat, wide, config, parts.calibration)


def inflate_heads(heads: DraftHeads, inflated: LlamaForCausalLM) -> MedusaHeads | HydraHeads:
    """Heads for an inflated model, in its dtype, with the logits and output rows of the given ones."""
    hidden_size, weight = inflated.config.hidden_size, inflated.lm_head.weight
    fill = RandomFill(weight)
    if not isinstance(heads, MedusaHeads | HydraHeads):
        raise ConfigError(f"{type(heads).__name__} cannot be inflated")
    own = weights_of(heads)
    if own.hidden_size > hidden_size:
        raise ConfigError(f"cannot inflate heads of hidden size {own.hidden_size} to {hidden_size}")
    options: dict[str, Any] = {
        "shared_output": weight if heads.is_shared else None,
        "token_map": heads.token_map,
        "dtype": weight.dtype,
        "device": weight.device,
    }
    wide: MedusaHeads | HydraHeads
    if isinstance(heads, HydraHeads):
        shape = replace(heads.shape, hidden_size=hidden_size)
        prefix = None if heads.prefix is None else _inflate_prefix(heads.prefix, inflated, fill)
        wide = HydraHeads(shape, embed=inflated.get_input_embeddings(), prefix=prefix, **options)
    else:
        options |= {"num_heads": heads.num_heads, "num_layers": heads.num_layers}
        wide = MedusaHeads(hidden_size=hidden_size, vocab_size=heads.vocab_size, **options)
    for target, linear in zip(weights_of(wide).linears, own.linears, strict=True):
        _inflate_linear(target, linear, own.hidden_size, fill)
    return wide.eval().requires_grad_(False)


@torch.no_grad()
def _inflate_linear(target: Linear, own: Linear, hidden_size: int, fill: RandomFill) -> None:
    """Write a linear layer [rows, n * d] of n inputs into its inflated one [rows', n * D].

    Added rows feed the residual stream and stay zero. Columns beyond an input's d only ever multiply zeros
    and are random.
    """
    rows, width = own.weight.shape
    inputs = (width // hidden_size, -1)
    target.weight.zero_()
    fill(target.weight[:rows])
    target.weight[:rows].unflatten(1, inputs)[..., :hidden_size] = own.weight.unflatten(1, inputs)
    if target.bias is not None and own.bias is not None:
        target.bias.zero_()
        target.bias[:rows] = own.bias


def _inflate_prefix(prefix: PrefixLayer, inflated: LlamaForCausalLM, fill: RandomFill) -> PrefixLayer:
    weight = inflated.lm_head.weight
    wide = PrefixLayer(prefix_config(inflated.config), dtype=weight.dtype, device=weight.device)
    inflate_layer(prefix.model.layers[0], wide.model.layers[0], fill)
    inflate_norm(wide.model.norm.weight, prefix.model.norm.weight, fill)
    return wide
