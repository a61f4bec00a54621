"""Validated, frozen settings of the core. Defaults live here and nowhere else."""

from dataclasses import dataclass
from pathlib import Path

from medusa_core.errors import ConfigError
from medusa_core.option_field import check_limits, option

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "demo"

TYPICAL_EPSILON = 0.09  # Medusa paper §2.3.1 and reference `posterior_threshold`
TYPICAL_DELTA = 0.3  # its `posterior_alpha`, about sqrt(epsilon)

COMPILE = ("auto", "on", "off")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CONTEXT_LIMIT = 4096
PREFILL_CHUNK = 512
# Headings of the command line's help.
MODEL_PANEL, SAMPLING_PANEL, SPECULATION_PANEL = "Model", "Sampling", "Speculation"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine is built.

    `dtype` "auto": on CUDA the checkpoint's 16-bit type (bfloat16 for float32 ones); on a CPU bfloat16 or
    float32, whichever multiplies the model's weights faster, if it multiplies bfloat16 natively, else
    float32. `device` "auto" is CUDA if there is one ("auto:N": its device N). `max_length` (tokens, prompt
    and answer) defaults to the model's context, at most `DEFAULT_CONTEXT_LIMIT`. `tree_nodes` (root included)
    None lets calibration and measured step times choose; 1 turns speculation off. `static_tree` (a published
    name or a JSON file) is the tree that "static" means, instead of one grown from the heads' accuracies.
    """

    dtype: str = option(
        "auto, float32, bfloat16 or float16.", MODEL_PANEL, default="auto", env="MEDUSA_DTYPE"
    )
    device: str = option("auto, cpu, cuda or cuda:N.", MODEL_PANEL, default="auto", env="MEDUSA_DEVICE")
    max_length: int | None = option(
        "Tokens of conversation and answer together.",
        MODEL_PANEL,
        default=None,
        env="MEDUSA_MAX_LENGTH",
        shown=f"the model's context, at most {DEFAULT_CONTEXT_LIMIT}",
        least=2,
    )
    chat_template: str | None = option(
        "Built-in chat template (vicuna) or a Jinja file.",
        MODEL_PANEL,
        default=None,
        env="MEDUSA_CHAT_TEMPLATE",
        shown="the model's own",
    )
    tree_nodes: int | None = option(
        "Tree nodes verified per step, root included.",
        SPECULATION_PANEL,
        default=None,
        env="MEDUSA_TREE_NODES",
        shown="what is fastest here",
        least=1,
        most=256,
    )
    static_tree: str | None = option(
        "What tree 'static' is: a published name or a JSON file.",
        SPECULATION_PANEL,
        default=None,
        env="MEDUSA_STATIC_TREE",
        shown="grown for the heads",
    )
    compile: str = option(
        "Compile the step: auto (behind, once for a machine), on (before serving) or off.",
        MODEL_PANEL,
        default="auto",
        env="MEDUSA_COMPILE",
    )
    reproducible: bool = option(
        "The same text with and without speculation in 16-bit types too.",
        SPECULATION_PANEL,
        default=True,
        env="MEDUSA_REPRODUCIBLE",
    )
    slots: int = 1
    prefill_chunk: int = PREFILL_CHUNK
    measure: bool = True  # time steps at start; without it nothing adapts and no speedup is estimated
    memory_check: bool = True  # refuse to load what does not fit the device's free memory

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.compile not in COMPILE:
            raise ConfigError(f"compile must be one of {', '.join(COMPILE)}, not {self.compile!r}")
        for name, low, high in (("slots", 1, 256), ("prefill_chunk", 1, 65536)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, not {value}")
        check_limits(self)


def resolve_context_length(max_length: int | None, max_positions: int) -> int:
    """Tokens of prompt and answer together. Raises `ConfigError` beyond the model's positions."""
    if max_length is None:
        return min(max_positions, DEFAULT_CONTEXT_LIMIT)
    if max_length > max_positions:
        raise ConfigError(f"max_length {max_length} is beyond the model's {max_positions} positions")
    return max_length
