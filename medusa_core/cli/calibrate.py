"""`medusa calibrate`: measures draft heads, shows a table and writes `calibration.json` beside them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from medusa_core.cli.engine_options import ModelOptions, PlainEngine
from medusa_core.cli.options import with_options
from medusa_core.cli.output import figures, say
from medusa_core.config import EngineConfig
from medusa_core.errors import ConfigError, DataError
from medusa_core.option_field import option

if TYPE_CHECKING:
    from rich.table import Table

    from medusa_core.draft.accuracy import HeadCalibration

SHOWN_RANKS = 4
RESULT_PANEL = "Result"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What the heads are measured on, and what becomes of the result."""

    prompts: Path | None = option(
        "JSONL file (.gz too) of objects with `messages`, like the real traffic.",
        default=None,
        shown="24 short dialogue openings",
    )
    limit: int = option("Use at most so many prompts.", default=100, least=1)
    max_tokens: int = option("Tokens per answer.", default=128)
    temperatures: str = option(
        "Where, beside 0, the heads' confidence is calibrated; comma separated.", default="0.3,0.7,1.0"
    )
    seed: int = option("Seed of the sampled answers.", default=0, least=0)
    out: Path | None = option(
        "Folder for calibration.json.", default=None, path="folder", shown="beside the heads"
    )
    plot: Path | None = option(
        "Folder for pictures (PNG, SVG): tree, accuracy by rank, speedup by tree size.",
        RESULT_PANEL,
        default=None,
        path="folder",
    )
    plot_only: bool = option("Draw what calibration.json says already.", RESULT_PANEL, default=False)
    from_table: Path | None = option(
        "Measure nothing: take accuracies from a table of the Medusa repository or a CSV with the columns "
        "head, top1, top2, ...",
        RESULT_PANEL,
        default=None,
        path="file",
    )
    table_run: str | None = option("The row (Name) of a table of several runs.", RESULT_PANEL, default=None)

    def __post_init__(self) -> None:
        if self.plot_only and (self.plot is None or self.from_table is not None):
            raise ConfigError("--plot-only needs --plot, and no --from-table")
        if self.table_run is not None and self.from_table is None:
            raise ConfigError("--table-run needs --from-table")


@with_options
def calibrate(options: CalibrateOptions, model: ModelOptions, config: PlainEngine) -> None:
    """Measure the draft heads: accuracies, confidence, and the tree that is fastest on this machine."""
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.calibration.plots import check_matplotlib, save_plots

    if options.plot is not None:
        check_matplotlib()
    if options.plot_only:
        result = _stored(_destination(model, options.out))
    elif options.from_table is not None:
        result = _from_table(options.from_table, options, model)
    else:
        result = _measure(options, model, config)
    if options.plot is not None:
        names = ", ".join(path.name for path in save_plots(result, options.plot))
        say(f"Drawn in {options.plot}: {names}")


def _measure(options: CalibrateOptions, model: ModelOptions, config: EngineConfig) -> "HeadCalibration":
    from medusa_core.calibration.calibrate import CalibrationSettings, destination
    from medusa_core.calibration.calibrate import calibrate as run
    from medusa_core.draft.accuracy import save_calibration
    from medusa_core.text.prompts import DEFAULT_PROMPTS, load_prompts

    settings = CalibrationSettings(
        max_tokens=options.max_tokens,
        temperatures=_parse_temperatures(options.temperatures),
        seed=options.seed,
    )
    conversations = load_prompts(options.prompts or DEFAULT_PROMPTS, options.limit)
    engine = model.load(config, calibrated=False)
    target = destination(engine.info.heads, options.out)
    with Console(stderr=True).status("calibrating") as status:
        result = run(engine, conversations, settings, status.update)
    path = save_calibration(result, target)
    Console().print(accuracy_table(result), size_table(result))
    say(f"fastest here: {result.tree_nodes} nodes. Written to {path}")
    return result


def _from_table(file: Path, options: CalibrateOptions, model: ModelOptions) -> "HeadCalibration":
    """Published accuracies of these heads. Which tree is fastest here, the engine finds when it starts."""
    from medusa_core.calibration.tables import read_accuracy_table
    from medusa_core.checkpoints.head_files import read_heads
    from medusa_core.checkpoints.reading import parse_weights
    from medusa_core.draft.accuracy import save_calibration
    from medusa_core.loading.heads import heads_source

    target = _destination(model, options.out)
    heads = heads_source(model.model, model.heads)
    assert heads is not None  # else there is no destination
    result = read_accuracy_table(file, options.table_run)
    held = parse_weights(read_heads(heads)).num_heads
    if held != result.num_heads:
        raise DataError(f"{file} is about {result.num_heads} heads, {heads} holds {held}")
    path = save_calibration(result, target)
    Console().print(accuracy_table(result))
    say(f"{result.num_heads} heads. Written to {path}")
    return result


def _stored(folder: Path) -> "HeadCalibration":
    from medusa_core.draft.accuracy import load_calibration

    result = load_calibration(folder)
    if result is None:
        raise DataError(f"there is no calibration.json in {folder} to draw: calibrate first")
    return result


def _destination(model: ModelOptions, out: Path | None) -> Path:
    """Where an engine of these would keep its calibration."""
    from medusa_core.calibration.calibrate import destination
    from medusa_core.loading.heads import heads_source

    source = heads_source(model.model, model.heads)
    return destination(None if source is None else str(source), out)


def accuracy_table(calibration: "HeadCalibration") -> "Table":
    """Hit rate per head and rank with the 95 % interval of rank 1, where positions were counted."""
    from medusa_core.draft.accuracy import wilson_interval

    table = figures(
        "Head accuracy (share of positions at which the guess was the model's token)",
        ("head", *(f"rank {r + 1}" for r in range(SHOWN_RANKS)), "95 % (rank 1)", "positions"),
    )
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
    columns = ("nodes", "static tokens/step", "dynamic tokens/step", "step ms", "tokens/s", "speedup")
    table = figures("Draft trees (expected, greedy)", columns)
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
