"""How a request is sampled, stopped and speculated on. No torch here."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from medusa_core.config import SPECULATION_PANEL, TYPICAL_DELTA, TYPICAL_EPSILON
from medusa_core.errors import ConfigError
from medusa_core.option_field import option

MAX_SEED = 2**64 - 1
# What the server and `medusa generate` take at most; the engine itself has wider limits.
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 2**31 - 1
MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters


class SpeculationMode(StrEnum):
    """exact: output as without; typical: the paper's acceptance, *not* lossless; off: one token at a time."""

    EXACT = "exact"
    TYPICAL = "typical"
    OFF = "off"


class DraftSourceName(StrEnum):
    """Where drafts come from: draft heads, n-grams of the sequence so far, or both in one tree."""

    HEADS = "heads"
    NGRAM = "ngram"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationParams:
    """Per-request choice of acceptance rule, draft source and draft tree.

    `tree`: "dynamic", "static" or the name of a published tree; only heads fill other trees than dynamic
    ones. `epsilon` and `delta` (paper §2.3.1) matter in typical mode only.
    """

    mode: SpeculationMode = option(
        "exact: the very same answer, sooner. typical: the paper's acceptance, not lossless. "
        "off: one token at a time.",
        SPECULATION_PANEL,
        default=SpeculationMode.EXACT,
    )
    source: DraftSourceName = option(
        "What drafts: the heads, n-grams of the text so far (needs no heads), or both.",
        SPECULATION_PANEL,
        default=DraftSourceName.HEADS,
    )
    tree: str = option(
        "Draft tree: dynamic, static or a published one.", SPECULATION_PANEL, default="dynamic"
    )
    epsilon: float = TYPICAL_EPSILON
    delta: float = TYPICAL_DELTA

    def __post_init__(self) -> None:
        _coerce(self, "mode", SpeculationMode)
        _coerce(self, "source", DraftSourceName)
        for name in ("epsilon", "delta"):
            _check_range(name, getattr(self, name), 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    `max_tokens` None means up to the end of the context. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed`
    (64 bits, unsigned) fixes the sampled text, None takes a fresh one; temperature 0 is greedy and ignores
    it. `stop`: texts that end an answer, found where tokens become text (`chat`, `stream`, `generate`, the
    server), not by the steps themselves.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
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
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must fit 64 unsigned bits, not {self.seed}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"stop must be a tuple of texts that are not empty, not {self.stop!r}")

    @property
    def known_seed(self) -> int:
        """The seed of a request that has one, as every `Request` does."""
        assert self.seed is not None
        return self.seed

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _coerce(params: object, name: str, kind: type[StrEnum]) -> None:
    """Let plain text stand for a member."""
    value = getattr(params, name)
    try:
        object.__setattr__(params, name, kind(value))
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ConfigError(f"{name} must be one of {names}, not {value!r}") from None


def check_served(params: SamplingParams) -> None:
    """Raise `ConfigError` for what the HTTP API would refuse too."""
    _check_range("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    if params.top_k > MAX_TOP_K:
        raise ConfigError(f"top_k must be at most {MAX_TOP_K}, not {params.top_k}")
    if len(params.stop) > MAX_STOPS:
        raise ConfigError(f"stop takes at most {MAX_STOPS} texts, not {len(params.stop)}")
    if any(len(stop) > MAX_STOP_LENGTH for stop in params.stop):
        raise ConfigError(f"a stop text must have at most {MAX_STOP_LENGTH} characters")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} must be between {low:g} and {high:g}, not {value}")
