"""From our settings to transformers' TrainingArguments, and which checkpoint a run goes on from."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_core.checkpoints.weight_files import INDEX_SUFFIX, MODEL_FILES, read_json
from medusa_core.checkpoints.writing import write_json
from medusa_core.errors import ConfigError
from medusa_core.loading.devices import resolve_device
from medusa_core.training.config import TrainConfig

CHECKPOINTS_FOLDER = "checkpoints"
RUN_FILE = "run.json"  # beside the checkpoints: the settings they belong to
# Another value of these would make the checkpoint meaningless: other weights, loss, or order of the data.
RESUMED_FIELDS = {
    *("model", "data", "chat_template", "sequence_length", "packing", "val_fraction", "batch_size"),
    *("accumulation", "recipe"),
    *("heads", "num_heads", "num_layers", "shared_output", "draft_vocab", "loss", "decay"),
    *("tune", "joint", "heads_weight", "self_distill", "lora_rank", "lora_alpha", "seed"),
}


class HeadTrainingArguments(TrainingArguments):
    """Never torch's DataParallel, which cannot replicate a backbone that is no submodule; torchrun can."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def training_arguments(config: TrainConfig) -> HeadTrainingArguments:
    """The Trainer's settings. Raises `ConfigError` if TensorBoard is asked for and not installed."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError('tensorboard is not installed: pip install "medusa-serve[tensorboard]"')
    is_cpu = resolve_device(config.device).type == "cpu"
    return HeadTrainingArguments(
        output_dir=str(config.out / CHECKPOINTS_FOLDER),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.final_rate},
        warmup_steps=config.warmup,  # below 1: a fraction of all steps
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to="tensorboard" if config.tensorboard else "none",
        disable_tqdm=True,
    )


def prepare_checkpoints(config: TrainConfig, arguments: TrainingArguments) -> str | None:
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
    if arguments.process_index == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN_FILE, settings)
        except OSError as error:
            raise ConfigError(f"cannot write to {config.out}: {error.strerror}") from error
    return None if newest is None else str(newest)


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
