"""What goes into the engine for one request and what comes out of each step. No torch here."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from medusa_core.config import TYPICAL_DELTA, TYPICAL_EPSILON
from medusa_core.errors import ConfigError

MAX_SEED = 2**64 - 1


class SpeculationMode(StrEnum):
    """exact: output as without; typical: the paper's acceptance, *not* lossless; off: one token at a time."""

    EXACT = "exact"
    TYPICAL = "typical"
    OFF = "off"


class FinishReason(StrEnum):
    """Why a sequence ended. `ABORT` and `ERROR` never come from the model."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationParams:
    """Per-request choice of acceptance rule and draft tree.

    `tree`: "dynamic", "static" or the name of a published tree. `epsilon` and `delta` (paper §2.3.1) matter
    in typical mode only.
    """

    mode: SpeculationMode = SpeculationMode.EXACT
    tree: str = "dynamic"
    epsilon: float = TYPICAL_EPSILON
    delta: float = TYPICAL_DELTA

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            _check_range(name, getattr(self, name), 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    `max_tokens` None means up to the end of the context. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed`
    (64 bits, unsigned) fixes the sampled text; temperature 0 is greedy and ignores it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    speculation: SpeculationParams = field(default_factory=SpeculationParams)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {self.max_tokens}")
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (off) or positive, not {self.top_k}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must fit 64 unsigned bits, not {self.seed}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one engine step cost and gained. Times in seconds, tuples indexed by head (depth - 1).

    `mode` is the mode the step ran in: OFF also when the engine's governor turned speculation off.
    `baseline_seconds` is what the step's tokens would have taken without speculation, from step times
    measured at start (0.0 for prefill or where nothing was measured). `drafted[k]` counts tree nodes drafted
    by head k, `accepted[k]` is 1 where head k's draft was accepted. `tree_nodes` includes the root.
    """

    mode: SpeculationMode
    is_prefill: bool
    seconds: float
    propose_seconds: float = 0.0
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    baseline_seconds: float = 0.0
    prompt_tokens: int = 0
    tree_nodes: int = 1
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Tokens one request gained in one step; the last output of a request carries `finish_reason`.

    `error` is set with `FinishReason.ERROR` only: a message for the log, not for the client. `stop_token_id`
    is the EOS or stop id that ended the sequence; it is not among `token_ids`. `out_of_memory`: that was the
    error.
    """

    request_id: str
    token_ids: tuple[int, ...]
    stats: StepStats | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    out_of_memory: bool = False


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} must be between {low:g} and {high:g}, not {value}")
