"""What an engine runs, as plain data: the one description of the model for logs, API and benchmarks."""

from dataclasses import dataclass, field

from medusa_core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model, its draft heads and how they run. No torch here: it crosses process boundaries.

    `tree_nodes`: size of adaptive trees at start, root included; 1 drafts nothing. `tree_choice`: why, in
    figures, if step times chose it. `trees` and `sources`: what a request may ask for by name.
    `expected_speedup`: of the chosen tree, from calibration and measured step times (None if either is
    missing). `defaults`: sampling as the model's `generation_config.json` asks.
    """

    model: str
    heads: str | None
    num_heads: int
    parameters: int
    context_length: int
    vocab_size: int
    dtype: str
    device: str
    tree_nodes: int
    trees: tuple[str, ...]
    sources: tuple[str, ...]
    slots: int
    expected_speedup: float | None = None
    tree_choice: str | None = None
    defaults: SamplingParams = field(default_factory=SamplingParams)
