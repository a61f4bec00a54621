"""Builds what a run needs from its configuration: backbone, heads, and the module to optimize."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.errors import ConfigError
from medusa_core.loading.devices import resolve_dtype
from medusa_core.loading.heads import heads_source, load_heads_for
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.training.adapters import Tuned
from medusa_core.training.config import JointMode, Recipe, TrainConfig
from medusa_core.training.data import Example
from medusa_core.training.joint import JointModule
from medusa_core.training.memory import MemoryShape, estimate_memory
from medusa_core.training.module import HeadModule
from medusa_core.training.quantization import quantize

PROBED_TOKENS = 6
SAMPLED_DIALOGUES = 8


def training_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products and of the saved result."""
    dtype = resolve_dtype(config.dtype, device, config.model)
    # "auto" on a float16 checkpoint; gradients would underflow.
    return torch.bfloat16 if dtype == torch.float16 else dtype


def build_backbone(config: TrainConfig, device: torch.device, vocab_size: int) -> Backbone:
    """The frozen backbone, quantized if configured so. Raises `CheckpointError` or `ConfigError`."""
    dtype = training_dtype(config, device)
    backbone = load_backbone(config.model, dtype=dtype, device=device, vocab_size=vocab_size)
    if config.quantize is not None:
        quantize(backbone.model, config.quantize)
    if config.packing:
        check_packs(backbone)
    return backbone


def build_heads(
    config: TrainConfig, backbone: Backbone, examples: Sequence[Example]
) -> MedusaHeads | HydraHeads:
    """Fresh float32 heads on the backbone's device, or those of `config.heads`. Raises `ConfigError`."""
    if config.heads is not None:
        return _given_heads(config, backbone)
    token_map = None
    if config.draft_vocab is not None:
        token_map = frequent_tokens(examples, config.draft_vocab, backbone.vocab_size).to(backbone.device)
    sizes: dict[str, Any] = {
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size if token_map is None else len(token_map),
    }
    outputs: dict[str, Any] = {
        "lm_head_weight": backbone.lm_head_weight.float(),
        "shared": config.shared_output,
        "token_map": token_map,
    }
    if not config.is_hydra:
        return MedusaHeads.new(**sizes, **outputs)
    prefix = _prefix_layer(backbone, examples) if config.recipe == Recipe.HYDRA_PLUS else None
    return HydraHeads.new(
        HydraShape(**sizes), embed=backbone.embed, prefix=prefix, dropout=config.dropout, **outputs
    )


def build_trainer_module(
    config: TrainConfig, backbone: Backbone, heads: MedusaHeads | HydraHeads, tuned: Tuned | None
) -> HeadModule:
    """The module that the Trainer optimizes; `tuned` if the backbone is trained too."""
    if tuned is None:
        return HeadModule(backbone, heads, loss=config.loss, decay=config.decay, noise=config.noise)
    return JointModule(
        backbone,
        heads,
        loss=config.loss,
        decay=config.decay,
        heads_weight=config.heads_weight,
        ramps=config.joint == JointMode.SINE,
        original=tuned.original if config.self_distill else None,
        dtype=training_dtype(config, backbone.device),
    )


def peak_bytes(config: TrainConfig, backbone: Backbone, heads: MedusaHeads) -> int:
    """Estimated peak memory in bytes of training heads on the frozen backbone, with full rows."""
    shape = MemoryShape(
        backbone_bytes=sum(tensor.nbytes for tensor in backbone.model.parameters()),
        num_heads=heads.num_heads,
        num_layers=heads.num_layers,
        hidden_size=heads.hidden_size,
        output_rows=heads.vocab_size,
        tokens=config.batch_size * config.sequence_length,
        itemsize=backbone.dtype.itemsize,
        has_output=not heads.is_shared,
    )
    return estimate_memory(shape).peak


def frequent_tokens(examples: Sequence[Example], count: int, vocab_size: int) -> Tensor:
    """The ids [count] of the most frequent target tokens, ascending; ties go to the smaller id."""
    if count > vocab_size:
        raise ConfigError(f"draft_vocab {count} is more than the model's {vocab_size} tokens")
    frequency = torch.zeros(vocab_size, dtype=torch.long)
    for example in examples:
        frequency += torch.bincount(example.input_ids[example.is_target].long(), minlength=vocab_size)
    return frequency.argsort(descending=True, stable=True)[:count].sort().values


def _given_heads(config: TrainConfig, backbone: Backbone) -> MedusaHeads:
    assert config.heads is not None
    source = heads_source(config.model, config.heads) or config.heads
    heads = load_heads_for(
        backbone.model, source, vocab_size=backbone.vocab_size, dtype=torch.float32, device=backbone.device
    )
    if not isinstance(heads, MedusaHeads):
        raise ConfigError(f"{config.heads} holds Hydra heads; training starts from Medusa heads only")
    held = {
        "num_heads": heads.num_heads,
        "num_layers": heads.num_layers,
        "shared_output": heads.is_shared,
        "draft_vocab": None if heads.token_map is None else heads.vocab_size,
    }
    wrong = [f"{name} {value}" for name, value in held.items() if getattr(config, name) != value]
    if wrong:
        raise ConfigError(f"the heads in {config.heads} have {', '.join(wrong)}: set it so")
    return heads.train().requires_grad_(True)


@torch.no_grad()
def _prefix_layer(backbone: Backbone, examples: Sequence[Example]) -> PrefixLayer:
    """A new prefix layer, initialized close to the identity for hidden states of this scale."""
    sample = [example.input_ids.long().to(backbone.device) for example in examples[:SAMPLED_DIALOGUES]]
    states = [backbone.model.base_model(input_ids=ids[None], use_cache=False)[0][0] for ids in sample]
    rms = float(torch.cat(states).float().pow(2).mean().sqrt())
    return PrefixLayer.new(prefix_config(backbone.config), hidden_rms=rms).to(backbone.device)


@torch.inference_mode()
def check_packs(backbone: Backbone) -> None:
    """Raise `ConfigError` if the model's code does not separate dialogues whose positions restart at 0."""
    size = PROBED_TOKENS // 2
    ids = torch.arange(PROBED_TOKENS, device=backbone.device)[None]
    positions = (ids % size).long()
    base = backbone.model.base_model
    packed = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, size:]
    alone = base(input_ids=ids[:, size:], use_cache=False).last_hidden_state
    if not torch.allclose(packed, alone, rtol=0.05, atol=0.05 * float(alone.abs().max())):
        name = type(backbone.model).__name__
        raise ConfigError(f"{name} cannot tell packed dialogues apart: train it without packing")
