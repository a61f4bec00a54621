"""Any transformers causal LM behind one call with explicit tokens, positions, mask and cache.

Owns loading (safetensors or `.bin` with `weights_only`, never remote code) and the facts about the model that
decoding needs. Shapes: B slots, T new tokens, S cached tokens, E hidden, V vocabulary.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from medusa_core.errors import CheckpointError
from medusa_core.kv_cache import KVCache, SlotCache

IGNORED_KEYS = ("medusa_head.", "rotary_emb.inv_freq", "masked_bias", "attn.bias")
ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# Rotary tables that switch with the length seen: cached keys would not match recomputed ones past this point.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class BackboneOutput:
    """Hidden states [B, T, E] after the final norm and logits [B, T', V] of the last T' tokens asked for."""

    hidden_BTE: Tensor
    logits_BTV: Tensor


class Backbone:
    """A causal LM: `forward` runs T tokens per slot and returns what heads and sampling need."""

    def __init__(self, model: PreTrainedModel, *, vocab_size: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        rows = int(model.get_output_embeddings().weight.shape[0])
        self.vocab_size = min(rows, vocab_size or rows)
        self.hidden_size = int(self.config.hidden_size)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.window = _sliding_window(self.config)
        self._layer_types = _attention_types(self.config)
        self._cache_shape = self._probe_cache_shape()
        self.splits = self._probe_split()  # logits are just the output layer on the hidden states

    @property
    def lm_head_weight(self) -> Tensor:
        """Output rows [V, E] of the tokens that exist."""
        return self.model.get_output_embeddings().weight[: self.vocab_size]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_positions(self) -> int:
        """Longest context that ordinary decoding and ours agree on."""
        limit = int(getattr(self.config, "max_position_embeddings", 0) or 1 << 20)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limit = int(rope.get("original_max_position_embeddings") or limit)
        return limit

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Zeroed slots for this model's layers."""
        layers, heads, head_dim = self._cache_shape
        return KVCache(
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=head_dim,
            slots=slots,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: SlotCache, logits_from: int = 0
    ) -> BackboneOutput:
        """Run T tokens; their keys and values go behind the cache's committed rows, uncommitted.

        `mask` [B, 1, T, S+T] is additive (0 or the dtype's minimum) without the sliding window, which is applied
        here where the model has one. Logits are computed for tokens `logits_from` on.
        """
        kwargs: dict[str, Any] = {
            "input_ids": tokens_BT,
            "position_ids": positions_BT,
            "attention_mask": self._layer_masks(mask, positions_BT, cache.length),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.splits:
            hidden = self.model.base_model(**kwargs).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[:, logits_from:])
        else:
            keep = tokens_BT.shape[1] - logits_from
            out = self.model(**kwargs, output_hidden_states=True, logits_to_keep=keep)
            hidden, logits = out.hidden_states[-1], out.logits
        return BackboneOutput(hidden, logits[..., : self.vocab_size])

    def _layer_masks(self, mask: Tensor, positions_BT: Tensor, cached: int) -> Tensor | dict[str, Tensor]:
        """The mask in the form the model's layers want: with the window where they slide."""
        if self.window is None:
            return mask
        width = mask.shape[-1]
        if width <= self.window:
            sliding = mask
        else:
            columns = torch.arange(width, device=mask.device).expand(positions_BT.shape[0], -1).clone()
            columns[:, cached:] = positions_BT
            far = columns[:, None, None, :] <= positions_BT[:, None, :, None] - self.window
            sliding = mask.masked_fill(far, torch.finfo(mask.dtype).min)
        if self._layer_types == {"sliding_attention"}:
            return sliding
        return {"full_attention": mask, "sliding_attention": sliding}

    @torch.inference_mode()
    def _probe_cache_shape(self) -> tuple[int, int, int]:
        """(layers, key/value heads, head dimension), read off a one-token run."""
        cache = DynamicCache()
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), past_key_values=cache)
        shapes = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers}
        heads, head_dim, value_dim = min(shapes)
        if len(shapes) != 1 or head_dim != value_dim:
            raise CheckpointError(f"layers with different key/value shapes are not supported: {sorted(shapes)}")
        return len(cache.layers), int(heads), int(head_dim)

    @torch.inference_mode()
    def _probe_split(self) -> bool:
        """Whether the logits are just the output layer on the base model's hidden states (no soft cap or scale)."""
        ids = torch.arange(4, device=self.device)[None]
        whole = self.model(input_ids=ids, use_cache=False).logits
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.equal(whole, self.model.get_output_embeddings()(hidden)))


def load_backbone(
    model: str | Path, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> Backbone:
    """Load a causal LM from a directory or Hub name. Raises `CheckpointError` in one readable line."""
    if os.path.isabs(str(model)) and not Path(model).is_dir():
        raise CheckpointError(f"no model directory at {model}")
    try:
        with _quiet_transformers():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                str(model), dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot load the model {model}: {reason[0]}") from error
    _check_loading(str(model), info)
    return Backbone(loaded.to(device), vocab_size=vocab_size)


def _check_loading(model: str, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(f"{model} lacks weights: {_some(missing)}")
    unexpected = sorted(
        key for key in info.get("unexpected_keys", ()) if not any(part in key for part in IGNORED_KEYS)
    )
    if unexpected:
        raise CheckpointError(f"{model} has weights its config does not know: {_some(unexpected)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading problems become our errors; transformers need not print its table of them as well."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _attention_types(config: Any) -> set[str]:
    types = set(getattr(config, "layer_types", None) or ())
    if types - ATTENTION_TYPES:
        raise CheckpointError(f"layers of type {', '.join(sorted(types - ATTENTION_TYPES))} are not supported")
    if not types and getattr(config, "sliding_window", None):
        return {"sliding_attention"}
    return types


def _sliding_window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return int(window) if window and "sliding_attention" in _attention_types(config) else None

