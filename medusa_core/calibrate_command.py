"""`medusa calibrate`: options in, a table and `calibration.json` beside the heads out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medusa_core import command_options as options
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from medusa_core.accuracy import HeadCalibration

SHOWN_RANKS = 4


def calibrate(
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file (.gz too) of objects with `messages`, like the real traffic.",
            show_default="24 short dialogue openings",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most so many prompts.")] = 100,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 128,
    temperatures: Annotated[
        str, typer.Option(help="Where, beside 0, the heads' confidence is calibrated; comma separated.")
    ] = "0.3,0.7,1.0",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled answers.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for calibration.json.", show_default="beside the heads"),
    ] = None,
    model: options.ModelOption = str(EMBEDDED_MODEL),
    heads: options.HeadsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    max_length: options.MaxLengthOption = None,
    chat_template: options.ChatTemplateOption = None,
) -> None:
    """Measure the draft heads: accuracies, confidence, and the tree that is fastest on this machine."""
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from rich.console import Console

    from medusa_core.accuracy import save_calibration
    from medusa_core.calibration.calibrate import CalibrationSettings, destination
    from medusa_core.calibration.calibrate import calibrate as run
    from medusa_core.prompts import DEFAULT_PROMPTS, load_prompts

    settings = CalibrationSettings(
        max_tokens=max_tokens, temperatures=_parse_temperatures(temperatures), seed=seed
    )
    conversations = load_prompts(prompts or DEFAULT_PROMPTS, limit)
    config = EngineConfig(dtype=dtype, device=device, max_length=max_length, chat_template=chat_template)
    engine = options.load_engine(model, heads, config)
    target = destination(engine.info.heads, out)
    with Console(stderr=True).status("calibrating") as status:
        result = run(engine, conversations, settings, lambda text: status.update(text))
    path = save_calibration(result, target)
    console = Console()
    console.print(accuracy_table(result))
    console.print(size_table(result))
    console.print(f"fastest here: {result.tree_nodes} nodes. Written to {path}", highlight=False)


def accuracy_table(calibration: "HeadCalibration") -> "Table":
    """Hit rate per head and rank with the 95 % interval of rank 1."""
    from rich.table import Table

    from medusa_core.accuracy import wilson_interval

    table = Table(title="Head accuracy (share of positions at which the guess was the model's token)")
    for name in ("head", *(f"rank {r + 1}" for r in range(SHOWN_RANKS)), "95 % (rank 1)", "positions"):
        table.add_column(name, justify="right")
    for head, (row, count) in enumerate(
        zip(calibration.accuracies, calibration.counts, strict=True), start=1
    ):
        low, high = wilson_interval(row[0], count)
        table.add_row(
            str(head), *(f"{x:.3f}" for x in row[:SHOWN_RANKS]), f"{low:.3f}-{high:.3f}", str(count)
        )
    return table


def size_table(calibration: "HeadCalibration") -> "Table":
    """Expected acceptance length and tokens per second by tree size."""
    from rich.table import Table

    table = Table(title="Draft trees (expected, greedy)")
    for name in ("nodes", "static tokens/step", "dynamic tokens/step", "step ms", "tokens/s", "speedup"):
        table.add_column(name, justify="right")
    static, dynamic = calibration.expected["static"], calibration.expected["dynamic"]
    baseline = calibration.step_seconds.get(1)
    for nodes in sorted(dynamic):
        seconds = calibration.step_seconds.get(nodes)
        rates = ("-", "-", "-")
        if seconds and baseline:
            rate = dynamic[nodes] / seconds
            rates = (f"{1e3 * seconds:.2f}", f"{rate:.0f}", f"{rate * baseline:.2f}")
        table.add_row(str(nodes), f"{static[nodes]:.2f}", f"{dynamic[nodes]:.2f}", *rates)
    return table


def _parse_temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"temperatures must be numbers separated by commas, not {text!r}") from error
