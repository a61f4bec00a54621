"""`medusa calibrate`: options in, a table and `calibration.json` beside the heads out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medusa_core.cli import options
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from medusa_core.draft.accuracy import HeadCalibration

SHOWN_RANKS = 4
RESULT_PANEL = "Result"


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
    plot: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for pictures (PNG, SVG): tree, accuracy by rank, speedup by tree size.",
            rich_help_panel=RESULT_PANEL,
        ),
    ] = None,
    plot_only: Annotated[
        bool,
        typer.Option(
            "--plot-only", help="Draw what calibration.json says already.", rich_help_panel=RESULT_PANEL
        ),
    ] = False,
    from_table: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Measure nothing: take accuracies from a table of the Medusa repository or a CSV with the "
            "columns head, top1, top2, ...",
            rich_help_panel=RESULT_PANEL,
        ),
    ] = None,
    table_run: Annotated[
        str | None,
        typer.Option(help="The row (Name) of a table of several runs.", rich_help_panel=RESULT_PANEL),
    ] = None,
    model: options.ModelOption = str(EMBEDDED_MODEL),
    heads: options.HeadsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    max_length: options.MaxLengthOption = None,
    chat_template: options.ChatTemplateOption = None,
) -> None:
    """Measure the draft heads: accuracies, confidence, and the tree that is fastest on this machine."""
    if plot_only and (plot is None or from_table is not None):
        raise ConfigError("--plot-only needs --plot, and no --from-table")
    if table_run is not None and from_table is None:
        raise ConfigError("--table-run needs --from-table")
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.calibration.plots import check_matplotlib
    from medusa_core.loading.heads import heads_source

    if plot is not None:
        check_matplotlib()
    if plot_only:
        result = _stored(model, heads, out)
    elif from_table is not None:
        result = _from_table(
            from_table, table_run, _destination(model, heads, out), heads_source(model, heads)
        )
    else:
        config = EngineConfig(dtype=dtype, device=device, max_length=max_length, chat_template=chat_template)
        measuring = _Measuring(prompts, limit, max_tokens, _parse_temperatures(temperatures), seed)
        result = _measure(measuring, model, heads, config, out)
    if plot is not None:
        _draw(result, plot)


@dataclass(frozen=True, slots=True)
class _Measuring:
    """What to measure on, as given."""

    prompts: Path | None
    limit: int
    max_tokens: int
    temperatures: tuple[float, ...]
    seed: int


def _measure(
    measuring: _Measuring, model: str, heads: str | None, config: EngineConfig, out: Path | None
) -> "HeadCalibration":
    from rich.console import Console

    from medusa_core.calibration.calibrate import CalibrationSettings, destination
    from medusa_core.calibration.calibrate import calibrate as run
    from medusa_core.draft.accuracy import save_calibration
    from medusa_core.text.prompts import DEFAULT_PROMPTS, load_prompts

    settings = CalibrationSettings(
        max_tokens=measuring.max_tokens, temperatures=measuring.temperatures, seed=measuring.seed
    )
    conversations = load_prompts(measuring.prompts or DEFAULT_PROMPTS, measuring.limit)
    engine = options.load_engine(model, heads, config, calibrated=False)
    target = destination(engine.info.heads, out)
    with Console(stderr=True).status("calibrating") as status:
        result = run(engine, conversations, settings, lambda text: status.update(text))
    path = save_calibration(result, target)
    console = Console()
    console.print(accuracy_table(result))
    console.print(size_table(result))
    console.print(f"fastest here: {result.tree_nodes} nodes. Written to {path}", highlight=False)
    return result


def _from_table(file: Path, run: str | None, target: Path, heads: str | Path | None) -> "HeadCalibration":
    """What others measured of these heads. Which tree is fastest here, the engine finds when it starts."""
    from rich.console import Console

    from medusa_core.calibration.tables import read_accuracy_table
    from medusa_core.checkpoints.head_files import read_heads
    from medusa_core.checkpoints.reading import parse_weights
    from medusa_core.draft.accuracy import save_calibration

    result = read_accuracy_table(file, run)
    assert heads is not None  # else there is no destination
    held = parse_weights(read_heads(heads)).num_heads
    if held != result.num_heads:
        raise DataError(f"{file} is about {result.num_heads} heads, {heads} holds {held}")
    path = save_calibration(result, target)
    console = Console()
    console.print(accuracy_table(result))
    console.print(f"{result.num_heads} heads. Written to {path}", highlight=False, soft_wrap=True)
    return result


def _stored(model: str, heads: str | None, out: Path | None) -> "HeadCalibration":
    from medusa_core.draft.accuracy import load_calibration

    target = _destination(model, heads, out)
    result = load_calibration(target)
    if result is None:
        raise DataError(f"there is no calibration.json in {target} to draw: calibrate first")
    return result


def _destination(model: str, heads: str | None, out: Path | None) -> Path:
    """Where an engine of these would keep its calibration."""
    from medusa_core.calibration.calibrate import destination
    from medusa_core.loading.heads import heads_source

    source = heads_source(model, heads)
    return destination(None if source is None else str(source), out)


def _draw(calibration: "HeadCalibration", folder: Path) -> None:
    from rich.console import Console

    from medusa_core.calibration.plots import save_plots

    names = ", ".join(path.name for path in save_plots(calibration, folder))
    Console().print(f"Drawn in {folder}: {names}", highlight=False, soft_wrap=True)


def accuracy_table(calibration: "HeadCalibration") -> "Table":
    """Hit rate per head and rank with the 95 % interval of rank 1, where positions were counted."""
    from rich.table import Table

    from medusa_core.draft.accuracy import wilson_interval

    table = Table(title="Head accuracy (share of positions at which the guess was the model's token)")
    for name in ("head", *(f"rank {r + 1}" for r in range(SHOWN_RANKS)), "95 % (rank 1)", "positions"):
        table.add_column(name, justify="right")
    for head, row in enumerate(calibration.accuracies):
        interval, count = "-", calibration.counts[head] if calibration.counts else None
        if count is not None:
            interval = "{:.3f}-{:.3f}".format(*wilson_interval(row[0], count))
        rates = [f"{rate:.3f}" for rate in row[:SHOWN_RANKS]]
        rates += ["-"] * (SHOWN_RANKS - len(rates))
        table.add_row(str(head + 1), *rates, interval, "-" if count is None else str(count))
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
