"""An engine around an inflated model: real text and acceptance at a 1.2 B model's memory traffic."""

from dataclasses import replace
from pathlib import Path

from transformers import LlamaForCausalLM

from medusa_core.benchmark.inflate import (
    InflatedShape,
    RandomFill,
    inflate_head_parameter,
    inflate_layer,
    inflate_model,
    inflate_norm,
)
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


def inflate_heads(
    heads: DraftHeads, inflated: LlamaForCausalLM, *, seed: int = 0
) -> MedusaHeads | HydraHeads:
    """Heads for an inflated model, in its dtype, with the logits and output rows of the given ones."""
    fill = RandomFill(dtype=inflated.dtype, device=inflated.device, seed=seed + 1)
    if isinstance(heads, MedusaHeads):
        return _inflate_medusa(heads, inflated, fill)
    if isinstance(heads, HydraHeads):
        return _inflate_hydra(heads, inflated, fill)
    raise ConfigError(f"{type(heads).__name__} cannot be inflated")


def _inflate_medusa(heads: MedusaHeads, inflated: LlamaForCausalLM, fill: RandomFill) -> MedusaHeads:
    weight = inflated.lm_head.weight
    wide = MedusaHeads(
        num_heads=heads.num_heads,
        num_layers=heads.num_layers,
        hidden_size=inflated.config.hidden_size,
        vocab_size=heads.vocab_size,
        shared_output=weight if heads.is_shared else None,
        token_map=heads.token_map,
        dtype=weight.dtype,
        device=weight.device,
    )
    for target, own in zip(wide.parameters(), heads.parameters(), strict=True):
        inflate_head_parameter(target, own, fill)
    return wide.eval().requires_grad_(False)


def _inflate_hydra(heads: HydraHeads, inflated: LlamaForCausalLM, fill: RandomFill) -> HydraHeads:
    weight = inflated.lm_head.weight
    wide = HydraHeads(
        replace(heads.shape, hidden_size=inflated.config.hidden_size),
        embed=inflated.get_input_embeddings(),
        prefix=None if heads.prefix is None else _inflate_prefix(heads.prefix, inflated, fill),
        shared_output=weight if heads.is_shared else None,
        token_map=heads.token_map,
        dtype=weight.dtype,
        device=weight.device,
    )
    for number, (first, own) in enumerate(zip(wide.first_weights, heads.first_weights, strict=True)):
        inflate_head_parameter(first, own, fill, inputs_side_by_side=number + 2)
    rest = [
        (getattr(wide, name), getattr(heads, name))
        for name in ("first_biases", "block_weights", "block_biases")
    ]
    for targets, owns in rest:
        for target, own in zip(targets, owns, strict=True):
            inflate_head_parameter(target, own, fill)
    if wide.output_KVE is not None and heads.output_KVE is not None:
        inflate_head_parameter(wide.output_KVE, heads.output_KVE, fill)
    if wide.output_bias_KV is not None and heads.output_bias_KV is not None:
        wide.output_bias_KV.data.copy_(heads.output_bias_KV)
    return wide.eval().requires_grad_(False)


def _inflate_prefix(prefix: PrefixLayer, inflated: LlamaForCausalLM, fill: RandomFill) -> PrefixLayer:
    weight = inflated.lm_head.weight
    wide = PrefixLayer(prefix_config(inflated.config), dtype=weight.dtype, device=weight.device)
    inflate_layer(prefix.model.layers[0], wide.model.layers[0], fill)
    inflate_norm(wide.model.norm.weight, prefix.model.norm.weight, fill)
    return wide
