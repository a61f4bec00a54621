"""Whether an engine fits the device's memory, computed before anything large is loaded.

Weights, heads and cache are exact; what a step needs besides is estimated on the low side, since refusing
what would have fitted is worse than running out. Each engine counts for itself: several on one device do not
know of one another before they have loaded.
"""

import math
from dataclasses import dataclass

import torch

from medusa_core.config import EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.loading.meta_model import BackboneOutline, HeadsOutline

GIB = 2**30
CUDA_RESERVE = 256 * 2**20  # workspaces of cuBLAS and what the allocator rounds up
LEAST_USEFUL_LENGTH = 128  # a shorter context is no advice
LOGIT_COPIES = 4  # float32: raw, processed, with noise, sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes by part, and what they follow from. `per_token`: cache of one token in one slot."""

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
        parts = {
            "weights": self.weights,
            "heads": self.heads,
            "cache": self.cache,
            "head-room": self.headroom,
        }
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def memory_need(
    backbone: BackboneOutline,
    heads: HeadsOutline | None,
    config: EngineConfig,
    *,
    context: int,
    scratch: int,
    device: torch.device,
) -> MemoryNeed:
    """What an engine of these parts takes on the device."""
    dtype = backbone.model.dtype
    follower = heads.heads.cache_shape if heads is not None else None
    return MemoryNeed(
        weights=backbone.weight_bytes,
        heads=0 if heads is None else heads.weight_bytes,
        headroom=_headroom(backbone, config, context + scratch, device),
        per_token=sum(shape.bytes_per_token(dtype) for shape in (backbone.cache_shape, follower) if shape),
        slots=config.slots,
        context=context,
        scratch=scratch,
    )


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
    """As precise as is of use."""
    return f"{size / GIB:.1f}" if size >= GIB // 10 else f"{size / GIB:.3f}"


def _headroom(backbone: BackboneOutline, config: EngineConfig, capacity: int, device: torch.device) -> int:
    """Activations of the largest prefill chunk with its mask, logits of a tree, and the libraries' own."""
    text = backbone.model.config.get_text_config()
    hidden = backbone.hidden_size
    inner = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    rows = min(config.prefill_chunk, capacity)
    itemsize = backbone.model.dtype.itemsize
    chunk = rows * itemsize * (max(6 * hidden, 2 * hidden + 3 * inner) + capacity)
    logits = LOGIT_COPIES * 4 * (config.tree_nodes or 1) * len(backbone.lm_head_weight)
    return chunk + logits + (CUDA_RESERVE if device.type == "cuda" else 0)


def _advice(need: MemoryNeed, missing: int, dtype: torch.dtype) -> str:
    """Every single change that would do; a smaller model where none does."""
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
