"""Options of the commands that load a model: which model, how it samples, how it drafts. No torch here."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.option_field import option
from medusa_core.sampling_params import (
    DraftSourceName,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    check_served,
)

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine

MODEL_PANEL, SAMPLING_PANEL, SPECULATION_PANEL = "Model", "Sampling", "Speculation"
_ENGINE, _SPECULATION = EngineConfig(), SpeculationParams()  # the defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationOptions:
    """How tokens are drafted, of a request and of the engine as a whole."""

    mode: SpeculationMode = option(
        "exact: the very same answer, sooner. typical: the paper's acceptance, not lossless. "
        "off: one token at a time.",
        SPECULATION_PANEL,
        default=_SPECULATION.mode,
    )
    source: DraftSourceName = option(
        "What drafts: the heads, n-grams of the text so far (needs no heads), or both.",
        SPECULATION_PANEL,
        default=_SPECULATION.source,
    )
    tree: str = option(
        "Draft tree: dynamic, static or a published one.", SPECULATION_PANEL, default=_SPECULATION.tree
    )
    tree_nodes: int | None = option(
        "Tree nodes verified per step, root included.",
        SPECULATION_PANEL,
        default=_ENGINE.tree_nodes,
        env="MEDUSA_TREE_NODES",
        shown="what is fastest here",
    )
    static_tree: str | None = option(
        "What tree 'static' is: a published name or a JSON file.",
        SPECULATION_PANEL,
        default=_ENGINE.static_tree,
        env="MEDUSA_STATIC_TREE",
        shown="grown for the heads",
    )

    @property
    def params(self) -> SpeculationParams:
        return SpeculationParams(mode=self.mode, source=self.source, tree=self.tree)


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
    """Which model is loaded, and how it runs."""

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
    dtype: str = option(
        "auto, float32, bfloat16 or float16.", MODEL_PANEL, default=_ENGINE.dtype, env="MEDUSA_DTYPE"
    )
    device: str = option(
        "auto, cpu, cuda or cuda:N.", MODEL_PANEL, default=_ENGINE.device, env="MEDUSA_DEVICE"
    )
    max_length: int | None = option(
        "Tokens of conversation and answer together.",
        MODEL_PANEL,
        default=_ENGINE.max_length,
        env="MEDUSA_MAX_LENGTH",
        shown="the model's context, at most 4096",
    )
    chat_template: str | None = option(
        "Built-in chat template (vicuna) or a Jinja file.",
        MODEL_PANEL,
        default=_ENGINE.chat_template,
        env="MEDUSA_CHAT_TEMPLATE",
        shown="the model's own",
    )

    def engine_config(self, speculation: SpeculationOptions | None = None) -> EngineConfig:
        """Raises `ConfigError`."""
        trees = speculation or _ENGINE
        return EngineConfig(
            dtype=self.dtype,
            device=self.device,
            max_length=self.max_length,
            chat_template=self.chat_template,
            tree_nodes=trees.tree_nodes,
            static_tree=trees.static_tree,
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
