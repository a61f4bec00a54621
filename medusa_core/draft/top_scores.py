"""The best of many scores, and what makes them probabilities: a vocabulary is read twice, and never sorted.

Shapes: V scores, R of them wanted, G groups.
"""

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 64  # scores whose maximum stands for them; a selection among V takes 7 times as long as two such
IMPOSSIBLE = -1e4  # log-probability; finite, so that its children still rank below it


def top_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of the last dimension, best first, and where they stand, both [..., R].

    Exact: they lie in the groups with the `count` greatest maxima. A NaN makes its group `IMPOSSIBLE`.
    """
    total = scores.shape[-1]
    groups = -(-total // GROUP)
    if groups <= 2 * count:
        return _top(scores, count)
    if total % GROUP:
        scores = functional.pad(scores, (0, groups * GROUP - total), value=-torch.inf)
    grouped_GX = scores.unflatten(-1, (groups, GROUP))
    _, best_R = _top(grouped_GX.amax(dim=-1), count)
    among_RX = grouped_GX.gather(-2, best_R[..., None].expand(*best_R.shape, GROUP))
    values_R, places_R = _top(among_RX.flatten(-2), count)
    group_R = best_R.gather(-1, torch.div(places_R, GROUP, rounding_mode="floor"))
    return values_R, group_R * GROUP + places_R % GROUP


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best = scores.nan_to_num(nan=IMPOSSIBLE, neginf=-torch.inf, posinf=torch.inf).topk(count, dim=-1)
    return best.values, best.indices


def bounded(log_probs: Tensor) -> Tensor:
    """From `IMPOSSIBLE` to 0, whatever heads that overflow say.

    Never above 0, by rounding, so that no child beats its parent; nor NaN or -inf.
    """
    return log_probs.nan_to_num(nan=IMPOSSIBLE).clamp(min=IMPOSSIBLE, max=0.0)
