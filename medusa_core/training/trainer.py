"""Runs one training: data, heads, transformers' Trainer, result.

CPU, GPU and several GPUs (under torchrun or accelerate) are the Trainer's business, as are checkpoints and
resuming. A two-stage run of medusa-2 is two runs in a row: heads alone in OUT/stage-1, then both in OUT.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, set_seed

from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import DataError
from medusa_core.status_bar import StatusBar
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from medusa_core.training.adapters import prepare
from medusa_core.training.batches import Collator, ExampleDataset
from medusa_core.training.builders import build_backbone, build_heads, build_trainer_module, peak_bytes
from medusa_core.training.config import JointMode, Recipe, TrainConfig
from medusa_core.training.data import Example, load_examples, split_examples
from medusa_core.training.evaluation import evaluate_backbone, evaluate_heads
from medusa_core.training.hf_trainer import (
    HeadsTrainer,
    HeadTrainingArguments,
    ProgressReport,
    RampCallback,
    training_arguments,
)
from medusa_core.training.joint import JointModule
from medusa_core.training.module import HeadModule
from medusa_core.training.report import TrainReport, save_result
from medusa_core.training.run_folder import (
    REPORT_FILE,
    STAGE_ONE_FOLDER,
    cleaned_if_failed,
    prepare_checkpoints,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Task:
    """Tokenizer, dialogues and console of a run."""

    chat: ChatTokenizer
    training: list[Example]
    held_out: list[Example]
    console: Console


def train_heads(config: TrainConfig, console: Console | None = None) -> TrainReport:
    """Train draft heads and write them to `config.out` with training.json; only process 0 writes.

    Recipe medusa-2 writes the changed backbone there too, heads inside (format C). A run that fails with
    nothing to resume leaves no new files. Progress is shown on
    `console` (default: standard error) if it is a terminal, else logged. Raises `ConfigError`, `DataError`,
    `CheckpointError` or `TokenizerError`.
    """
    arguments = training_arguments(config)  # first: it says in one line what cannot be
    with cleaned_if_failed(config.out, is_first=arguments.process_index == 0):
        return _train(config, arguments, console or Console(stderr=True))


def _train(config: TrainConfig, arguments: HeadTrainingArguments, console: Console) -> TrainReport:
    checkpoint = prepare_checkpoints(config, is_first=arguments.process_index == 0)
    chat = load_chat_tokenizer(config.model, config.chat_template)
    examples = load_examples(config.data, chat, sequence_length=config.sequence_length, strict=config.strict)
    training, held_out = split_examples(examples, config.val_fraction, config.seed)
    logger.info("%d dialogues to train on, %d held out", len(training), len(held_out))
    task = _Task(chat, training, held_out, console)
    if config.is_joint and config.joint == JointMode.TWO_STAGE and config.heads is None:
        second = _train_stage_one(config, task)
        return _run(second, task, training_arguments(second), checkpoint, recorded=config)
    return _run(config, task, arguments, checkpoint, recorded=config)


def _train_stage_one(config: TrainConfig, task: _Task) -> TrainConfig:
    """Train the heads alone, unless that is done already. Returns the configuration of stage two."""
    folder = config.out / STAGE_ONE_FOLDER
    share = config.stage_one
    steps = None if config.max_steps is None else max(1, round(config.max_steps * share))
    stage = replace(
        config,
        recipe=Recipe.MEDUSA_1,
        out=folder,
        learning_rate=config.learning_rate * config.heads_rate,
        epochs=config.epochs * share,
        max_steps=steps,
        self_distill=False,
        gradient_checkpointing=False,
    )
    arguments = training_arguments(stage)
    checkpoint = prepare_checkpoints(
        stage, is_first=arguments.process_index == 0
    )  # checks that a finished stage had these settings
    if not (config.resume and (folder / REPORT_FILE).exists()):
        logger.info("stage 1: heads alone")
        _run(stage, task, arguments, checkpoint, recorded=stage)
    logger.info("stage 2: heads and backbone")
    return replace(
        config,
        heads=str(folder),
        epochs=config.epochs * (1 - share),
        max_steps=None if config.max_steps is None or steps is None else config.max_steps - steps,
    )


def _run(
    config: TrainConfig,
    task: _Task,
    arguments: HeadTrainingArguments,
    checkpoint: str | None,
    *,
    recorded: TrainConfig,
) -> TrainReport:
    """Train, evaluate and save; `recorded` is the configuration as the user gave it."""
    set_seed(config.seed)  # fresh weights are drawn before the Trainer seeds what follows
    backbone = build_backbone(config, arguments.device, task.chat.vocab_size)
    heads = build_heads(config, backbone, task.training)
    tuned = prepare(backbone.model, config) if config.is_joint else None
    model = build_trainer_module(config, backbone, heads, tuned)
    is_first = arguments.process_index == 0
    if isinstance(heads, MedusaHeads) and not config.is_joint:
        logger.info("memory: about %.1f GiB at the peak", peak_bytes(config, backbone, heads) / 2**30)
    before = _backbone_loss(model, task.held_out, config) if is_first else None
    collator = Collator()
    bar = StatusBar(task.console if is_first else Console(quiet=True, force_terminal=False), "training heads")
    trainer = _build_trainer(config, task, arguments, model, collator)
    trainer.add_callback(ProgressReport(bar))
    started = time.monotonic()
    with bar, _writing_to(config.out):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    report = TrainReport(
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=collator.tokens,
        tokens_per_second=collator.tokens / seconds,
        losses=tuple((int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row),
        evaluation=evaluate_heads(model, task.held_out, config.batch_size) if is_first else None,
        backbone_before=before,
        backbone_after=_backbone_loss(model, task.held_out, config) if is_first else None,
    )
    if is_first:
        with _writing_to(config.out):
            save_result(recorded, model, tuned, task.chat, report)
    trainer.accelerator.wait_for_everyone()  # a second stage reads what the first process wrote
    return report


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Turn errors of writing, such as a full disk, into `DataError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write to {out}: {error}") from error


def _build_trainer(
    config: TrainConfig, task: _Task, arguments: HeadTrainingArguments, model: HeadModule, collator: Collator
) -> HeadsTrainer:
    trainer = HeadsTrainer(
        model=model,
        args=arguments,
        train_dataset=ExampleDataset(
            task.training, pack_to=config.sequence_length if config.packing else None
        ),
        data_collator=collator,
        callbacks=[RampCallback(model)] if isinstance(model, JointModule) else [],
        heads_rate=config.heads_rate if config.is_joint else 1.0,
    )
    for callback in (ProgressCallback, PrinterCallback):  # ours replaces both
        trainer.remove_callback(callback)
    return trainer


def _backbone_loss(model: HeadModule, held_out: Sequence[Example], config: TrainConfig) -> float | None:
    """The held-out loss of a backbone that is trained too; None of a frozen one."""
    if not isinstance(model, JointModule):
        return None
    return evaluate_backbone(model, held_out, config.batch_size)
