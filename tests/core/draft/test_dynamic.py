"""From scores to trees: the static and the dynamic drafter against slow ones, and coupled scores."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medusa_core.draft.coupling import NOISE_WEIGHT, DrawNoise, couple
from medusa_core.draft.draft_tree import DraftTree, root_tree
from medusa_core.draft.dynamic import DynamicDrafter
from medusa_core.draft.static import StaticDrafter
from medusa_core.draft.tree import load_tree, make_tree

CPU = torch.device("cpu")
TokenPath = tuple[int, ...]


def draft(
    drafter: DynamicDrafter | StaticDrafter, scores_BKV: Tensor, roots_B: Tensor, taus: tuple[float, ...]
) -> DraftTree:
    return DraftTree(*drafter(scores_BKV, roots_B, torch.tensor([taus])), drafter.max_depth)


def paths_of(tree: DraftTree, row: int = 0) -> list[TokenPath]:
    """Each drafted node's tokens from the root's child to itself, from the ancestors alone."""
    tokens, depths = tree.tokens_BT[row].tolist(), tree.depths_BT[row].tolist()
    paths = []
    for node in range(1, len(tokens)):
        above = [a for a in torch.nonzero(tree.ancestors_BTT[row, node])[:, 0].tolist() if a != 0]
        paths.append(tuple(tokens[a] for a in sorted(above, key=lambda a: depths[a])))
    return paths


def check_topology(tree: DraftTree, row: int = 0) -> None:
    """Root first, parents before children, and parents, depths and ancestors tell the same story."""
    parents, depths = tree.parents_BT[row].tolist(), tree.depths_BT[row].tolist()
    ancestors = [set(torch.nonzero(line)[:, 0].tolist()) for line in tree.ancestors_BTT[row]]
    assert (parents[0], depths[0], ancestors[0]) == (0, 0, {0})
    for node in range(1, len(parents)):
        assert parents[node] < node
        assert depths[node] == depths[parents[node]] + 1 <= tree.max_depth
        assert ancestors[node] == ancestors[parents[node]] | {node}
    paths = paths_of(tree, row)
    assert len(set(paths)) == len(paths)
    assert all(len(path) == 1 or path[:-1] in paths for path in paths)


def brute_force(scores_KV: Tensor, nodes: int, taus: tuple[float, ...]) -> list[TokenPath]:
    """The `nodes` likeliest token paths under independent heads, in float64."""
    heads, vocab = scores_KV.shape
    log_probs = (
        (scores_KV.double() / torch.tensor(taus[:heads]).double()[:, None]).log_softmax(dim=-1).tolist()
    )
    paths = [p for d in range(1, heads + 1) for p in itertools.product(range(vocab), repeat=d)]
    return sorted(
        paths, key=lambda p: sum(head[token] for head, token in zip(log_probs, p, strict=False)), reverse=True
    )[:nodes]


@pytest.mark.parametrize("seed", range(25))
def test_dynamic_tree_holds_the_likeliest_paths(seed: int) -> None:
    rng = random.Random(seed)
    heads, vocab = rng.choice([(1, 30), (2, 12), (3, 8), (4, 7)])
    nodes = rng.randint(2, vocab + 1)
    spread = rng.choice([0.3, 2.0, 10.0])
    taus = tuple(rng.choice([0.5, 1.0, 2.5]) for _ in range(heads))
    scores = spread * torch.randn(1, heads, vocab, generator=torch.Generator().manual_seed(seed))
    drafter = DynamicDrafter(nodes, heads, vocab, CPU)
    tree = draft(drafter, scores, torch.tensor([99]), taus)
    assert drafter.size == tree.tokens_BT.shape[1] == nodes
    assert tree.tokens_BT[0, 0] == 99
    check_topology(tree)
    assert set(paths_of(tree)) == set(brute_force(scores[0], nodes - 1, taus))


def test_taus_decide_between_deep_and_wide() -> None:
    scores = torch.tensor([[[4.0, 3.0, 2.0, 1.0]] * 3])
    drafter = DynamicDrafter(4, 3, 4, CPU)
    sure = draft(drafter, scores, torch.zeros(1, dtype=torch.long), (0.1, 0.1, 0.1))
    unsure = draft(drafter, scores, torch.zeros(1, dtype=torch.long), (50.0, 50.0, 50.0))
    assert set(paths_of(sure)) == {(0,), (0, 0), (0, 0, 0)}
    assert set(paths_of(unsure)) == {(0,), (1,), (2,)}
    only_the_first = draft(drafter, scores, torch.zeros(1, dtype=torch.long), (0.1, 50.0, 50.0))
    assert {len(path) for path in paths_of(only_the_first)} == {1, 2}


def ties(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores)


def certain(scores: Tensor) -> Tensor:
    """One token's probability rounds to 1: children tie with their parent."""
    return scores.index_fill(-1, torch.tensor([3]), 200.0)


