"""One request inside the engine: its state, and where its tokens stop. No model code here."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from medusa_core.engine.logits_processors import LogitsChain
from medusa_core.engine.outputs import FinishReason
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request that holds a slot.

    `token_ids` grows from the prompt: all tokens decided so far. `num_cached` of them are in the cache; the
    last, the root, is not, and until the prompt is read there is none. Prompt and answer together may not
    exceed `max_total`.
    """

    request: Request
    slot: int
    stop_ids: frozenset[int]
    max_total: int
    num_cached: int = 0
    num_generated: int = 0
    token_ids: list[int] = field(init=False)
    chain: LogitsChain = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.chain = LogitsChain.of(self.params)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def is_prefilled(self) -> bool:
        """Whether there is a root."""
        return len(self.token_ids) > len(self.request.prompt_ids)

    @property
    def root(self) -> int:
        """The token decided last."""
        return self.token_ids[-1]

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + self.num_generated

    @property
    def budget(self) -> int:
        """Tokens that may still be generated."""
        limit = self.max_total - self.num_tokens
        if self.params.max_tokens is None:
            return limit
        return min(limit, self.params.max_tokens - self.num_generated)


@dataclass(frozen=True, slots=True)
class CutRun:
    """The part of an accepted run that counts, and why it ended there if it did."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


def cut_run(token_ids: Iterable[int], stop_ids: frozenset[int], budget: int) -> CutRun:
    """Apply token stops one by one inside an accepted run.

    A stop token ends the run and is not part of it. One that lies beyond the budget does not count: without
    speculation it would never have been decided. Nothing beyond the first stop survives.
    """
    kept: list[int] = []
    for token in token_ids:
        if len(kept) >= budget:
            break
        if token in stop_ids:
            return CutRun(tuple(kept), FinishReason.STOP, token)
        kept.append(token)
    return CutRun(tuple(kept), FinishReason.LENGTH if len(kept) >= budget else None)
