"""Pads a small Llama and its draft heads to a real model's shape without changing what they compute.

For benchmarks: the small model's text and acceptance at the memory traffic of a 1.1-1.3 B-parameter model.
d is the model's own hidden size, D the inflated one.

The invariant: dimensions d..D of the residual stream are zero. So the embedding, `o_proj` and `down_proj`
write zeros there; the latter two also ignore the added query heads and intermediate rows, and are zero in
added layers. RMSNorm then sees a mean square d/D times as large, which `weight * sqrt(d/D)` and `eps * d/D`
undo. Weights that only ever multiply zeros are random, so that no kernel or memory system profits from them.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from medusa_core.errors import ConfigError

POOL_SIZE = 1 << 22  # random numbers, tiled over all weights: drawing 1e9 takes long
DEAD_WEIGHT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class InflatedShape:
    """The target shape, by default `--inflate 1b`; key/value heads follow from the model's own ratio."""

    hidden_size: int = 2048
    num_layers: int = 22
    num_query_heads: int = 32
    head_dim: int = 64
    intermediate_size: int = 5632
    vocab_size: int = 32000


class RandomFill:
    """Overwrites tensors with pseudo-random numbers at the speed of a copy."""

    def __init__(self, like: Tensor) -> None:
        pool = torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(0)) * DEAD_WEIGHT_STD
        self._pool = pool.to(like)  # its dtype and device
        self._start = 0

    def __call__(self, target: Tensor) -> None:
        """Fill a contiguous tensor, each call from another place of the pool."""
        flat = target.view(-1)
        done = 0
        while done < flat.numel():
            count = min(POOL_SIZE - self._start, flat.numel() - done)
            flat[done : done + count] = self._pool[self._start : self._start + count]
            done += count
            self._start = (self._start + count) % POOL_SIZE


def inflate_model(
    model: PreTrainedModel, shape: InflatedShape, *, dtype: torch.dtype | None = None
) -> LlamaForCausalLM:
    """A `LlamaForCausalLM` of `shape` with the same logits for the model's own tokens; added tokens get 0.

    `dtype` defaults to the model's. Made on the model's device, directly in `dtype`. Raises `ConfigError` if
    the model is not a plain Llama of that head dimension or does not fit.
    """
    llama = _check_inflatable(model, shape)
    first = next(llama.parameters())
    with torch.device("meta"):
        inflated = LlamaForCausalLM(_inflated_config(llama.config, shape))
    nn.Module.to(inflated, dtype=dtype or first.dtype)
    inflated.to_empty(device=first.device).requires_grad_(False).train(mode=False)
    # Its tables are buffers that are not saved, so `to_empty` left them unset; they depend on head_dim alone.
    inflated.model.rotary_emb = copy.deepcopy(llama.model.rotary_emb)
    inflated.generation_config = copy.deepcopy(llama.generation_config)
    with torch.no_grad():
        _fill_weights(llama, inflated, RandomFill(inflated.lm_head.weight))
    return inflated


def _check_inflatable(model: PreTrainedModel, shape: InflatedShape) -> LlamaForCausalLM:
    if type(model) is not LlamaForCausalLM:
        raise ConfigError(f"only Llama models can be inflated, not {type(model).__name__}")
    config = model.config
    if config.attention_bias or config.mlp_bias:
        raise ConfigError("cannot inflate a Llama with biases")
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ConfigError("cannot inflate a quantized model")
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    if head_dim != shape.head_dim:
        raise ConfigError(f"cannot inflate: head_dim is {head_dim}, the target's is {shape.head_dim}")
    for what, own, target in (
        ("hidden size", config.hidden_size, shape.hidden_size),
        ("number of layers", config.num_hidden_layers, shape.num_layers),
        ("number of query heads", config.num_attention_heads, shape.num_query_heads),
        ("intermediate size", config.intermediate_size, shape.intermediate_size),
        ("vocabulary", config.vocab_size, shape.vocab_size),
    ):
        if own > target:
            raise ConfigError(f"cannot inflate: the model's {what} is {own}, more than the target's {target}")
    group = _group_size(config)
    if shape.num_query_heads % group:
        raise ConfigError(
            f"cannot inflate: {shape.num_query_heads} query heads do not split into groups of {group}"
        )
    return model


def _group_size(config: LlamaConfig) -> int:
    """Query heads per key/value head."""
    return config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)


def _inflated_config(config: LlamaConfig, shape: InflatedShape) -> LlamaConfig:
    inflated = copy.deepcopy(config)
    group = _group_size(config)
    inflated.update(
        {
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_query_heads,
            "num_key_value_heads": shape.num_query_heads // group,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate_size,
            "vocab_size": shape.vocab_size,
            "rms_norm_eps": config.rms_norm_eps * config.hidden_size / shape.hidden_size,
            "tie_word_embeddings": False,
        }
    )
    return inflated


def _fill_weights(llama: LlamaForCausalLM, inflated: LlamaForCausalLM, fill: RandomFill) -> None:
    own_hidden, own_rows = llama.config.hidden_size, llama.config.vocab_size
    _inflate_writer(inflated.model.embed_tokens.weight.T, llama.model.embed_tokens.weight.T)
    fill(inflated.model.embed_tokens.weight[own_rows:])
    _embed(inflated.lm_head.weight[:own_rows], llama.lm_head.weight, fill)
    fill(inflated.lm_head.weight[own_rows:])
    inflated.lm_head.weight[own_rows:, :own_hidden] = 0
    inflate_norm(inflated.model.norm.weight, llama.model.norm.weight, fill)
    for index, layer in enumerate(inflated.model.layers):
        source = llama.model.layers[index] if index < llama.config.num_hidden_layers else None
        inflate_layer(source, layer, fill)


@torch.no_grad()
def inflate_layer(source: nn.Module | None, layer: nn.Module, fill: RandomFill) -> None:
    """Write one decoder layer: the model's own, or an identity without `source`."""
    own = dict(source.named_parameters()) if source is not None else {}
    for name, weight in layer.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            _inflate_writer(weight, own.get(name))
        elif name not in own:
            fill(weight)
        elif weight.ndim == 1:
            inflate_norm(weight, own[name], fill)
        else:
            _embed(weight, own[name], fill)


def _inflate_writer(target: Tensor, own: Tensor | None) -> None:
    """A matrix that writes into the residual stream [D, *]: only its own [d, *] block may be non-zero."""
    target.zero_()
    if own is not None:
        target[: own.shape[0], : own.shape[1]] = own


@torch.no_grad()
def inflate_norm(target_D: Tensor, own_d: Tensor, fill: RandomFill) -> None:
    """Write an RMSNorm's weight so that it undoes the smaller mean square."""
    fill(target_D)
    scale = math.sqrt(own_d.shape[0] / target_D.shape[0])
    target_D[: own_d.shape[0]] = own_d.float() * scale


def _embed(target: Tensor, own: Tensor, fill: RandomFill) -> None:
    """A matrix that reads the residual stream [*, D]: its own block in the corner, random around it."""
    fill(target)
    target[: own.shape[0], : own.shape[1]] = own