def mostly_impossible(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) > 1, -math.inf)


def one_possible(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) != 2, -math.inf)


def first_head_impossible(scores: Tensor) -> Tensor:
    scores[:, 0] = -math.inf
    return scores


def overflown(scores: Tensor) -> Tensor:
    scores[:, 0, 3] = math.inf
    scores[:, 1, 2] = math.nan
    return scores


def second_head_broken(scores: Tensor) -> Tensor:
    scores[:, 1] = math.nan
    return scores


def far_apart(scores: Tensor) -> Tensor:
    return 1e30 * scores


HARD = (
    ties,
    certain,
    mostly_impossible,
    one_possible,
    first_head_impossible,
    overflown,
    second_head_broken,
    far_apart,
)


@pytest.mark.parametrize("nodes", [2, 7, 16, 17])
@pytest.mark.parametrize("make_hard", HARD)
def test_any_scores_give_a_tree(make_hard: Callable[[Tensor], Tensor], nodes: int) -> None:
    """Prefix-closed, of the right size, each path once: else a wrong token could be accepted."""
    scores = make_hard(torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(nodes)))
    drafter = DynamicDrafter(nodes, 3, 16, CPU)
    tree = draft(drafter, scores, torch.arange(5), (0.4, 1.0, 3.0))
    assert tree.tokens_BT.shape == (5, nodes)
    for row in range(5):
        check_topology(tree, row)


@pytest.mark.parametrize("nodes", [2, 8, 30, 64, 256])
def test_vocabulary_smaller_than_the_tree(nodes: int) -> None:
    drafter = DynamicDrafter(nodes, 4, 5, CPU)
    scores = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(nodes))
    tree = draft(drafter, scores, torch.tensor([1, 2]), (1.0,) * 4)
    assert tree.tokens_BT.shape[1] == drafter.size == min(nodes, 6)
    assert int(tree.tokens_BT.max()) < 5
    check_topology(tree, 0)
    check_topology(tree, 1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_rows_do_not_see_each_other(dynamic: bool) -> None:
    drafter = DynamicDrafter(24, 4, 50, CPU) if dynamic else StaticDrafter(load_tree("mc_sim_7b_63"), CPU)
    scores = 3 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
    taus = (0.7, 0.9, 1.1, 1.3)
    both = draft(drafter, scores, torch.tensor([7, 8]), taus)
    for row in range(2):
        alone = draft(drafter, scores[row : row + 1], torch.tensor([7 + row]), taus)
        assert torch.equal(both.tokens_BT[row], alone.tokens_BT[0])
        assert torch.equal(both.depths_BT[row], alone.depths_BT[0])
        assert torch.equal(both.parents_BT[row], alone.parents_BT[0])
        assert torch.equal(both.ancestors_BTT[row], alone.ancestors_BTT[0])
    if dynamic:
        assert not torch.equal(both.depths_BT[0], both.depths_BT[1])


def test_static_tree_is_filled_by_rank() -> None:
    tree = make_tree("x", [[0], [2], [0, 1], [2, 0], [0, 1, 0]])
    scores = torch.tensor([[[0.1, 0.9, 0.5, 0.4], [1.0, 2.0, 3.0, 4.0], [9.0, 0.0, 0.0, 1.0], [0.0] * 4]])
    drafter = StaticDrafter(tree, CPU)
    filled = draft(drafter, scores, torch.tensor([42]), ())
    # Head 1 ranks 1, 2, 3, 0; head 2 ranks 3, 2, 1, 0; head 3 ranks 0 first. The fourth head is not needed.
    assert filled.tokens_BT.tolist() == [[42, 1, 3, 2, 3, 0]]
    assert filled.depths_BT.tolist() == [[0, 1, 1, 2, 2, 3]]
    assert filled.parents_BT.tolist() == [[0, 0, 0, 1, 2, 3]]
    assert (drafter.size, drafter.max_depth, filled.max_depth) == (6, 3, 3)
    check_topology(filled)


def test_root_tree_is_ordinary_decoding() -> None:
    tree = root_tree(torch.tensor([5, 6]))
    assert tree.tokens_BT.tolist() == [[5], [6]]
    assert tree.depths_BT.tolist() == tree.parents_BT.tolist() == [[0], [0]]
    assert tree.ancestors_BTT.tolist() == [[[True]], [[True]]]
    assert tree.max_depth == 0


def test_coupled_scores() -> None:
    logits = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    noise = torch.randn(
        1, 5, 9, generator=torch.Generator().manual_seed(2)
    )  # more positions, a larger vocabulary
    assert torch.equal(couple(logits, DrawNoise(torch.tensor([0.0]), noise)), logits.float())
    assert torch.equal(couple(logits, None), logits.float())
    expected = logits[0].float() + NOISE_WEIGHT * 0.7 * noise[0, :3, :6]
    assert torch.allclose(couple(logits, DrawNoise(torch.tensor([0.7]), noise))[0], expected)
