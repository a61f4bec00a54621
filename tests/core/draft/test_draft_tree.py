"""Trees put together: under one root, and as rows of a batch with padding that is never accepted."""

import torch

from medusa_core.draft.draft_tree import DraftTree, Origin, join_roots, root_tree, stack_rows
from medusa_core.draft.ngram import Draft, as_tree
from medusa_core.engine.acceptance import longest_path, match_drafts
from tests.core.draft.test_dynamic import check_topology, paths_of

FIRST = [Draft(7, 0, 1), Draft(8, 1, 2), Draft(9, 0, 1)]
SECOND = [Draft(4, 0, 1), Draft(5, 1, 2), Draft(6, 2, 3), Draft(3, 1, 2)]


def tree_of(drafts: list[Draft], root: int = 1) -> DraftTree:
    return as_tree([drafts], torch.tensor([root]))


def test_two_trees_under_one_root() -> None:
    joined = join_roots(tree_of(FIRST), tree_of(SECOND))
    check_topology(joined)
    assert joined.tokens_BT.tolist() == [[1, 7, 8, 9, 4, 5, 6, 3]]
    assert (joined.size, joined.max_depth) == (8, 3)
    assert paths_of(joined) == [*paths_of(tree_of(FIRST)), *paths_of(tree_of(SECOND))]
    assert joined.origins_BT.tolist() == [[Origin.MODEL, *[Origin.NGRAM] * 7]]
    alone = join_roots(tree_of(FIRST), root_tree(torch.tensor([1])))
    assert torch.equal(alone.ancestors_BTT, tree_of(FIRST).ancestors_BTT)


def test_rows_of_different_trees() -> None:
    stacked = stack_rows(
        [([2, 0], batch_of(tree_of(FIRST, 1), tree_of(FIRST, 2))), ([1], tree_of(SECOND, 3))]
    )
    assert stacked.tokens_BT[:, 0].tolist() == [2, 3, 1]
    assert (stacked.size, stacked.max_depth) == (5, 3)
    check_topology(stacked, 1)
    assert stacked.tokens_BT[0].tolist() == [2, 7, 8, 9, 2]
    assert stacked.depths_BT[0].tolist() == [0, 1, 2, 1, 0]
    assert stacked.ancestors_BTT[0, 4].tolist() == [False, False, False, False, True]


def test_padding_is_never_accepted() -> None:
    """Even where the target repeats the root's token, which is what padding carries."""
    stacked = stack_rows([([0], root_tree(torch.tensor([5]))), ([1], tree_of(FIRST, 5))])
    targets = torch.full((2, 4), 5)
    right = match_drafts(stacked.tokens_BT, stacked.parents_BT, targets)
    accepted = longest_path(right, stacked.ancestors_BTT, stacked.depths_BT, stacked.max_depth)
    assert accepted.count_B.tolist() == [0, 0]
    assert accepted.leaf_B.tolist() == [0, 0]


def batch_of(*trees: DraftTree) -> DraftTree:
    return stack_rows([([row], tree) for row, tree in enumerate(trees)])
