"""Loads the parts of an engine from names and settings: backbone, tokenizer, heads, calibration."""

import logging
from dataclasses import dataclass
from pathlib import Path

from medusa_core.checkpoints.weight_files import describe_files
from medusa_core.config import EngineConfig
from medusa_core.draft.accuracy import HeadCalibration, default_calibration
from medusa_core.draft.heads import DraftHeads
from medusa_core.loading.cpu_dtype import TREE_ROWS
from medusa_core.loading.devices import resolve_device, resolve_dtype
from medusa_core.loading.heads import heads_source, load_calibration_for, load_heads_for
from medusa_core.loading.memory import check_memory
from medusa_core.loading.progress import LoadProgress, OnStage
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything an `Engine` needs. `calibration` None: the heads were never calibrated."""

    backbone: Backbone
    chat: ChatTokenizer
    heads: DraftHeads | None
    calibration: HeadCalibration | None
    model_name: str
    heads_name: str | None


def load_parts(
    model: str | Path,
    heads: str | Path | None,
    config: EngineConfig,
    *,
    calibrated: bool = True,
    on_stage: OnStage | None = None,
) -> EngineParts:
    """Load all parts. `heads`: a directory, a file, a Hub name, or the name of a folder beside the model.

    None takes the best set beside the model, "none" means no heads. `calibrated` False ignores their
    calibration.json. `on_stage` is called with each step of loading. Raises `ConfigError` before anything
    large is loaded if it does not fit the memory.
    """
    progress = LoadProgress(on_stage)
    device = resolve_device(config.device)
    progress.enter(f"tokenizer of {model}")
    chat = load_chat_tokenizer(model, config.chat_template)
    source = heads_source(model, heads)
    dtype = resolve_dtype(config.dtype, device, model, rows=1 if source is None else TREE_ROWS)
    if config.memory_check:
        with progress.downloading(source or model):
            check_memory(model, source, config, vocab_size=chat.vocab_size, dtype=dtype, device=device)
    kind = str(dtype).removeprefix("torch.")
    progress.enter(f"weights of {model}: {describe_files(model)}, as {kind} on {device}")
    with progress.downloading(model), progress.counting_weights():
        backbone = load_backbone(model, dtype=dtype, device=device, vocab_size=chat.vocab_size)
    if source is None:
        return EngineParts(backbone, chat, None, None, str(model), None)
    progress.enter(f"draft heads from {source}")
    with progress.downloading(source):
        loaded = load_heads_for(
            backbone.model, source, vocab_size=backbone.vocab_size, dtype=dtype, device=backbone.device
        )
    calibration = load_calibration_for(loaded, source) if calibrated else None
    return EngineParts(backbone, chat, loaded, calibration, str(model), str(source))


def calibration_or_default(calibration: HeadCalibration | None, heads: DraftHeads) -> HeadCalibration:
    """The heads' own calibration, or published accuracies with a warning in the log."""
    if calibration is not None:
        return calibration
    logger.warning("the draft heads are not calibrated; `medusa calibrate` finds a better tree for them")
    return default_calibration(heads.num_heads)
