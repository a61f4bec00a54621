"""transformers' Trainer with our settings, data order, learning rates, checkpoints and progress."""

import logging
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from medusa_core.errors import ConfigError
from medusa_core.loading.devices import resolve_device
from medusa_core.status_bar import StatusBar
from medusa_core.training.batches import ExampleDataset
from medusa_core.training.config import TrainConfig
from medusa_core.training.joint import JointModule
from medusa_core.training.run_folder import CHECKPOINTS_FOLDER

HEADS_PREFIX = "heads."
POOL_BATCHES = 64

logger = logging.getLogger(__name__)


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


class HeadsTrainer(Trainer):
    """Batches of rows of similar length, in an order that a resumed run repeats.

    Parameters under `heads.` learn at `heads_rate` times the learning rate. Checkpoints hold what learns and
    nothing else.
    """

    def __init__(self, *, heads_rate: float = 1.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._heads_rate = heads_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the heads' own rate; biases and norms do not decay, as in transformers."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = kind(self._groups(module), **arguments)
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decaying = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_head = name.removeprefix("module.").startswith(HEADS_PREFIX)
                groups.setdefault((is_head, name in decaying), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.args.learning_rate * (self._heads_rate if is_head else 1.0),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ]

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, ExampleDataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(dataset.lengths, size, self.args.seed)

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """Take no step in a run that is finished already: the Trainer checks only after the first."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*positional, **named)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None:
            state_dict = {name: parameter.detach() for name, parameter in _learning(self.model).items()}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """No warning about missing keys of weights that are not trained."""
        missing = _learning(self.model).keys() & set(load_result.missing_keys)
        assert not missing, missing
        assert not load_result.unexpected_keys, load_result.unexpected_keys


def _learning(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class RampCallback(TrainerCallback):
    """Sets the training progress on which a joint run's loss weight may depend."""

    def __init__(self, model: JointModule) -> None:
        self._model = model

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._model.progress = state.global_step / max(1, state.max_steps)


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then groups dialogues of similar length into batches, so that little of a batch is padding.

    Each epoch's order depends on the seed and the epoch's number alone: a resumed run continues it exactly,
    which transformers' own sampler of this kind, drawing from the global generator, does not.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        pool_size, size = self._batch_size * POOL_BATCHES, self._batch_size
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=self._lengths.__getitem__)
            batches = [pool[i : i + size] for i in range(0, len(pool), size)]
            # A batch that is not full stays last: elsewhere it would shift those behind it.
            full = len(pool) // size
            for batch in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
                yield from batches[batch]


class ProgressReport(TrainerCallback):
    """Shows steps, loss and time left; logs the loss every `logging_steps` where there is no terminal."""

    def __init__(self, bar: StatusBar) -> None:
        self._bar = bar
        self._started = (0, 0.0)  # step and time

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._started = (state.global_step, time.monotonic())
        self._bar.show(total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar.show(completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" not in logs or not state.is_world_process_zero:
            return
        step, since = self._started
        rate = (state.global_step - step) / max(time.monotonic() - since, 1e-9)
        status = f"loss {logs['loss']:.4f} · {rate:.2f} steps/s"
        self._bar.show(status=status)
        if self._bar.disable:
            logger.info("step %d of %d · %s", state.global_step, state.max_steps, status)
