"""What an engine runs, as plain data. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """For logs, `/v1/models` and benchmarks. `tree_nodes`: size of adaptive trees at start, root included."""

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
    slots: int
