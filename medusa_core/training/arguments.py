"""From our settings to transformers' TrainingArguments, and which checkpoint a run goes on from."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa_core.errors import ConfigError
from medusa_core.loading import resolve_device
from medusa_core.training.config import TrainConfig

CHECKPOINTS_FOLDER = "checkpoints"
RUN_FILE = "run.json"  # beside the checkpoints: the settings they belong to
# Another value of these would make the checkpoint meaningless: other weights, loss, or order of the data.
RESUMED_FIELDS = {
    *("model", "data", "recipe", "sequence_length", "packing", "val_fraction", "batch_size", "accumulation"),
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
    """The checkpoint to go on from, if any; refuses to mix two runs in one folder. Raises `ConfigError`."""
    folder = config.out / CHECKPOINTS_FOLDER
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    settings = {name: value for name, value in as_json(config).items() if name in RESUMED_FIELDS}
    if newest is not None:
        if not config.resume:
            raise ConfigError(f"{folder} holds an unfinished or earlier run: resume it, or remove the folder")
        before = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        changed = sorted(name for name, value in settings.items() if before.get(name) != value)
        if changed:
            raise ConfigError(f"cannot resume {newest} with another {', '.join(changed)}")
    if arguments.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return newest


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    values: dict[str, Any] = asdict(config)
    values["data"] = [str(source) for source in config.data]
    values["out"] = str(config.out)
    return values
