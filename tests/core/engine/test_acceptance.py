"""Acceptance against slow references that walk the tree node by node."""

import math
import random

import pytest
import torch

from medusa_core.draft.tree import Tree, make_tree
from medusa_core.engine.acceptance import longest_path, match_drafts, typical_drafts

VOCAB = 7


def make_case(seed: int) -> tuple[Tree, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random tree with random (possibly repeated) draft tokens, as tensors with B = 1."""
    rng = random.Random(seed)
    paths: set[tuple[int, ...]] = {()}
    while len(paths) < rng.randint(2, 20):
        parent = rng.choice(sorted(paths))
        if len(parent) < 4:
            paths.add((*parent, rng.randrange(3)))
    tree = make_tree("case", paths - {()})
    tokens = torch.tensor([[rng.randrange(VOCAB) for _ in range(tree.size)]])
    for node in range(1, tree.size):  # siblings draft different tokens
        taken = {int(tokens[0, s]) for s in range(1, node) if tree.parents[s] == tree.parents[node]}
        tokens[0, node] = rng.choice([t for t in range(VOCAB) if t not in taken])
    ancestors = torch.zeros(1, tree.size, tree.size, dtype=torch.bool)
    for node, above in enumerate(tree.ancestors):
        ancestors[0, node, list(above)] = True
    return tree, tokens, torch.tensor([tree.parents]), torch.tensor([tree.depths]), ancestors


def children(tree: Tree, node: int) -> list[int]:
    return [child for child in range(1, tree.size) if tree.parents[child] == node]


@pytest.mark.parametrize("seed", range(60))
def test_exact_acceptance_equals_a_walk(seed: int) -> None:
    tree, tokens, parents, depths, ancestors = make_case(seed)
    targets = torch.randint(0, VOCAB, (1, tree.size), generator=torch.Generator().manual_seed(seed))
    node, walked = 0, [0]
    while True:
        right = [c for c in children(tree, node) if tokens[0, c] == targets[0, node]]
        if not right:
            break
        node = right[0]
        walked.append(node)
    accepted = longest_path(match_drafts(tokens, parents, targets), ancestors, depths, tree.depth)
    count = int(accepted.count_B)
    assert accepted.path_BD[0, : count + 1].tolist() == walked
    assert int(accepted.leaf_B) == node


def slow_typical(
    tree: Tree, tokens: torch.Tensor, probs: torch.Tensor, epsilon: float, delta: float
) -> tuple[list[int], float]:
    """Every root path, kept while acceptable; the longest, then the likeliest (paper §2.3.1)."""
    best: tuple[list[int], float] = ([0], 0.0)

    def visit(node: int, path: list[int], log_prob: float) -> None:
        nonlocal best
        if (len(path), log_prob) > (len(best[0]), best[1]) and len(path) > 1:
            best = (path, log_prob)
        row = probs[0, node]
        entropy = -sum(p * math.log(p) for p in row.tolist() if p > 0)
        for child in children(tree, node):
            p = row[tokens[0, child]].item()
            if p > min(epsilon, delta * math.exp(-entropy)):
                visit(child, [*path, child], log_prob + math.log(p))

    visit(0, [0], 0.0)
    return best


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 0.09), (0.01, 1.0)])
def test_typical_acceptance_equals_a_slow_reference(seed: int, epsilon: float, delta: float) -> None:
    tree, tokens, parents, depths, ancestors = make_case(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, tree.size, VOCAB, generator=generator, dtype=torch.double)
    logits[0, :, seed % VOCAB] = -torch.inf  # a token that the filters removed
    log_probs = logits.log_softmax(-1)
    right, scores = typical_drafts(tokens, parents, log_probs, epsilon, delta)
    accepted = longest_path(right, ancestors, depths, tree.depth, scores)
    path, _ = slow_typical(tree, tokens, log_probs.exp(), epsilon, delta)
    assert accepted.path_BD[0, : int(accepted.count_B) + 1].tolist() == path


def test_batch_of_different_slots() -> None:
    """Rows of a batch do not see each other."""
    cases = [make_case(seed) for seed in range(40)]
    same = [c for c in cases if c[0].size == cases[0][0].size][:3] * 2
    generator = torch.Generator().manual_seed(1)
    depth = max(c[0].depth for c in same)
    targets = torch.randint(0, VOCAB, (len(same), same[0][0].size), generator=generator)
    tokens, parents, depths, ancestors = (torch.cat([c[i] for c in same]) for i in range(1, 5))
    together = longest_path(match_drafts(tokens, parents, targets), ancestors, depths, depth)
    for row, case in enumerate(same):
        right = match_drafts(case[1], case[2], targets[row : row + 1])
        alone = longest_path(right, case[4], case[3], depth)
        count = int(alone.count_B)
        assert int(together.count_B[row]) == count
        assert together.path_BD[row, : count + 1].tolist() == alone.path_BD[0, : count + 1].tolist()
