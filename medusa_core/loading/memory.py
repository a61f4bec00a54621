"""Memory check: refuses an engine that does not fit its device, before anything large is loaded.

Weights, heads and cache are exact. What a step needs besides is estimated low, since refusing what would have
fitted is worse than running out. Engines that load on one device at the same time do not see one another.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_core.config import EngineConfig, resolve_context_length
from medusa_core.draft.head_stack import HeadStack
from medusa_core.errors import ConfigError
from medusa_core.loading.capacity import cache_scratch
from medusa_core.loading.free_memory import free_memory
from medusa_core.loading.heads import load_static_tree
from medusa_core.loading.meta_model import (
    MetaBackbone,
    MetaHeads,
    build_meta_backbone,
    build_meta_heads,
    held_bytes,
)

logger = logging.getLogger(__name__)

GIB = 2**30
CUDA_RESERVE = 256 * 2**20  # cuBLAS workspaces and allocator rounding
LEAST_USEFUL_LENGTH = 128  # advise no shorter context
LOGIT_COPIES = 4  # float32: raw, processed, with noise, sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes by part and what determines them. `per_token`: cache bytes of one token in one slot."""

    weights: int
    heads: int
    headroom: int
    per_token: int
    slots: int
    context: int
    scratch: int

    @property
    def cache(self) -> int:
        return self.per_token * self.slots * (self.context + self.scratch)

    @property
    def total(self) -> int:
        return self.weights + self.heads + self.cache + self.headroom

    def __str__(self) -> str:
        sizes = (self.weights, self.heads, self.cache, self.headroom)
        parts = zip(("weights", "heads", "cache", "head-room"), sizes, strict=True)
        return ", ".join(f"{name} {gib(size)}" for name, size in parts if size)


def check_memory(
    model: str | Path,
    heads: str | Path | None,
    config: EngineConfig,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise a `ConfigError` if the engine does not fit the free memory; what cannot be known passes."""
    backbone = build_meta_backbone(model, dtype)
    free = free_memory(device)
    if backbone is None or free is None:
        logger.info("whether it fits the memory of %s is not known beforehand", device)
        return
    built = None
    if heads is not None:
        built = build_meta_heads(heads, backbone, vocab_size=vocab_size, dtype=dtype)
    need = memory_need(backbone, built, config, device)
    logger.info("%s GiB of memory needed on %s (%s), %s free", gib(need.total), device, need, gib(free))
    check_fits(need, free, device, dtype)


def memory_need(
    backbone: MetaBackbone, heads: MetaHeads | None, config: EngineConfig, device: torch.device
) -> MemoryNeed:
    """Bytes an engine of these parts takes on the device."""
    context = resolve_context_length(config.max_length, backbone.max_positions)
    scratch = cache_scratch(heads, load_static_tree(config.static_tree, heads), config.tree_nodes)
    shared = backbone.model.get_output_embeddings().weight
    own = () if heads is None else (*heads.parameters(), *heads.buffers())
    caches = (backbone.cache_shape, None if heads is None else heads.cache_shape)
    copies = _copies(backbone, heads) if _is_packed(backbone, device) else (0, 0)
    return MemoryNeed(
        weights=backbone.weight_bytes + copies[0],
        heads=held_bytes(own, apart_from=(shared,)) + copies[1],
        headroom=_headroom(backbone, config, context + scratch, device),
        per_token=sum(shape.bytes_per_token(backbone.model.dtype) for shape in caches if shape),
        slots=config.slots,
        context=context,
        scratch=scratch,
    )


def _is_packed(backbone: MetaBackbone, device: torch.device) -> bool:
    """Whether linear layers get packed, where that is faster."""
    return device.type == "cpu" and backbone.model.dtype == torch.bfloat16


def _copies(backbone: MetaBackbone, heads: MetaHeads | None) -> tuple[int, int]:
    """Bytes that packing adds to model and heads: an output layer that something else looks at unpacked."""
    model: Any = backbone.model
    embedded, shared = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = embedded.untyped_storage()._cdata == shared.untyped_storage()._cdata
    of_heads = 0
    if isinstance(heads, HeadStack) and heads.is_shared and heads.token_map is None:
        has_all = heads.vocab_size == backbone.output_rows
        of_heads = 0 if has_all else heads.vocab_size * heads.hidden_size * shared.element_size()
    return (shared.nbytes if is_tied else 0), of_heads


def check_fits(need: MemoryNeed, free: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise a `ConfigError` that says what is missing and what to change."""
    missing = need.total - free
    if missing <= 0:
        return
    raise ConfigError(
        f"the model does not fit the memory of {device}: {gib(need.total)} GiB needed ({need}; "
        f"{need.slots} x {need.context} tokens), {gib(free)} free, {gib(missing)} missing: "
        f"{_advice(need, missing, dtype)} "
        "(MEDUSA_MEMORY_CHECK=false loads it all the same)"
    )


def gib(size: int) -> str:
    """GiB to one decimal, small sizes to three."""
    return f"{size / GIB:.1f}" if size >= GIB // 10 else f"{size / GIB:.3f}"


def _headroom(backbone: MetaBackbone, config: EngineConfig, capacity: int, device: torch.device) -> int:
    """Bytes of the largest prefill chunk's activations and mask, a tree's logits and CUDA's workspaces."""
    text = backbone.model.config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    rows = min(config.prefill_chunk, capacity)
    itemsize = backbone.model.dtype.itemsize
    chunk = rows * itemsize * (max(6 * hidden, 2 * hidden + 3 * inner) + capacity)
    logits = LOGIT_COPIES * 4 * (config.tree_nodes or 1) * backbone.output_rows
    return chunk + logits + (CUDA_RESERVE if device.type == "cuda" else 0)


def _advice(need: MemoryNeed, missing: int, dtype: torch.dtype) -> str:
    """Every single change that would suffice; else a smaller model."""
    changes = []
    length = need.context - math.ceil(missing / (need.per_token * need.slots))
    if length >= LEAST_USEFUL_LENGTH:
        changes.append(f"MEDUSA_MAX_LENGTH to at most {length}")
    slots = need.slots - math.ceil(missing / (need.per_token * (need.context + need.scratch)))
    if slots >= 1:
        changes.append(f"MEDUSA_SLOTS to at most {slots}")
    if dtype == torch.float32 and 2 * missing <= need.weights + need.heads + need.cache:
        changes.append("MEDUSA_DTYPE to bfloat16")
    if need.heads >= missing:
        changes.append("MEDUSA_HEADS to none")
    return f"set {' or '.join(changes)}" if changes else "choose a smaller model or a larger device"
