"""Which drafted path is accepted: pure functions on tensors.

Shapes: B slots, T tree nodes (root is node 0, parents precede children), D greatest depth, V vocabulary.
`ancestors` [B, T, T] is True where the column's node is the row's node or an ancestor of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Accepted:
    """The accepted path per slot.

    `path_BD` [B, D+1]: node indices, root first; beyond `count_B` drafts the root again. `leaf_B`: last node
    of the path. `count_B`: accepted drafts a, 0..D.
    """

    path_BD: Tensor
    leaf_B: Tensor
    count_B: Tensor


def match_drafts(tokens_BT: Tensor, parents_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Exact acceptance, greedy included: a draft is right if its parent's own next token [B, T] is that
    draft.

    The author's lossless rule (FasterDecoding/Medusa #56), with the target's draw in place of the argmax.
    """
    right = tokens_BT == targets_BT.gather(1, parents_BT)
    right[:, 0] = True
    return right


def typical_drafts(
    tokens_BT: Tensor, parents_BT: Tensor, log_probs_BTV: Tensor, epsilon: float, delta: float
) -> tuple[Tensor, Tensor]:
    """Typical acceptance (paper §2.3.1): p(x) > min(epsilon, delta * exp(-H(p))). Not lossless.

    Returns which drafts are acceptable [B, T] and each draft's log-probability [B, T] (0 for the root).
    """
    probs = log_probs_BTV.exp()
    entropy_BT = -(probs * log_probs_BTV.nan_to_num(neginf=0.0)).sum(dim=-1)
    threshold_BT = torch.clamp(delta * torch.exp(-entropy_BT), max=epsilon)
    rows = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)[:, None]
    draft_log_prob = log_probs_BTV[rows, parents_BT, tokens_BT]
    acceptable = draft_log_prob.exp() > threshold_BT.gather(1, parents_BT)
    acceptable[:, 0] = True
    draft_log_prob[:, 0] = 0.0
    return acceptable, draft_log_prob


def longest_path(
    acceptable_BT: Tensor,
    ancestors_BTT: Tensor,
    depths_BT: Tensor,
    max_depth: int,
    tie_score_BT: Tensor | None = None,
) -> Accepted:
    """The deepest node all of whose path is acceptable; ties by the path's summed `tie_score_BT`, then
    first.
    """
    reached = (acceptable_BT[:, None, :] >= ancestors_BTT).all(dim=-1)
    reached_depth = torch.where(reached, depths_BT, -1)
    if tie_score_BT is None:
        leaf = reached_depth.argmax(dim=1)
    else:
        sums = torch.where(ancestors_BTT, tie_score_BT[:, None, :], 0.0).sum(dim=-1)
        deepest = reached_depth == reached_depth.max(dim=1, keepdim=True).values
        leaf = torch.where(deepest, sums, -torch.inf).argmax(dim=1)
    rows, size = depths_BT.shape
    on_path = ancestors_BTT[torch.arange(rows, device=leaf.device), leaf]
    # Nodes on one path have distinct depths 0..a, which are their places; all others share one that is cut.
    places_BT = torch.where(on_path, depths_BT, max_depth + 1)
    nodes_BT = torch.arange(size, device=leaf.device).expand(rows, -1)
    path = leaf.new_zeros(rows, max_depth + 2).scatter_(1, places_BT, nodes_BT)[:, :-1]
    return Accepted(path, leaf, depths_BT.gather(1, leaf[:, None])[:, 0])
