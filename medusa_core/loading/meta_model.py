"""Meta-device models for sizing: backbone and heads with shapes but no memory, before a weight is read.

Built by the code that loads the real ones, from configs and file headers alone, so sizes are exact.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import CheckpointError
from medusa_core.loading.heads import load_heads_for
from medusa_core.model.backbone import LOADING_FAILURES, max_positions, probe_cache_shape, quiet_transformers
from medusa_core.model.kv_cache import CacheShape

logger = logging.getLogger(__name__)

META = torch.device("meta")

MetaHeads = MedusaHeads | HydraHeads  # on the meta device


@dataclass(frozen=True, slots=True)
class MetaBackbone:
    """A backbone on the meta device. `weight_bytes`: of its weights once loaded, shared ones counted once."""

    model: PreTrainedModel
    weight_bytes: int
    cache_shape: CacheShape
    max_positions: int

    @property
    def output_rows(self) -> int:
        """Rows of the output layer, padding included."""
        return len(self.model.get_output_embeddings().weight)


def build_meta_backbone(model: str | Path, dtype: torch.dtype) -> MetaBackbone | None:
    """The backbone its config describes; None, noted in the log, if the config does not determine its size.

    Errors in the model are left to loading it.
    """
    path = Path(model).expanduser()
    try:
        with quiet_transformers(), torch.inference_mode():
            config = AutoConfig.from_pretrained(
                str(path if path.is_dir() else model), trust_remote_code=False
            )
            if getattr(config, "quantization_config", None) is not None:
                logger.info(
                    "the size of the quantized weights of %s is not known before they are loaded", model
                )
                return None
            with META:
                built = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            return MetaBackbone(
                built.eval(),
                held_bytes((*built.parameters(), *built.buffers())),
                probe_cache_shape(built),
                max_positions(built.config.get_text_config()),
            )
    except (CheckpointError, *LOADING_FAILURES) as error:
        logger.info("the size of %s is not known before it is loaded: %s", model, type(error).__name__)
        logger.debug("no meta model of %s", model, exc_info=True)
        return None


def build_meta_heads(
    source: str | Path, backbone: MetaBackbone, *, vocab_size: int, dtype: torch.dtype
) -> MetaHeads:
    """The heads their files describe. Raises `CheckpointError` where loading them would."""
    rows = min(vocab_size, backbone.output_rows)
    return load_heads_for(backbone.model, source, vocab_size=rows, dtype=dtype, device=META)


def held_bytes(tensors: Iterable[Tensor], *, apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors' storages, each counted once and those of `apart_from` not at all."""
    pieces = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    others = {tensor.untyped_storage()._cdata for tensor in apart_from}
    return sum(size for piece, size in pieces.items() if piece not in others)
