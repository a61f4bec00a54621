"""What a request does to logits before a token is drawn from them: a chain of processors.

Why a seam: a processor sees each tree node's own path besides its logits, so whatever it depends on (a
penalty, a grammar), the processed row of a node equals that of ordinary decoding at the same place.

Shapes: N rows (tree nodes), J places of a path, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree
from medusa_core.engine.sampling import draw_tokens
from medusa_core.sampling_params import SamplingParams

ROUNDING = 1e-4  # a winner this close to a filter's threshold is judged by the filter itself
SEARCH_WIDTH, SEARCH_STEPS = 16.0, 8  # where the k-th logit is looked for below the first, and how finely
NUCLEUS_PREFIX = 128  # candidates looked at before falling back to sorting the whole vocabulary


@dataclass(frozen=True)
class NodePaths:
    """The tokens before each row: `history`, the root last, for all; from there on the row's own path."""

    history: Sequence[int]
    tree: DraftTree
    row: int

    @cached_property
    def path_tokens_NJ(self) -> Tensor:
        """Token ids from the root to each node, which fills the places beyond its own depth."""
        tokens_N = self.tree.tokens_BT[self.row]
        return tokens_N[self.tree.paths_BTD()[self.row]]

    @property
    def depths_N(self) -> Tensor:
        """Places of each row's path after the root that count."""
        return self.tree.depths_BT[self.row]


class LogitsProcessor(Protocol):
    """Changes rows of float32 logits by what stands before them; each row stands alone."""

    def process(self, logits_NV: Tensor, paths: NodePaths) -> Tensor:
        """New rows, or the same; tokens that cannot be drawn are -inf."""


