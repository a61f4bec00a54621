"""From names and settings to the parts an engine is made of: backbone, tokenizer, heads, calibration."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from medusa_core.accuracy import FILE_NAME as CALIBRATION_FILE
from medusa_core.accuracy import HeadCalibration, default_calibration, load_calibration
from medusa_core.backbone import Backbone, load_backbone
from medusa_core.checkpoints import fetch_beside, find_heads, load_heads
from medusa_core.config import DEFAULT_CONTEXT_LIMIT, EngineConfig
from medusa_core.errors import CheckpointError, ConfigError
from medusa_core.heads.base import DraftHeads
from medusa_core.speculation import SpeculatorFactory
from medusa_core.tokenizer import ChatTokenizer, load_chat_tokenizer
from medusa_core.tree import load_tree

logger = logging.getLogger(__name__)

NO_HEADS = "none"
NATIVE_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16 ")  # Linux /proc/cpuinfo; the last is ARM's


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
    model: str | Path, heads: str | Path | None, config: EngineConfig, *, calibrated: bool = True
) -> EngineParts:
    """Load all parts. `heads`: a directory, a file, a Hub name, or the name of a folder beside the model.

    None takes the best set beside the model, "none" means no heads. `calibrated` False leaves out what is
    known about them, to find it anew.
    """
    device = resolve_device(config.device)
    chat = load_chat_tokenizer(model, config.chat_template)
    dtype = resolve_dtype(config.dtype, device, model)
    backbone = load_backbone(model, dtype=dtype, device=device, vocab_size=chat.vocab_size)
    source = heads_source(model, heads)
    if source is None:
        return EngineParts(backbone, chat, None, None, str(model), None)
    loaded = load_heads(
        source,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        # All rows, padding included: published heads are often padded like their backbone.
        lm_head_weight=backbone.model.get_output_embeddings().weight,
        embed=backbone.embed,
        backbone_config=backbone.config,
        dtype=dtype,
        device=device,
    )
    calibration = _calibration_beside(source) if calibrated else None
    if calibration is not None and calibration.num_heads != loaded.num_heads:
        raise CheckpointError(
            f"{source}: calibration.json is for {calibration.num_heads} heads, the file holds "
            f"{loaded.num_heads}: run `medusa calibrate` again"
        )
    return EngineParts(backbone, chat, loaded, calibration, str(model), str(source))


def speculator_factory(parts: EngineParts, static_tree: str | None) -> SpeculatorFactory | None:
    """What turns requests into draft trees; None without heads. Raises `TreeError` or `ConfigError`."""
    if parts.heads is None:
        if static_tree is not None:
            raise ConfigError(f"static_tree {static_tree!r} is set, but there are no draft heads to fill it")
        return None
    return SpeculatorFactory(
        parts.heads,
        calibration_or_default(parts.calibration, parts.heads),
        parts.backbone.device,
        load_tree(static_tree) if static_tree is not None else None,
    )


def resolve_context_length(max_length: int | None, max_positions: int) -> int:
    """Tokens of prompt and answer together. Raises `ConfigError` beyond what the model has positions for."""
    if max_length is None:
        return min(max_positions, DEFAULT_CONTEXT_LIMIT)
    if max_length > max_positions:
        raise ConfigError(f"max_length {max_length} is beyond the model's {max_positions} positions")
    return max_length


def calibration_or_default(calibration: HeadCalibration | None, heads: DraftHeads) -> HeadCalibration:
    """The heads' own calibration, or published accuracies with a word in the log."""
    if calibration is not None:
        return calibration
    logger.warning("the draft heads are not calibrated; `medusa calibrate` finds a better tree for them")
    return default_calibration(heads.num_heads)


def resolve_device(name: str) -> torch.device:
    """A torch device; "auto" is CUDA if there is one, "auto:N" then CUDA device N."""
    kind, _, index = name.partition(":")
    if kind == "auto" and (index.isdecimal() or name == "auto"):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{index}" if index else "cuda"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name} was asked for, but this machine has no usable CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} was asked for, but there are only {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    return device


def resolve_dtype(name: str, device: torch.device, model: str | Path) -> torch.dtype:
    """A torch dtype; "auto" keeps the checkpoint's 16-bit type where the device multiplies it natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        stored = _stored_dtype(model)
        return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
    return torch.bfloat16 if cpu_has_native_bfloat16() else torch.float32


def cpu_has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 (the kernel knows; False where it does not say)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in NATIVE_BF16_FLAGS)


def _stored_dtype(model: str | Path) -> torch.dtype | None:
    try:
        dtype = AutoConfig.from_pretrained(str(model), trust_remote_code=False).dtype
    except (OSError, ValueError):
        return None  # loading the model reports what is wrong
    return dtype if isinstance(dtype, torch.dtype) else None


def _calibration_beside(heads: str | Path) -> HeadCalibration | None:
    """In the heads' directory, in that of a single weight file, or in their Hub repository."""
    path = fetch_beside(heads, CALIBRATION_FILE)
    return None if path is None else load_calibration(path.parent)


def heads_source(model: str | Path, heads: str | Path | None) -> str | Path | None:
    """Where to load heads from: as named, or the folder of that name beside a local model."""
    directory = Path(model).expanduser()
    if heads is None:
        return find_heads(directory) if directory.is_dir() else None
    if str(heads) == NO_HEADS:
        return None
    beside = directory / str(heads)
    is_name = len(Path(heads).parts) == 1 and not Path(heads).exists()
    return beside if is_name and beside.is_dir() else heads
