"""A model and its heads as shapes without bytes, from the config and the headers of files alone.

Everything is built on torch's meta device by the very code that loads it, so that sizes are those of what
will be loaded, to the byte, before a weight is read or downloaded.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medusa_core.checkpoints import load_heads
from medusa_core.draft.heads import DraftHeads
from medusa_core.errors import CheckpointError
from medusa_core.model.backbone import LOADING_FAILURES, max_positions, probe_cache_shape, quiet_transformers
from medusa_core.model.kv_cache import CacheShape

log = logging.getLogger(__name__)

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class BackboneOutline:
    """A model without its weights. `weight_bytes`: what they take once loaded, shared ones counted once."""

    model: PreTrainedModel
    weight_bytes: int
    cache_shape: CacheShape
    max_positions: int

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def lm_head_weight(self) -> Tensor:
        """Output rows, padding included."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight


@dataclass(frozen=True, slots=True)
class HeadsOutline:
    """Draft heads without their weights; `weight_bytes` leaves out what they share with the backbone."""

    heads: DraftHeads
    weight_bytes: int


def outline_backbone(model: str | Path, dtype: torch.dtype) -> BackboneOutline | None:
    """The model as its config describes it; None, with a word in the log, where that does not tell.

    What is wrong with a model is for loading it to say.
    """
    path = Path(model).expanduser()
    try:
        with quiet_transformers(), torch.inference_mode():
            config = AutoConfig.from_pretrained(
                str(path if path.is_dir() else model), trust_remote_code=False
            )
            if getattr(config, "quantization_config", None) is not None:
                log.info("the size of the quantised weights of %s is not known before they are loaded", model)
                return None
            with META:
                built = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            return BackboneOutline(
                built.eval(),
                held_bytes((*built.parameters(), *built.buffers())),
                probe_cache_shape(built),
                max_positions(built.config.get_text_config()),
            )
    except (CheckpointError, *LOADING_FAILURES) as error:
        log.info("the size of %s is not known before it is loaded: %s", model, type(error).__name__)
        log.debug("no outline of %s", model, exc_info=True)
        return None


def outline_heads(
    source: str | Path, backbone: BackboneOutline, *, vocab_size: int, dtype: torch.dtype
) -> HeadsOutline:
    """The heads as their files describe them. Raises `CheckpointError` where loading them would."""
    weight = backbone.lm_head_weight
    heads = load_heads(
        source,
        hidden_size=backbone.hidden_size,
        vocab_size=min(vocab_size, len(weight)),
        lm_head_weight=weight,
        embed=backbone.model.get_input_embeddings(),
        backbone_config=backbone.model.config.get_text_config(),
        dtype=dtype,
        device=META,
    )
    return HeadsOutline(heads, held_bytes((*heads.parameters(), *heads.buffers()), apart_from=(weight,)))


def held_bytes(tensors: Iterable[Tensor], *, apart_from: Iterable[Tensor] = ()) -> int:
    """Memory behind the tensors, each piece counted once and those of `apart_from` not at all."""
    pieces = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    others = {tensor.untyped_storage()._cdata for tensor in apart_from}
    return sum(size for piece, size in pieces.items() if piece not in others)
