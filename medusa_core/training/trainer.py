"""`train_heads`: one run from files to finished heads, on transformers' Trainer.

CPU, GPU and several GPUs (under torchrun) are the Trainer's business, as are checkpoints and resuming.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa_core.backbone import load_backbone
from medusa_core.checkpoints import save_heads
from medusa_core.errors import ConfigError
from medusa_core.heads.medusa import MedusaHeads
from medusa_core.loading import resolve_device, resolve_dtype
from medusa_core.tokenizer import load_chat_tokenizer
from medusa_core.training.config import TrainConfig
from medusa_core.training.data import Collator, Example, ExampleDataset, load_examples, split_examples
from medusa_core.training.evaluation import HeadEvaluation, evaluate_heads
from medusa_core.training.model import HeadTrainer
from medusa_core.training.progress import ProgressReport
from medusa_core.training.sampling import LengthGroupedSampler

REPORT_FILE = "training.json"
CHECKPOINTS_FOLDER = "checkpoints"
RUN_FILE = "run.json"  # beside the checkpoints: the settings they belong to
# Another value of these would make the checkpoint meaningless: other weights, or another order of the data.
RESUMED_FIELDS = {
    *("model", "data", "num_heads", "num_layers", "shared_output", "loss", "decay"),
    *("batch_size", "accumulation", "sequence_length", "val_fraction", "seed"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a run did. `seconds`, `tokens` (without padding) and their rate are this process and session's.

    `losses`: (step, training loss) as logged. `evaluation` is None where nothing was held out, and in
    processes other than the first.
    """

    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    losses: tuple[tuple[int, float], ...]
    evaluation: HeadEvaluation | None


class HeadTrainingArguments(TrainingArguments):
    """Never torch's DataParallel, which cannot replicate a backbone that is no submodule; torchrun can."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class LengthGroupingTrainer(Trainer):
    """Batches of dialogues of similar length, in an order that a resumed run repeats."""

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, ExampleDataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(dataset.lengths, size, self.args.seed)


def train_heads(config: TrainConfig, console: Console | None = None) -> TrainReport:
    """Train new Medusa heads and write them to `config.out` with training.json; only process 0 writes.

    Progress is shown on `console` (default: standard error) if it is a terminal, else logged. Raises
    `ConfigError`, `DataError`, `CheckpointError` or `TokenizerError`.
    """
    arguments = _training_arguments(config)
    checkpoint = _prepare_checkpoints(config, arguments)
    model, examples = _load(config, arguments.device)
    training, held_out = split_examples(examples, config.val_fraction, config.seed)
    log.info("%d dialogues to train on, %d held out", len(training), len(held_out))
    collator = Collator()
    progress = ProgressReport(console or Console(stderr=True))
    trainer = LengthGroupingTrainer(
        model=model,
        args=arguments,
        train_dataset=ExampleDataset(training),
        data_collator=collator,
        callbacks=[progress],
    )
    for callback in (ProgressCallback, PrinterCallback):  # ours replaces both
        trainer.remove_callback(callback)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.stop()
    seconds = time.monotonic() - started
    is_first = trainer.is_world_process_zero()
    report = TrainReport(
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=collator.tokens,
        tokens_per_second=collator.tokens / seconds,
        losses=tuple((int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row),
        evaluation=evaluate_heads(model, held_out, config.batch_size) if is_first else None,
    )
    if is_first:
        _save(config, model, report)
    return report


def _training_arguments(config: TrainConfig) -> HeadTrainingArguments:
    is_cpu = resolve_device(config.device).type == "cpu"
    return HeadTrainingArguments(
        output_dir=str(config.out / CHECKPOINTS_FOLDER),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,  # below 1: a fraction of all steps
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )


def _prepare_checkpoints(config: TrainConfig, arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if any; refuses to mix two runs in one folder. Raises `ConfigError`."""
    folder = config.out / CHECKPOINTS_FOLDER
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    settings = {name: value for name, value in _as_json(config).items() if name in RESUMED_FIELDS}
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


def _load(config: TrainConfig, device: torch.device) -> tuple[HeadTrainer, list[Example]]:
    chat = load_chat_tokenizer(config.model, config.chat_template)
    dtype = resolve_dtype(config.dtype, device, config.model)
    if dtype == torch.float16:  # "auto" on a float16 checkpoint; gradients would underflow
        dtype = torch.bfloat16
    backbone = load_backbone(config.model, dtype=dtype, device=device, vocab_size=chat.vocab_size)
    examples = load_examples(config.data, chat, sequence_length=config.sequence_length, strict=config.strict)
    heads = MedusaHeads.new(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        lm_head_weight=backbone.lm_head_weight.float(),
        shared=config.shared_output,
    )
    return HeadTrainer(backbone, heads, loss=config.loss, decay=config.decay), examples


def _save(config: TrainConfig, model: HeadTrainer, report: TrainReport) -> None:
    save_heads(model.heads.to(model.backbone.dtype), config.out, base_model=config.model)
    content = {"config": _as_json(config), "report": asdict(report)}
    (config.out / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    values: dict[str, Any] = asdict(config)
    values["data"] = [str(path) for path in config.data]
    values["out"] = str(config.out)
    return values