@runtime_checkable
class LogitsFilter(LogitsProcessor, Protocol):
    """Looks at logits alone: excludes unlikely tokens, never the likeliest one.

    Tells cheaply of a token whether it stays.
    """

    def surely_keeps(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """[N]: False also where it is too close to tell."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The k likeliest tokens; all of those that tie for the last place."""

    k: int

    def process(self, logits_NV: Tensor, paths: NodePaths) -> Tensor:
        if self.k >= logits_NV.shape[-1]:
            return logits_NV
        kth = logits_NV.topk(self.k, dim=-1).values[..., -1:]
        return logits_NV.masked_fill(logits_NV < kth, -torch.inf)

    def surely_keeps(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        above = logits_NV > logits_NV.gather(-1, tokens_N[:, None]) - ROUNDING
        return above.sum(dim=-1) <= self.k


@dataclass(frozen=True, slots=True)
class TopP:
    """The fewest likeliest tokens whose probability at the temperature reaches p (Holtzman et al. 2020)."""

    p: float
    temperature: float

    def process(self, logits_NV: Tensor, paths: NodePaths) -> Tensor:
        scaled = logits_NV / self.temperature
        log_total = scaled.logsumexp(dim=-1, keepdim=True)
        vocab = scaled.shape[-1]
        # Elsewhere than on a CPU, looking whether the prefix is enough would make the host wait.
        count = min(vocab, NUCLEUS_PREFIX) if scaled.device.type == "cpu" else vocab
        best = scaled.topk(count, dim=-1).values
        cumulative = (best - log_total).exp().cumsum(dim=-1)
        if count < vocab and not bool((cumulative[..., -1] >= self.p).all()):
            best = scaled.sort(dim=-1, descending=True).values
            cumulative = (best - log_total).exp().cumsum(dim=-1)
        # The last kept token is the first at which the mass reaches p.
        last = (cumulative < self.p).sum(dim=-1, keepdim=True).clamp_(max=best.shape[-1] - 1)
        return logits_NV.masked_fill(scaled < best.gather(-1, last), -torch.inf)

    def surely_keeps(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        scaled = logits_NV / self.temperature
        own = scaled.gather(-1, tokens_N[:, None])
        mass_above = scaled.softmax(dim=-1).masked_fill_(scaled <= own, 0.0).sum(dim=-1)
        return mass_above < self.p - ROUNDING


@dataclass(frozen=True, slots=True)
class MinP:
    """Tokens at least p times as likely, at the temperature, as the likeliest."""

    p: float
    temperature: float

    def process(self, logits_NV: Tensor, paths: NodePaths) -> Tensor:
        scaled = logits_NV / self.temperature
        floor = scaled.amax(dim=-1, keepdim=True) + math.log(self.p)
        return logits_NV.masked_fill(scaled < floor, -torch.inf)

    def surely_keeps(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        scaled = logits_NV / self.temperature
        own = scaled.gather(-1, tokens_N[:, None])[:, 0]
        return own > scaled.amax(dim=-1) + math.log(self.p) + ROUNDING


@dataclass(frozen=True)
class LogitsChain:
    """A request's processors in their order: filters come last."""

    temperature: float
    processors: tuple[LogitsProcessor, ...] = ()

    @classmethod
    def of(cls, params: SamplingParams) -> "LogitsChain":
        """Filters do not change which token is the likeliest, so greedy requests have none."""
        if params.is_greedy:
            return cls(0.0)
        filters: list[LogitsProcessor] = []
        if params.top_k > 0:
            filters.append(TopK(params.top_k))
        if params.top_p < 1.0:
            filters.append(TopP(params.top_p, params.temperature))
        if params.min_p > 0.0:
            filters.append(MinP(params.min_p, params.temperature))
        return cls(params.temperature, tuple(filters))

    @cached_property
    def filters(self) -> tuple[LogitsFilter, ...]:
        return tuple(processor for processor in self.processors if isinstance(processor, LogitsFilter))

    def process(self, logits_NV: Tensor, paths: NodePaths) -> Tensor:
        """Float32 logits with excluded tokens at -inf."""
        return _apply(self.processors, logits_NV.float(), paths)

    def decide(self, logits_NV: Tensor, paths: NodePaths, noise_NV: Tensor | None) -> Tensor:
        """The token [N] each row decides: a draw from `process`, mostly without filtering.

        The winner among all tokens is the winner among the kept ones if it is kept itself. So on a CPU the
        draw comes first, and only rows whose winner a filter may exclude are filtered and drawn again:
        sorting 16 rows to find their nuclei takes longer than everything else here. Elsewhere the host would
        have to wait for which rows these are, and all are filtered.
        """
        if self.filters and noise_NV is not None and logits_NV.device.type != "cpu":
            return draw_tokens(self.process(logits_NV, paths), self.temperature, noise_NV)
        others = self.processors[: len(self.processors) - len(self.filters)]
        logits = _apply(others, logits_NV.float(), paths)
        winners = draw_tokens(logits, self.temperature, noise_NV)
        if not self.filters or noise_NV is None:
            return winners
        doubtful = (~self._surely_keep(logits, winners)).nonzero()[:, 0]
        if len(doubtful):
            kept = _apply(self.filters, logits[doubtful], paths)
            winners[doubtful] = draw_tokens(kept, self.temperature, noise_NV[doubtful])
        return winners

    def _surely_keep(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """Each filter asked alone: they agree with the chain unless one renormalizes what another left."""
        kept = torch.ones_like(tokens_N, dtype=torch.bool)
        for place, logits_filter in enumerate(self.filters):
            if place > 0 and isinstance(logits_filter, TopP):
                return torch.zeros_like(kept)
            kept &= logits_filter.surely_keeps(logits_NV, tokens_N)
        return kept


def without_excluded(logits_BNV: Tensor, sampling_B4: Tensor) -> Tensor:
    """The logits with -inf for nearly all tokens that a row's filters exclude, and for none that they keep.

    Without sorting: a bound below which all are excluded is found by bisection. `sampling_B4`: temperature,
    top_k, top_p, min_p of each row; 0, 0, 1, 0 are off.
    """
    temperature, top_k, top_p, min_p = (column[:, None, None] for column in sampling_B4.unbind(1))
    scaled_BNV = logits_BNV / torch.where(temperature > 0, temperature, 1.0)
    best_BN1 = scaled_BNV.amax(dim=-1, keepdim=True)
    weights_BNV = (scaled_BNV - best_BN1).exp()
    enough = (top_p + ROUNDING) * weights_BNV.sum(dim=-1, keepdim=True)
    start = best_BN1 - SEARCH_WIDTH
    bound, upper = start, best_BN1
    for _ in range(SEARCH_STEPS):
        middle = (bound + upper) / 2
        above_BNV = scaled_BNV > middle
        count = above_BNV.sum(dim=-1, keepdim=True)
        mass = torch.where(above_BNV, weights_BNV, 0.0).sum(dim=-1, keepdim=True)
        excluded = ((count > top_k) & (top_k > 0)) | (mass >= enough)
        bound, upper = torch.where(excluded, middle, bound), torch.where(excluded, upper, middle)
    bound = torch.where(bound > start, bound, -torch.inf)  # the start itself has not been tried
    bound = torch.maximum(bound, best_BN1 + min_p.log() - ROUNDING)
    return torch.where(scaled_BNV > bound, logits_BNV, -torch.inf)


def surely_kept(logits_BNV: Tensor, tokens_BN: Tensor, sampling_B4: Tensor) -> Tensor:
    """Whether all filters surely keep a token [B, N]: `surely_keeps` of a whole chain, without sorting.

    `sampling_B4`: temperature, top_k, top_p, min_p of each row; True where they are off (0, 0, 1, 0).
    """
    temperature, top_k, top_p, min_p = (column[:, None, None] for column in sampling_B4.unbind(1))
    own_BN1 = logits_BNV.gather(-1, tokens_BN[..., None])
    in_top_k = (logits_BNV > own_BN1 - ROUNDING).sum(dim=-1, keepdim=True) <= top_k
    warm_B11 = torch.where(temperature > 0, temperature, 1.0)
    scaled_BNV, own_BN1 = logits_BNV / warm_B11, own_BN1 / warm_B11
    best_BN1 = scaled_BNV.amax(dim=-1, keepdim=True)
    in_min_p = own_BN1 > best_BN1 + min_p.log() + ROUNDING
    # Top-p renormalizes what top-k left.
    floor_BN1 = torch.where(top_k == 0, -torch.inf, _inside_top_k(scaled_BNV, best_BN1, top_k))
    weights_BNV = (scaled_BNV - best_BN1).exp()
    left, above = (
        torch.where(scaled_BNV > bound_BN1, weights_BNV, 0.0).sum(dim=-1, keepdim=True)
        for bound_BN1 in (floor_BN1, own_BN1)
    )
    in_top_p = above < (top_p - ROUNDING) * left
    kept_BN1 = (in_top_k | (top_k == 0)) & (in_top_p | (top_p == 1)) & (in_min_p | (min_p == 0))
    return kept_BN1[..., 0]


def _inside_top_k(scaled_BNV: Tensor, best_BN1: Tensor, top_k_B11: Tensor) -> Tensor:
    """A bound that at most k tokens exceed, close to the least such one: found by bisection."""
    inside, outside = best_BN1, best_BN1 - SEARCH_WIDTH
    for _ in range(SEARCH_STEPS):
        middle = (inside + outside) / 2
        fits = (scaled_BNV > middle).sum(dim=-1, keepdim=True) <= top_k_B11
        inside, outside = torch.where(fits, middle, inside), torch.where(fits, outside, middle)
    return inside


def _apply(processors: Sequence[LogitsProcessor], logits_NV: Tensor, paths: NodePaths) -> Tensor:
    for processor in processors:
        logits_NV = processor.process(logits_NV, paths)
    return logits_NV
