"""Draft heads of an engine: where they are, loaded to fit a backbone, and their calibration."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from medusa_core.checkpoints.head_files import fetch_beside, find_heads
from medusa_core.checkpoints.reading import load_heads
from medusa_core.draft.accuracy import FILE_NAME as CALIBRATION_FILE
from medusa_core.draft.accuracy import HeadCalibration, load_calibration
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.tree import Tree, load_tree
from medusa_core.errors import CheckpointError, ConfigError

NO_HEADS = "none"


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


def load_heads_for(
    model: PreTrainedModel, source: str | Path, *, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> MedusaHeads | HydraHeads:
    """Heads that fit the backbone `model`, on the meta device too. Raises `CheckpointError`."""
    config = model.config.get_text_config()
    return load_heads(
        source,
        hidden_size=int(config.hidden_size),
        vocab_size=vocab_size,
        # All rows, padding included: published heads are often padded like their backbone.
        lm_head_weight=model.get_output_embeddings().weight,
        embed=model.get_input_embeddings(),
        backbone_config=config,
        dtype=dtype,
        device=device,
    )


def load_calibration_for(heads: MedusaHeads | HydraHeads, source: str | Path) -> HeadCalibration | None:
    """From the heads' directory, that of a single weight file, or their Hub repository; None without one.

    Raises `CheckpointError` if it is for another number of heads.
    """
    path = fetch_beside(source, CALIBRATION_FILE)
    calibration = None if path is None else load_calibration(path.parent)
    if calibration is not None and calibration.num_heads != heads.num_heads:
        raise CheckpointError(
            f"{source}: calibration.json is for {calibration.num_heads} heads, the file holds "
            f"{heads.num_heads}: run `medusa calibrate` again"
        )
    return calibration


def load_static_tree(name_or_file: str | None, heads: DraftHeads | None) -> Tree | None:
    """The tree that "static" means, if one is named. Raises `TreeError`, or `ConfigError` without heads."""
    if name_or_file is None:
        return None
    if heads is None:
        raise ConfigError(f"static_tree {name_or_file!r} is set, but there are no draft heads to fill it")
    return load_tree(name_or_file)
