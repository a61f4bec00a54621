"""Dynamic trees of heads that draft all depths at once (Medusa): each step its likeliest nodes.

Shapes: B rows, K heads, V vocabulary, R candidates per head, P paths of a superset, D depth, T tree nodes
(root included). Scores are the heads' logits, at temperature > 0 coupled with the target's noise.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.draft_tree import Origin, TreeTensors
from medusa_core.draft.top_scores import bounded, top_scores
from medusa_core.draft.tree import Tree, superset_paths
from medusa_core.draft.tree_shape import candidate_index, lineage_TD


class DynamicDrafter(nn.Module):
    """Each step the likeliest nodes, by the product of calibrated head probabilities along their path.

    They are taken from a static superset of paths that is guaranteed to hold them, so all shapes are static.
    """

    depths_P: Tensor
    lineage_PD: Tensor
    candidates_P: Tensor
    along_path_PD: Tensor

    def __init__(self, nodes: int, num_heads: int, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        drafted = min(nodes - 1, vocab_size)
        superset = Tree("superset", superset_paths(drafted, num_heads, drafted))
        self.size, self.max_depth = drafted + 1, superset.depth
        self._width = superset.width
        # Row p: where the log-probabilities along path p stand among K * R values; unused places: at a zero.
        blank = superset.depth * self._width
        along_path = [
            [depth * self._width + rank for depth, rank in enumerate(path)]
            + [blank] * (superset.depth - len(path))
            for path in superset.paths
        ]
        tables = {
            "depths_P": torch.tensor(superset.depths),
            "lineage_PD": lineage_TD(superset),
            "candidates_P": candidate_index(superset, self._width),
            "along_path_PD": torch.tensor(along_path),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def forward(self, scores_BKV: Tensor, roots_B: Tensor, divisors_BK: Tensor) -> TreeTensors:
        """`divisors_BK` make each head's scores probabilities; one row may stand for all B."""
        tokens_BR, log_probs_BR = self._candidates(scores_BKV, divisors_BK)
        joint_BP = log_probs_BR[:, self.along_path_PD].sum(dim=-1)
        chosen, new_index = choose_best(joint_BP, self.size)
        drafted = tokens_BR.gather(1, self.candidates_P[chosen[:, 1:] - 1])
        tokens_BT = torch.cat([roots_B[:, None], drafted], dim=1)
        return tree_of_lineages(tokens_BT, self.depths_P[chosen], self.lineage_PD[chosen], new_index)

    def _candidates(self, scores_BKV: Tensor, divisors_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of every head's best ranks, flattened; a zero follows the latter."""
        scores = scores_BKV[:, : self.max_depth] / divisors_BK[:, : self.max_depth, None]
        values, ranks = top_scores(scores, self._width)
        log_probs = bounded(values - scores.logsumexp(dim=-1, keepdim=True))
        return ranks.flatten(1), functional.pad(log_probs.flatten(1), (0, 1))


def choose_best(joint_BP: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The root and the likeliest of P drafts below it, in their order [B, size]; and where each node of all
    stands among those [B, P+1].

    Stable: of equal drafts the earlier, hence a parent before its child, so the choice is prefix-closed.
    """
    order = joint_BP.sort(dim=1, descending=True, stable=True).indices[:, : size - 1]
    chosen = functional.pad(order.sort(dim=1).values + 1, (1, 0))
    new_index = torch.zeros_like(functional.pad(joint_BP, (1, 0)), dtype=torch.long)
    places = torch.arange(size, device=chosen.device).expand_as(chosen)
    return chosen, new_index.scatter(1, chosen, places)


def tree_of_lineages(
    tokens_BT: Tensor, depths_BT: Tensor, lineage_BTD: Tensor, new_index: Tensor
) -> TreeTensors:
    """The tree of chosen nodes.

    `lineage_BTD`: from the root to each node, which fills the places beyond its own depth, as places among
    all candidates, of which `new_index` says where they stand in the tree.
    """
    size = tokens_BT.shape[1]
    lineage_BTD = new_index.gather(1, lineage_BTD.flatten(1)).unflatten(1, (size, -1))
    parents_BT = lineage_BTD.gather(2, (depths_BT - 1).clamp(min=0)[:, :, None])[:, :, 0]
    places_T = torch.arange(size, device=tokens_BT.device)
    ancestors_BTT = (lineage_BTD[:, :, :, None] == places_T).any(dim=2)
    return tokens_BT, depths_BT, parents_BT, ancestors_BTT, (depths_BT > 0) * int(Origin.HEADS)
