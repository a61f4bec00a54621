"""Options the commands share and what becomes of them. No torch at import: `medusa --help` is instant."""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from medusa_core.config import EngineConfig
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine

MODEL_PANEL, SAMPLING_PANEL, SPECULATION_PANEL = "Model", "Sampling", "Speculation"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        envvar="MEDUSA_MODEL",
        help="Model directory or Hub name.",
        show_default="the embedded demo model",
        rich_help_panel=MODEL_PANEL,
    ),
]
HeadsOption = Annotated[
    str | None,
    typer.Option(
        envvar="MEDUSA_HEADS",
        help="Draft heads: directory, file, Hub name, folder beside the model (medusa-1) or 'none'.",
        show_default="those beside the model",
        rich_help_panel=MODEL_PANEL,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        envvar="MEDUSA_DTYPE", help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL_PANEL
    ),
]
DeviceOption = Annotated[
    str, typer.Option(envvar="MEDUSA_DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL_PANEL)
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        envvar="MEDUSA_MAX_LENGTH",
        help="Tokens of conversation and answer together.",
        show_default="the model's context, at most 4096",
        rich_help_panel=MODEL_PANEL,
    ),
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        envvar="MEDUSA_CHAT_TEMPLATE",
        help="Built-in chat template (vicuna) or a Jinja file.",
        show_default="the model's own",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of an answer.", show_default="the context's end", rich_help_panel=SAMPLING_PANEL
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="0 is greedy.", show_default="the model's", rich_help_panel=SAMPLING_PANEL),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        help="Nucleus sampling; 1 is off.", show_default="the model's", rich_help_panel=SAMPLING_PANEL
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        help="The k likeliest tokens only; 0 is off.",
        show_default="the model's",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        help="Least probability relative to the likeliest token's; 0 is off.",
        show_default="the model's",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        help="Repeats a sampled answer exactly.", show_default="a new one", rich_help_panel=SAMPLING_PANEL
    ),
]
ModeOption = Annotated[
    SpeculationMode,
    typer.Option(
        help="exact: the very same answer, sooner. typical: the paper's acceptance, not lossless. "
        "off: one token at a time.",
        rich_help_panel=SPECULATION_PANEL,
    ),
]
TreeOption = Annotated[
    str,
    typer.Option(help="Draft tree: dynamic, static or a published one.", rich_help_panel=SPECULATION_PANEL),
]
TreeNodesOption = Annotated[
    int | None,
    typer.Option(
        envvar="MEDUSA_TREE_NODES",
        help="Tree nodes verified per step, root included.",
        show_default="what is fastest here",
        rich_help_panel=SPECULATION_PANEL,
    ),
]
StaticTreeOption = Annotated[
    str | None,
    typer.Option(
        envvar="MEDUSA_STATIC_TREE",
        help="What tree 'static' is: a published name or a JSON file.",
        show_default="grown for the heads",
        rich_help_panel=SPECULATION_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling values given on the command line; None leaves the model's own."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    mode: SpeculationMode
    tree: str

    def __post_init__(self) -> None:
        self.resolve(SamplingParams())  # a mistake shows before the model takes its time to load

    def resolve(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with what was given, and a fresh seed if none was. Raises ConfigError."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return replace(
            defaults, **given, seed=seed, speculation=SpeculationParams(mode=self.mode, tree=self.tree)
        )


def load_engine(model: str, heads: str | None, config: EngineConfig, *, calibrated: bool = True) -> "Engine":
    """The engine for a command at a terminal, with a note on what is happening meanwhile."""
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from medusa_core.engine.engine import Engine

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    with Console(stderr=True).status("loading the model") as status:
        return Engine.from_pretrained(
            model, heads=heads, config=config, calibrated=calibrated, on_stage=status.update
        )
