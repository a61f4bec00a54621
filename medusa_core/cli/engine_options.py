"""Options of the commands that load a model: which model, and how it samples. No torch here."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

from medusa_core.cli.options import dataclass_options
from medusa_core.config import EMBEDDED_MODEL, MODEL_PANEL, SAMPLING_PANEL, EngineConfig
from medusa_core.option_field import option
from medusa_core.sampling_params import SamplingParams, check_served

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine

# Options of an engine that does not speculate, or whose trees are what is being measured.
PlainEngine = Annotated[EngineConfig, dataclass_options(EngineConfig, MODEL_PANEL)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling of an answer; None leaves the model's own."""

    max_tokens: int | None = option(
        "Most tokens of an answer.", SAMPLING_PANEL, default=None, shown="the context's end"
    )
    temperature: float | None = option("0 is greedy.", SAMPLING_PANEL, default=None, shown="the model's")
    top_p: float | None = option(
        "Nucleus sampling; 1 is off.", SAMPLING_PANEL, default=None, shown="the model's"
    )
    top_k: int | None = option(
        "The k likeliest tokens only; 0 is off.", SAMPLING_PANEL, default=None, shown="the model's"
    )
    min_p: float | None = option(
        "Least probability relative to the likeliest token's; 0 is off.",
        SAMPLING_PANEL,
        default=None,
        shown="the model's",
    )
    seed: int | None = option(
        "Repeats a sampled answer exactly.", SAMPLING_PANEL, default=None, shown="a new one"
    )

    def __post_init__(self) -> None:
        check_served(self.params(SamplingParams()))  # a mistake shows before the model takes its time to load

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with what was given. Raises `ConfigError`."""
        return replace(defaults, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model is loaded."""

    model: str = option(
        "Model directory or Hub name.",
        MODEL_PANEL,
        default=str(EMBEDDED_MODEL),
        env="MEDUSA_MODEL",
        shown="the embedded demo model",
    )
    heads: str | None = option(
        "Draft heads: directory, file, Hub name, folder beside the model (medusa-1) or 'none'.",
        MODEL_PANEL,
        default=None,
        env="MEDUSA_HEADS",
        shown="those beside the model",
    )

    def load(self, config: EngineConfig, *, calibrated: bool = True) -> "Engine":
        """The engine for a command at a terminal, with a note on what is happening meanwhile."""
        from rich.console import Console
        from transformers.utils import logging as transformers_logging

        from medusa_core.engine.engine import Engine

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
        with Console(stderr=True).status("loading the model") as status:
            return Engine.from_pretrained(
                self.model, heads=self.heads, config=config, calibrated=calibrated, on_stage=status.update
            )
