"""From names and settings to the parts an engine is made of: backbone, tokenizer, heads, calibration."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from medusa_core.checkpoints import describe_files, fetch_beside, find_heads, load_heads
from medusa_core.config import DEFAULT_CONTEXT_LIMIT, EngineConfig
from medusa_core.draft.accuracy import FILE_NAME as CALIBRATION_FILE
from medusa_core.draft.accuracy import HeadCalibration, default_calibration, load_calibration
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.tree import Tree, load_tree
from medusa_core.draft.tree_size import scratch_rows
from medusa_core.errors import CheckpointError, ConfigError
from medusa_core.loading.devices import free_memory, unused_gpu
from medusa_core.loading.memory import check_fits, gib, memory_need
from medusa_core.loading.meta_model import outline_backbone, outline_heads
from medusa_core.loading.progress import OnStage, Stages
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer

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
    model: str | Path,
    heads: str | Path | None,
    config: EngineConfig,
    *,
    calibrated: bool = True,
    on_stage: OnStage | None = None,
) -> EngineParts:
    """Load all parts. `heads`: a directory, a file, a Hub name, or the name of a folder beside the model.

    None takes the best set beside the model, "none" means no heads. `calibrated` False leaves out what is
    known about them, to find it anew. `on_stage` is told what is done next. Raises `ConfigError` before
    anything large is loaded if memory does not hold it.
    """
    stages = Stages(on_stage)
    device = resolve_device(config.device)
    stages.enter(f"tokenizer of {model}")
    chat = load_chat_tokenizer(model, config.chat_template)
    dtype = resolve_dtype(config.dtype, device, model)
    source = heads_source(model, heads)
    if config.memory_check:
        with stages.downloading(source or model):
            check_memory(model, source, config, vocab_size=chat.vocab_size, dtype=dtype, device=device)
    kind = str(dtype).removeprefix("torch.")
    stages.enter(f"weights of {model}: {describe_files(model)}, as {kind} on {device}")
    with stages.downloading(model), stages.counting_weights():
        backbone = load_backbone(model, dtype=dtype, device=device, vocab_size=chat.vocab_size)
    if source is None:
        return EngineParts(backbone, chat, None, None, str(model), None)
    stages.enter(f"draft heads from {source}")
    with stages.downloading(source):
        loaded = _load_heads(source, backbone)
    calibration = _calibration_beside(source) if calibrated else None
    if calibration is not None and calibration.num_heads != loaded.num_heads:
        raise CheckpointError(
            f"{source}: calibration.json is for {calibration.num_heads} heads, the file holds "
            f"{loaded.num_heads}: run `medusa calibrate` again"
        )
    return EngineParts(backbone, chat, loaded, calibration, str(model), str(source))


def _load_heads(source: str | Path, backbone: Backbone) -> MedusaHeads | HydraHeads:
    return load_heads(
        source,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        # All rows, padding included: published heads are often padded like their backbone.
        lm_head_weight=backbone.model.get_output_embeddings().weight,
        embed=backbone.embed,
        backbone_config=backbone.config,
        dtype=backbone.dtype,
        device=backbone.device,
    )


def check_memory(
    model: str | Path,
    heads: str | Path | None,
    config: EngineConfig,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise a `ConfigError` if the free memory holds no such engine; what cannot be known is let through."""
    backbone = outline_backbone(model, dtype)
    free = free_memory(device)
    if backbone is None or free is None:
        logger.info("whether it fits the memory of %s is not known beforehand", device)
        return
    outline = None
    if heads is not None:
        outline = outline_heads(heads, backbone, vocab_size=vocab_size, dtype=dtype)
    drafted_by = outline.heads if outline is not None else None
    static_tree = load_static_tree(config.static_tree, drafted_by)
    need = memory_need(
        backbone,
        outline,
        config,
        context=resolve_context_length(config.max_length, backbone.max_positions),
        scratch=scratch_rows(drafted_by, static_tree, config.tree_nodes),
        device=device,
    )
    logger.info("%s GiB of memory needed on %s (%s), %s free", gib(need.total), device, need, gib(free))
    check_fits(need, free, device, dtype)


def load_static_tree(name_or_file: str | None, heads: DraftHeads | None) -> Tree | None:
    """The tree that "static" means, if one is named. Raises `TreeError`, or `ConfigError` without heads."""
    if name_or_file is None:
        return None
    if heads is None:
        raise ConfigError(f"static_tree {name_or_file!r} is set, but there are no draft heads to fill it")
    return load_tree(name_or_file)


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
        _warn_of_unused(is_one_of_several=bool(index))
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


def _warn_of_unused(*, is_one_of_several: bool) -> None:
    """GPUs that choosing a device by itself leaves idle."""
    reason = unused_gpu()
    if reason is not None:
        logger.warning("there seems to be an NVIDIA GPU, but everything runs on the CPU: %s", reason)
    count = torch.cuda.device_count()
    if count > 1 and not is_one_of_several:
        logger.warning("only one of %d CUDA devices is used; MEDUSA_WORKERS=%d uses them all", count, count)


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
