"""`medusa train`: one run from a YAML file or flags, a table of the finished heads at the end."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from medusa_core.cli.train_options import options_signature
from medusa_core.errors import ConfigError
from medusa_core.training.recipes import resolve_config

if TYPE_CHECKING:
    from medusa_core.training.report import TrainReport

FileOption = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of these settings (words joined by _); flags win over it."),
]


def train(config: Path | None = None, **flags: Any) -> None:
    """Train draft heads for a model: Medusa-1, Medusa-2, Hydra or Hydra++."""
    settings = resolve_config(flags, config)
    if find_spec("accelerate") is None:
        raise ConfigError('training needs accelerate: pip install "medusa-serve[train]"')
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun's number of this process
    if is_first:
        logging.getLogger("medusa_core").setLevel(logging.INFO)  # losses, where no progress bar shows them
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.training.trainer import train_heads

    report = train_heads(settings)
    if is_first:
        _show(report, settings.out)


# What typer reads the options from: one for each field of TrainConfig.
train.__signature__ = options_signature({"config": FileOption})  # type: ignore[attr-defined]
train.__annotations__ = {"return": None}


def _show(report: "TrainReport", out: Path) -> None:
    console = Console()
    console.print(
        f"{report.steps} steps, {report.seconds:.0f} s, {report.tokens_per_second:.0f} tokens/s: {out}",
        highlight=False,
        soft_wrap=True,
    )
    if report.backbone_before is not None and report.backbone_after is not None:
        console.print(
            f"backbone, nats per held-out assistant token: {report.backbone_before:.4f} before, "
            f"{report.backbone_after:.4f} after",
            highlight=False,
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
