"""Any transformers causal LM behind one call with explicit tokens, positions, mask and cache.

Owns loading (safetensors or `.bin` with `weights_only`, never remote code) and the facts about the model that
decoding needs. Shapes: B slots, T new tokens, S cached tokens, E hidden, V vocabulary.
"""

import contextlib
import inspect
import os
import pickle  # for the name of an error alone  # nosec B403
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging as transformers_logging

from medusa_core.errors import CheckpointError
from medusa_core.model.kv_cache import CacheRows, CacheShape, KVCache
from medusa_core.model.masks import additive_mask, causal, visible_columns
from medusa_core.model.verify_program import VerifyFacts

IGNORED_KEYS = ("medusa_head.", "medusa_heads.", "rotary_emb.inv_freq", "masked_bias", "attn.bias")
ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# Rotary tables that switch with the length seen: cached keys would not match recomputed ones past this point.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# What transformers lets through from damaged files and senseless configs, found by damaging them.
LOADING_FAILURES = (
    *(OSError, EOFError, ValueError, RuntimeError, LookupError, ImportError, TypeError, AttributeError),
    *(ArithmeticError, pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)


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
        _check_takes_positions(model)
        self._cache_shape = probe_cache_shape(model)
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
        return max_positions(self.config)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings [..., E] as the model's own module gives them, scaled if that scales."""
        embeddings: Tensor = self.model.get_input_embeddings()(token_ids)
        return embeddings

    @property
    def verify_facts(self) -> VerifyFacts:
        """What a program of this backbone's forward pass depends on."""
        types = tuple(sorted(self._layer_types))
        return VerifyFacts(self.splits, self.vocab_size, self.window, types, self._cache_shape)

    def new_cache(self, slots: int, capacity: int, shape: CacheShape | None = None) -> KVCache:
        """Zeroed slots for this model's layers, or others. Raises `ConfigError` without memory for them."""
        shape = shape or self._cache_shape
        return KVCache(shape, slots=slots, capacity=capacity, dtype=self.dtype, device=self.device)

    def prefill(self, token_ids: Sequence[int], cache: CacheRows) -> BackboneOutput:
        """Run and commit prompt tokens after one row's own; logits [1, 1, V] are the last token's."""
        count = len(token_ids)
        [start] = cache.lengths
        tokens = torch.tensor([list(token_ids)], device=self.device)
        positions = torch.arange(start, start + count, device=self.device)[None]
        output = self.forward(tokens, positions, causal(count, self.device), cache, logits_from=count - 1)
        cache.advance([count])
        return output

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        among_BTT: Tensor,
        cache: CacheRows,
        logits_from: int = 0,
    ) -> BackboneOutput:
        """Run T tokens of each row; their keys and values go after its committed ones, uncommitted.

        `among`: which of the T tokens each of them sees; all see the committed ones, as far as the model's
        sliding window allows. Logits are computed for tokens `logits_from` on.
        """
        mask = additive_mask(visible_columns(cache.lengths, among_BTT), self.dtype)
        kwargs: dict[str, Any] = {
            "input_ids": tokens_BT,
            "position_ids": positions_BT,
            "attention_mask": self._layer_masks(mask, positions_BT, cache.lengths),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.splits:
            hidden = self.model.base_model(**kwargs).last_hidden_state
            # As rows: a slice of a batch of one keeps the stride of the whole, for which torch's matmul would
            # copy all weights of the layer (0.5 s of a prefill at 1 B parameters).
            rows = hidden[:, logits_from:].flatten(0, 1)
            logits = self.model.get_output_embeddings()(rows).unflatten(0, (len(hidden), -1))
        else:
            keep = tokens_BT.shape[1] - logits_from
            out = self.model(**kwargs, output_hidden_states=True, logits_to_keep=keep)
            hidden, logits = out.hidden_states[-1], out.logits
        return BackboneOutput(hidden, logits[..., : self.vocab_size])

    def _layer_masks(
        self, mask: Tensor, positions_BT: Tensor, lengths: Sequence[int]
    ) -> Tensor | dict[str, Tensor]:
        """The mask in the form the model's layers want: with the window where they slide."""
        if self.window is None:
            return mask
        width = mask.shape[-1]
        if width <= self.window:
            sliding = mask
        else:
            columns = torch.arange(width, device=mask.device).expand(positions_BT.shape[0], -1).clone()
            new = torch.arange(positions_BT.shape[1], device=mask.device)
            columns.scatter_(1, torch.tensor(lengths, device=mask.device)[:, None] + new, positions_BT)
            far = columns[:, None, None, :] <= positions_BT[:, None, :, None] - self.window
            sliding = mask.masked_fill(far, torch.finfo(mask.dtype).min)
        if self._layer_types == {"sliding_attention"}:
            return sliding
        return {"full_attention": mask, "sliding_attention": sliding}

    @torch.inference_mode()
    def _probe_split(self) -> bool:
        """Whether logits are the output layer's product with the hidden states: no soft cap, no scale."""
        ids = torch.arange(4, device=self.device)[None]
        whole = self.model(input_ids=ids, use_cache=False).logits
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.equal(whole, self.model.get_output_embeddings()(hidden)))


