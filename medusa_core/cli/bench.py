"""`medusa bench`: options in, a table and perhaps a JSON file out. Measuring is `medusa_core.benchmark`'s."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from medusa_core.cli import options
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.sampling_params import SpeculationMode

if TYPE_CHECKING:
    from medusa_core.benchmark.bench import BenchSettings
    from medusa_core.engine.engine import Engine
    from medusa_core.text.prompts import Prompt


def bench(
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file (.gz too) of objects with `messages`.", show_default="24 short dialogue openings"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first prompts.", show_default="all")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and variant.")] = 1,
    compare_hf: Annotated[
        bool, typer.Option("--compare-hf", help="Also run transformers' generate on the same weights.")
    ] = False,
    inflate: Annotated[
        str | None,
        typer.Option(
            help="1b: pad the model to a 1.2 B Llama shape that computes the same.", show_default="as it is"
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write the figures here.")
    ] = None,
    model: options.ModelOption = str(EMBEDDED_MODEL),
    heads: options.HeadsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    max_length: options.MaxLengthOption = None,
    chat_template: options.ChatTemplateOption = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer.", rich_help_panel=options.SAMPLING_PANEL)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy.", rich_help_panel=options.SAMPLING_PANEL)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling; 1 is off.", rich_help_panel=options.SAMPLING_PANEL)
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the first prompt; the others count up.", rich_help_panel=options.SAMPLING_PANEL
        ),
    ] = 0,
    mode: options.ModeOption = SpeculationMode.EXACT,
    tree: options.TreeOption = "dynamic",
    tree_nodes: options.TreeNodesOption = None,
) -> None:
    """Measure decoding with and without Medusa, interleaved on the same prompts in one process."""
    _check_output(json_file)
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.benchmark.bench import BenchSettings
    from medusa_core.text.prompts import DEFAULT_PROMPTS, load_prompts

    settings = BenchSettings(
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        mode=mode,
        tree=tree,
        seed=seed,
        repeats=repeats,
        compare_hf=compare_hf,
    )
    config = EngineConfig(
        dtype=dtype, device=device, max_length=max_length, tree_nodes=tree_nodes, chat_template=chat_template
    )
    conversations = load_prompts(prompts or DEFAULT_PROMPTS, limit)
    notes = Console(stderr=True)
    with notes.status("loading the model and measuring step times"):
        engine = _engine(model, heads, config, inflate)
    report = _measure(engine, conversations, settings, notes)
    report["config"] |= {"inflate": inflate, "prompts_file": str(prompts) if prompts else None}
    _publish(report, json_file)


def _check_output(json_file: Path | None) -> None:
    """Better now than after minutes of measuring."""
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"cannot write {json_file}: there is no such directory")


def _engine(model: str, heads: str | None, config: EngineConfig, inflate: str | None) -> "Engine":
    from medusa_core.benchmark.inflated import SHAPES, inflated_engine
    from medusa_core.engine.engine import Engine

    if inflate is None:
        return Engine.from_pretrained(model, heads=heads, config=config)
    if inflate not in SHAPES:
        raise ConfigError(f"inflate must be one of {', '.join(SHAPES)}, not {inflate!r}")
    return inflated_engine(model, heads, config, SHAPES[inflate])


def _measure(
    engine: "Engine", prompts: "list[Prompt]", settings: "BenchSettings", notes: Console
) -> dict[str, Any]:
    from medusa_core.benchmark.bench import run_bench

    with _progress(notes) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        return run_bench(
            engine,
            prompts,
            settings,
            warn=lambda text: progress.console.print(f"warning: {text}", markup=False, highlight=False),
            on_prompt=lambda: progress.advance(task),
        )


def _publish(report: dict[str, Any], json_file: Path | None) -> None:
    from medusa_core.benchmark.report import make_table

    Console().print(make_table(report))
    if json_file is None:
        return
    try:
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {json_file}: {error}") from error


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
