"""`medusa train`: an option for every field of `TrainConfig`, a table of the finished heads at the end."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from medusa_core.errors import ConfigError
from medusa_core.training.config import LossKind, TrainConfig

if TYPE_CHECKING:
    from medusa_core.training.trainer import TrainReport

DATA_PANEL = "Data"
HEADS_PANEL = "Heads"
OPTIMISER_PANEL = "Optimiser"
RUN_PANEL = "Run"

# The defaults' only home is TrainConfig; a dataclass with slots does not show them on the class.
DEFAULTS = TrainConfig(model="-", data=(Path("-"),), out=Path("-"))


def train(
    model: Annotated[str, typer.Option(help="Backbone: a directory or Hub name. It stays as it is.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="JSONL file (.gz too) of objects with `messages` or ShareGPT's `conversations`; repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for heads, report and checkpoints.")],
    num_heads: Annotated[
        int, typer.Option(min=1, help="Heads: how many tokens ahead.", rich_help_panel=HEADS_PANEL)
    ] = DEFAULTS.num_heads,
    num_layers: Annotated[
        int, typer.Option(min=1, help="Residual blocks of a head.", rich_help_panel=HEADS_PANEL)
    ] = DEFAULTS.num_layers,
    shared_output: Annotated[
        bool,
        typer.Option(
            "--shared-output",
            help="Heads use the backbone's output layer: a fraction of the size, and less accurate.",
            rich_help_panel=HEADS_PANEL,
        ),
    ] = DEFAULTS.shared_output,
    loss: Annotated[
        LossKind,
        typer.Option(
            help="teacher: the backbone's own distribution; hard: the data's tokens, as in the Medusa paper.",
            rich_help_panel=HEADS_PANEL,
        ),
    ] = DEFAULTS.loss,
    decay: Annotated[
        float, typer.Option(help="Head k's loss weighs decay^k.", rich_help_panel=HEADS_PANEL)
    ] = DEFAULTS.decay,
    sequence_length: Annotated[
        int, typer.Option(min=3, help="Tokens; longer dialogues are cut.", rich_help_panel=DATA_PANEL)
    ] = DEFAULTS.sequence_length,
    val_fraction: Annotated[
        float, typer.Option(help="Share of dialogues held out.", rich_help_panel=DATA_PANEL)
    ] = DEFAULTS.val_fraction,
    strict: Annotated[
        bool, typer.Option("--strict", help="A bad row ends the run.", rich_help_panel=DATA_PANEL)
    ] = DEFAULTS.strict,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="A built-in template or a Jinja file.",
            show_default="the model's",
            rich_help_panel=DATA_PANEL,
        ),
    ] = DEFAULTS.chat_template,
    epochs: Annotated[
        float, typer.Option(help="Passes over the data.", rich_help_panel=OPTIMISER_PANEL)
    ] = DEFAULTS.epochs,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps, instead of epochs.", show_default="all", rich_help_panel=OPTIMISER_PANEL
        ),
    ] = DEFAULTS.max_steps,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Dialogues at a time, per device.", rich_help_panel=OPTIMISER_PANEL)
    ] = DEFAULTS.batch_size,
    accumulation: Annotated[
        int, typer.Option(min=1, help="Batches to a step.", rich_help_panel=OPTIMISER_PANEL)
    ] = DEFAULTS.accumulation,
    learning_rate: Annotated[
        float, typer.Option(help="Highest; then a cosine to 0.", rich_help_panel=OPTIMISER_PANEL)
    ] = DEFAULTS.learning_rate,
    warmup: Annotated[
        float, typer.Option(help="Share of steps the rate rises over.", rich_help_panel=OPTIMISER_PANEL)
    ] = DEFAULTS.warmup,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's.", rich_help_panel=OPTIMISER_PANEL)
    ] = DEFAULTS.weight_decay,
    seed: Annotated[
        int, typer.Option(help="Of the held-out choice and the order.", rich_help_panel=RUN_PANEL)
    ] = DEFAULTS.seed,
    dtype: Annotated[
        str,
        typer.Option(
            help="What is multiplied and saved: auto, float32, bfloat16.", rich_help_panel=RUN_PANEL
        ),
    ] = DEFAULTS.dtype,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; several GPUs: torchrun.", rich_help_panel=RUN_PANEL)
    ] = DEFAULTS.device,
    save_steps: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=RUN_PANEL)
    ] = DEFAULTS.save_steps,
    log_steps: Annotated[
        int, typer.Option(min=1, help="Steps between losses.", rich_help_panel=RUN_PANEL)
    ] = DEFAULTS.log_steps,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=RUN_PANEL)
    ] = DEFAULTS.resume,
) -> None:
    """Train Medusa heads on a frozen backbone (Medusa-1)."""
    config = TrainConfig(
        model=model,
        data=tuple(data),
        out=out,
        num_heads=num_heads,
        num_layers=num_layers,
        shared_output=shared_output,
        loss=loss,
        decay=decay,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        sequence_length=sequence_length,
        val_fraction=val_fraction,
        strict=strict,
        seed=seed,
        dtype=dtype,
        device=device,
        chat_template=chat_template,
        save_steps=save_steps,
        log_steps=log_steps,
        resume=resume,
    )
    if find_spec("accelerate") is None:
        raise ConfigError('training needs accelerate: pip install "medusa-serve[train]"')
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun's number of this process
    if is_first:
        logging.getLogger("medusa_core").setLevel(logging.INFO)  # losses, where no progress bar shows them
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.training.trainer import train_heads

    report = train_heads(config)
    if is_first:
        _show(report, out)


def _show(report: "TrainReport", out: Path) -> None:
    console = Console()
    console.print(
        f"{report.steps} steps, {report.seconds:.0f} s, {report.tokens_per_second:.0f} tokens/s: {out}",
        highlight=False,
        soft_wrap=True,
    )
    if report.evaluation is None:
        return
    table = Table(title=f"held-out tokens: {report.evaluation.targets}")
    for name in ("head", "top-1 accuracy", "cross-entropy"):
        table.add_column(name, justify="right")
    rows = zip(report.evaluation.accuracy, report.evaluation.loss, strict=True)
    for head, (accuracy, loss) in enumerate(rows, start=1):
        table.add_row(str(head), f"{accuracy:.3f}", f"{loss:.3f}")
    console.print(table)