def max_positions(config: Any) -> int:
    """Longest context that ordinary decoding and ours agree on, of a text config."""
    limit = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    ropes = getattr(config, "rope_parameters", None) or {}
    # One set for all layers, or one by type of layer.
    for rope in (ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))):
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


@torch.inference_mode()
def probe_cache_shape(model: PreTrainedModel) -> CacheShape:
    """Read off a one-token run, which may be one on the meta device. Raises `CheckpointError`."""
    cache = DynamicCache()
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache)
    shapes = set()
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
            raise CheckpointError(f"layers that keep a {type(layer).__name__} are not supported")
        shapes.add((int(layer.keys.shape[1]), int(layer.keys.shape[3]), int(layer.values.shape[3])))
    if len(shapes) != 1 or any(head_dim != value_dim for _, head_dim, value_dim in shapes):
        raise CheckpointError(f"layers must share one key/value shape, not {sorted(shapes)}")
    heads, head_dim, _ = shapes.pop()
    return CacheShape(len(cache.layers), heads, head_dim)


def load_backbone(
    model: str | Path, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> Backbone:
    """Load a causal LM from a directory or Hub name. Raises `CheckpointError` in one readable line."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_absolute() or str(model).startswith(".") or len(path.parts) > 2):
        raise CheckpointError(f"no model directory at {model}")
    try:
        with quiet_transformers():
            loaded, info = _from_pretrained(str(path if path.is_dir() else model), dtype)
        _check_loading(str(model), info)
        return Backbone(loaded.to(device), vocab_size=vocab_size)  # type: ignore[arg-type]
    except LOADING_FAILURES as error:
        raise CheckpointError(f"cannot load the model {model}: {_reason(error)}") from error


def _from_pretrained(model: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what was odd about its weights; nothing of the repository's own code runs."""
    # Else transformers, in a thread, has a public service convert `.bin` weights, and downloads what it made.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they come back by name: `_check_loading` refuses them
    )
    return loaded[0], loaded[1]


def _reason(error: Exception) -> str:
    """One line on what went wrong."""
    if isinstance(error, pickle.UnpicklingError):
        return "its .bin weights are damaged or hold more than tensors"  # torch's text advises to trust them
    if isinstance(error, torch.OutOfMemoryError):
        return "it does not fit the device's memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if text and isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        return text
    return f"{type(error).__name__}: {text}"


def _check_loading(model: str, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(f"{model} lacks weights: {_some(missing)}")
    misshapen = sorted(
        str(key if isinstance(key, str) else key[0]) for key in info.get("mismatched_keys", ())
    )
    if misshapen:
        raise CheckpointError(f"{model} has weights of other shapes than its config says: {_some(misshapen)}")
    unexpected = sorted(
        key for key in info.get("unexpected_keys", ()) if not any(part in key for part in IGNORED_KEYS)
    )
    if unexpected:
        raise CheckpointError(f"{model} has weights its config does not know: {_some(unexpected)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No tables and bars of its own: problems become our errors."""
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


def _check_takes_positions(model: PreTrainedModel) -> None:
    """Nodes of one depth share a position: impossible where it is counted off in a row (ALiBi)."""
    takes = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in takes or getattr(model.config, "alibi", False):
        raise CheckpointError(
            f"{type(model).__name__} takes no positions of its tokens, which a draft tree needs"
        )


def _attention_types(config: Any) -> set[str]:
    types = set(getattr(config, "layer_types", None) or ())
    if types - ATTENTION_TYPES:
        raise CheckpointError(
            f"layers of type {', '.join(sorted(types - ATTENTION_TYPES))} are not supported"
        )
    if not types and getattr(config, "sliding_window", None):
        return {"sliding_attention"}
    return types


def _sliding_window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return int(window) if window and "sliding_attention" in _attention_types(config) else None
