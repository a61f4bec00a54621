"""Validated, frozen settings of the core. Defaults live here and nowhere else."""

from dataclasses import dataclass
from pathlib import Path

from medusa_core.errors import ConfigError

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "demo"

TYPICAL_EPSILON = 0.09  # Medusa paper §2.3.1 and reference `posterior_threshold`
TYPICAL_DELTA = 0.3  # its `posterior_alpha`, about sqrt(epsilon)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CONTEXT_LIMIT = 4096
PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine is built.

    `dtype` "auto": on CUDA the checkpoint's 16-bit type (bfloat16 for float32 ones), on a CPU bfloat16 if it
    multiplies that natively and float32 otherwise. `device` "auto" is CUDA if there is one ("auto:N": its
    device N). `max_length` (tokens, prompt and answer) defaults to the model's context, at most
    `DEFAULT_CONTEXT_LIMIT`. `tree_nodes` (root included) None lets calibration and measured step times
    choose; 1 turns speculation off. `static_tree` (a published name or a JSON file) is the tree that "static"
    means, instead of one grown from the heads' accuracies.
    """

    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    slots: int = 1
    tree_nodes: int | None = None
    static_tree: str | None = None
    prefill_chunk: int = PREFILL_CHUNK
    chat_template: str | None = None
    measure: bool = True  # time steps at start; without it nothing adapts and no speedup is estimated
    memory_check: bool = True  # refuse to load what does not fit the device's free memory

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        for name, low, high in (("slots", 1, 256), ("prefill_chunk", 1, 65536)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, not {value}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, not {self.max_length}")
        if self.tree_nodes is not None and not 1 <= self.tree_nodes <= 256:
            raise ConfigError(f"tree_nodes must be between 1 and 256, not {self.tree_nodes}")


def resolve_context_length(max_length: int | None, max_positions: int) -> int:
    """Tokens of prompt and answer together. Raises `ConfigError` beyond the model's positions."""
    if max_length is None:
        return min(max_positions, DEFAULT_CONTEXT_LIMIT)
    if max_length > max_positions:
        raise ConfigError(f"max_length {max_length} is beyond the model's {max_positions} positions")
    return max_length
