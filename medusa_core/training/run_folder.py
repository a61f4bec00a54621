"""The folder a run writes to: what may be in it, which checkpoint to resume, what a failure leaves."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_core.checkpoints.weight_files import INDEX_SUFFIX, MODEL_FILES
from medusa_core.errors import ConfigError
from medusa_core.files import read_json, write_json
from medusa_core.training.config import TrainConfig

CHECKPOINTS_FOLDER = "checkpoints"
STAGE_ONE_FOLDER = "stage-1"
REPORT_FILE = "training.json"  # written last: a run is finished
RUN_FILE = "run.json"  # beside the checkpoints: the settings they belong to
# Another value of these would make the checkpoint meaningless: other weights, loss, or order of the data.
RESUMED_FIELDS = {
    *("model", "data", "chat_template", "sequence_length", "packing", "val_fraction", "batch_size"),
    *("accumulation", "recipe"),
    *("heads", "num_heads", "num_layers", "shared_output", "draft_vocab", "loss", "decay"),
    *("tune", "joint", "heads_weight", "self_distill", "lora_rank", "lora_alpha", "seed"),
}


@contextmanager
def cleaned_if_failed(out: Path, *, is_first: bool) -> Iterator[None]:
    """A run that ends in an error before there is anything to resume leaves the disk as it was.

    `is_first`: whether this process is the one that writes.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    before = set(out.rglob("*"))
    try:
        yield
    except BaseException:
        if is_first and not _is_resumable(out):
            for path in sorted(set(out.rglob("*")) - before, reverse=True):  # what is in a folder comes first
                _remove(path)
            for folder in created:
                _remove(folder)
        raise


def prepare_checkpoints(config: TrainConfig, *, is_first: bool) -> str | None:
    """The checkpoint to go on from, if any; refuses to mix two runs in one folder.

    Raises `ConfigError`, also if `config.out` cannot be written, and `CheckpointError` for a lost run file.
    """
    _check_out(config)
    folder = config.out / CHECKPOINTS_FOLDER
    newest = _newest_whole(folder)
    settings = {name: value for name, value in as_json(config).items() if name in RESUMED_FIELDS}
    if newest is not None:
        if not config.resume:
            raise ConfigError(f"{folder} holds an unfinished or earlier run: resume it, or remove the folder")
        before = read_json(folder / RUN_FILE)
        changed = sorted(name for name, value in settings.items() if before.get(name) != value)
        if changed:
            raise ConfigError(f"cannot resume {newest} with another {', '.join(changed)}")
    if is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN_FILE, settings)
        except OSError as error:
            raise ConfigError(f"cannot write to {config.out}: {error.strerror}") from error
    return None if newest is None else str(newest)


def _is_resumable(out: Path) -> bool:
    stage_one = out / STAGE_ONE_FOLDER
    has_checkpoint = any(_newest_whole(folder / CHECKPOINTS_FOLDER) for folder in (out, stage_one))
    return has_checkpoint or (stage_one / REPORT_FILE).exists()


def _remove(path: Path) -> None:
    with suppress(OSError):  # the error that ended the run says more than this one would
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def _check_out(config: TrainConfig) -> None:
    """The result must not replace another model's config.json or weights."""
    if config.out.resolve() == Path(config.model).expanduser().resolve():
        raise ConfigError(f"out {config.out} is the model's own folder: name another, or one inside it")
    names = [name + suffix for name in MODEL_FILES for suffix in ("", INDEX_SUFFIX)]
    if not config.is_joint and any((config.out / name).exists() for name in names):
        raise ConfigError(f"out {config.out} holds a whole model: name another folder, or one inside it")


def _newest_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: the Trainer writes its state last of all."""
    numbers = {
        path: int(path.name.rpartition("-")[2])
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal()
    }
    for path in sorted(numbers, key=numbers.__getitem__, reverse=True):
        try:
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            continue  # the run was killed while it wrote this one
        return path
    return None


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    values: dict[str, Any] = asdict(config)
    values["data"] = [str(source) for source in config.data]
    values["out"] = str(config.out)
    return values
