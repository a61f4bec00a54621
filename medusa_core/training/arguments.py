"""Builds transformers' `TrainingArguments` from our settings."""

from importlib.util import find_spec

from transformers import TrainingArguments

from medusa_core.errors import ConfigError
from medusa_core.loading.devices import resolve_device
from medusa_core.training.config import TrainConfig
from medusa_core.training.run_folder import CHECKPOINTS_FOLDER


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
