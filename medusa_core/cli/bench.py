"""`medusa bench`: decoding with and without drafts, as a table and perhaps a JSON file."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from medusa_core.benchmark.settings import BenchSettings
from medusa_core.cli.engine_options import ModelOptions
from medusa_core.cli.options import with_options
from medusa_core.config import EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.option_field import option
from medusa_core.sampling_params import SpeculationParams
from medusa_core.status_bar import StatusBar

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine
    from medusa_core.text.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured, and where the figures go."""

    prompts: Path | None = option(
        "JSONL file (.gz too) of objects with `messages`.", default=None, shown="24 short dialogue openings"
    )
    limit: int | None = option("Use only the first prompts.", default=None, shown="all", least=1)
    inflate: str | None = option(
        "1b: pad the model to a 1.2 B Llama shape that computes the same.", default=None, shown="as it is"
    )
    json_file: Path | None = option("Write the figures here.", default=None, flag="--json", path="file")

    def __post_init__(self) -> None:
        if self.json_file is not None and not self.json_file.parent.is_dir():  # better now than after minutes
            raise ConfigError(f"cannot write {self.json_file}: there is no such directory")


@with_options
def bench(
    options: BenchOptions,
    settings: BenchSettings,
    model: ModelOptions,
    speculation: SpeculationParams,
    config: EngineConfig,
) -> None:
    """Measure decoding with and without Medusa, interleaved on the same prompts in one process."""
    from medusa_core.text.prompts import DEFAULT_PROMPTS, load_prompts

    settings = replace(settings, mode=speculation.mode, source=speculation.source, tree=speculation.tree)
    conversations = load_prompts(options.prompts or DEFAULT_PROMPTS, options.limit)
    notes = Console(stderr=True)
    with notes.status("loading the model and measuring step times"):
        engine = _engine(model, config, options.inflate)
    report = _measure(engine, conversations, settings, notes)
    prompts_file = str(options.prompts) if options.prompts else None
    report["config"] |= {"inflate": options.inflate, "prompts_file": prompts_file}
    _publish(report, options.json_file)


def _engine(model: ModelOptions, config: EngineConfig, inflate: str | None) -> "Engine":
    from medusa_core.benchmark.inflated import SHAPES, inflated_engine
    from medusa_core.engine.engine import Engine

    if inflate is None:
        return Engine.from_pretrained(model.model, heads=model.heads, config=config)
    if inflate not in SHAPES:
        raise ConfigError(f"inflate must be one of {', '.join(SHAPES)}, not {inflate!r}")
    return inflated_engine(model.model, model.heads, config, SHAPES[inflate])


def _measure(
    engine: "Engine", prompts: "list[Prompt]", settings: BenchSettings, notes: Console
) -> dict[str, Any]:
    from medusa_core.benchmark.bench import run_bench

    def warn(text: str) -> None:
        notes.print(f"warning: {text}", markup=False, highlight=False)

    with StatusBar(notes, "prompts") as bar:
        bar.show(total=len(prompts))
        return run_bench(engine, prompts, settings, warn=warn, on_prompt=lambda: bar.show(advance=1))


def _publish(report: dict[str, Any], json_file: Path | None) -> None:
    from medusa_core.benchmark.report import make_table

    Console().print(make_table(report))
    if json_file is None:
        return
    try:
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {json_file}: {error}") from error
