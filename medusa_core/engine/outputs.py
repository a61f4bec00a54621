"""What each engine step reports: plain data that crosses process boundaries. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from medusa_core.sampling_params import SpeculationMode


class FinishReason(StrEnum):
    """Why a sequence ended. `ABORT` and `ERROR` never come from the model."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one engine step cost and gained. Times in seconds, tuples indexed by depth - 1 (head).

    `mode` is the mode the step ran in: OFF also where drafting did not pay or found nothing to draft.
    `baseline_seconds` is what the step's tokens would have taken without speculation, from step times
    measured at start and corrected by plain steps since (0.0 for prefill or where nothing was measured).
    `drafted[k]` counts tree nodes at depth k + 1, `accepted[k]` is 1 where one of them was accepted.
    `tree_nodes` includes the root.
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


@dataclass(frozen=True, slots=True)
class TokenExtras:
    """What is told of a token besides its id. `origin`: who guessed it, "heads", "ngram" or else "model"."""

    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Tokens one request gained in one step; the last output of a request carries `finish_reason`.

    `extras`: an entry for each of `token_ids`.

    `error` is set with `FinishReason.ERROR` only: a message for the log, not for the client. `stop_token_id`
    is the EOS or stop id that ended the sequence; it is not among `token_ids`. `out_of_memory`: that was the
    error.
    """

    request_id: str
    token_ids: tuple[int, ...]
    extras: tuple[TokenExtras, ...] = ()
    stats: StepStats | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    out_of_memory: bool = False
