"""Computes accuracies, temperatures and expected acceptance lengths from observed positions.

Shapes: N positions, K heads, V vocabulary, R ranks, G grid points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa_core.calibration.collect import Observed
from medusa_core.draft.head_drafter import HeadDrafter, make_drafter
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.tree import grow_tree
from medusa_core.engine.acceptance import longest_path

MAX_RANK = 64
POSITIONS_AT_ONCE = 32  # path-dependent heads need V scores per node of a large tree at each position
TAU_GRID = tuple(round(0.4 * 1.12**i, 4) for i in range(20))  # 0.4 .. 3.4


class RankCounter:
    """Counts how often each head's prediction of each rank was the model's token, of that head's targets."""

    def __init__(self, num_heads: int, num_ranks: int) -> None:
        self.hits_KR = torch.zeros(num_heads, num_ranks, dtype=torch.long)
        self.counts_K = torch.zeros(num_heads, dtype=torch.long)

    def add(self, observed: Observed) -> None:
        ranked_NKR = observed.scores_NKV.topk(self.hits_KR.shape[1], dim=-1).indices
        known_NK = observed.rows_NK >= 0
        hits = (ranked_NKR == observed.rows_NK[..., None]) & known_NK[..., None]
        self.hits_KR += hits.sum(dim=0).cpu()
        self.counts_K += known_NK.sum(dim=0).cpu()

    def accuracies(self) -> tuple[tuple[float, ...], ...]:
        rates = self.hits_KR / self.counts_K.clamp(min=1)[:, None]
        return tuple(tuple(round(value, 6) for value in row) for row in rates.tolist())


class TauFitter:
    """Fits per head the tau of softmax(score / tau) that maximizes the likelihood of the model's tokens."""

    def __init__(self, num_heads: int) -> None:
        self._loss_GK = torch.zeros(len(TAU_GRID), num_heads, dtype=torch.double)
        self._counts_K = torch.zeros(num_heads, dtype=torch.long)

    def add(self, observed: Observed) -> None:
        targets, known = observed.rows_NK.clamp(min=0), observed.rows_NK >= 0
        scores = observed.scores_NKV
        # A target outside the heads' reduced vocabulary says nothing about tau.
        known &= targets < scores.shape[-1]
        chosen = scores.gather(-1, targets.clamp(max=scores.shape[-1] - 1)[..., None])[..., 0]
        for place, tau in enumerate(TAU_GRID):
            loss_NK = (scores / tau).logsumexp(dim=-1) - chosen / tau
            self._loss_GK[place] += loss_NK.where(known, 0.0).sum(dim=0).double().cpu()
        self._counts_K += known.sum(dim=0).cpu()

    def taus(self) -> tuple[float, ...]:
        """One per head; 1 if it had no target."""
        best = self._loss_GK.argmin(dim=0).tolist()
        return tuple(
            TAU_GRID[place] if count else 1.0
            for place, count in zip(best, self._counts_K.tolist(), strict=True)
        )


class LengthMeter:
    """Mean acceptance length of one drafter on greedy answers.

    Each answer is walked in the very steps the engine would take. The mean over all positions would be
    another: long runs skip the positions after them, so more steps begin where guessing is hard.
    """

    def __init__(self, drafter: HeadDrafter, taus: tuple[float, ...]) -> None:
        self._drafter, self._taus = drafter, taus
        self._next = 0  # where in the answer the walk stands
        self._tokens = 0
        self.steps = 0

    def add(self, observed: Observed) -> None:
        """Take in an answer's next chunk. A step that the answer's end would cut short ends the walk."""
        if observed.start == 0:
            self._next = 0
        complete = (observed.targets_NK >= 0).all(dim=1).tolist()
        lengths = self._lengths(observed).tolist()
        while (place := self._next - observed.start) < len(lengths) and complete[place]:
            self._next += lengths[place]
            self._tokens += lengths[place]
            self.steps += 1

    def _lengths(self, observed: Observed) -> Tensor:
        """Tokens [N] a step would decide from each position."""
        truth_ND = torch.cat([observed.roots_N[:, None], observed.targets_NK], dim=1)
        lengths = []
        for start in range(0, len(truth_ND), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            tree = self._drafter.draft(
                observed.hidden_NE[part], observed.roots_N[part], self._taus, 0.0, None
            )
            right = tree.tokens_BT == truth_ND[part].gather(1, tree.depths_BT)
            best = longest_path(right, tree.ancestors_BTT, tree.depths_BT, tree.max_depth)
            lengths.append(1 + best.count_B)
        return torch.cat(lengths)

    @property
    def mean(self) -> float:
        """Tokens per step; needs at least one."""
        return round(self._tokens / self.steps, 4)


def length_meters(
    heads: DraftHeads,
    accuracies: Sequence[Sequence[float]],
    taus: tuple[float, ...],
    sizes: Sequence[int],
    device: torch.device,
) -> dict[str, dict[int, LengthMeter]]:
    """A meter per kind of tree and size: grown from these accuracies, or dynamic with these temperatures."""
    untempered = (1.0,) * heads.num_heads
    return {
        "static": {
            n: LengthMeter(make_drafter(heads, grow_tree(accuracies, n), device), untempered) for n in sizes
        },
        "dynamic": {n: LengthMeter(make_drafter(heads, n, device), taus) for n in sizes},
    }
