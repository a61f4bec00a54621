"""Subclass of transformers' Trainer with our data order, learning rates and checkpoints."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medusa_core.training.batches import ExampleDataset
from medusa_core.training.joint import JointModule
from medusa_core.training.sampler import LengthGroupedSampler

HEADS_PREFIX = "heads."


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

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._model.progress = state.global_step / max(1, state.max_steps)
