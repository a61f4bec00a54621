"""Draft trees: validation, canonical order, growing, and the superset the dynamic tree is taken from."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from medusa_core.draft.tree import (
    MAX_NODES,
    RankPath,
    Tree,
    expected_acceptance_length,
    grow_tree,
    load_tree,
    make_tree,
    published_tree_names,
    superset_paths,
)
from medusa_core.errors import TreeError

BAD_PATHS = {
    "a path that is a number": ([3], r"tree 'x': a path is a non-empty list of ranks, not 3"),
    "an empty path": ([[]], r"a path is a non-empty list of ranks, not \[\]"),
    "text": (["01"], r"a path is a non-empty list of ranks, not '01'"),
    "null": ([None], r"a path is a non-empty list of ranks, not None"),
    "an object": ([{"0": 1}], r"a path is a non-empty list of ranks, not \{'0': 1\}"),
    "a negative rank": ([[0], [0, -1]], r"ranks are whole numbers from 0 on, not \[0, -1\]"),
    "a fraction": ([[0.0]], r"ranks are whole numbers from 0 on, not \[0.0\]"),
    "a truth value": ([[True]], r"ranks are whole numbers from 0 on, not \[True\]"),
    "a rank as text": ([["0"]], r"ranks are whole numbers from 0 on, not \['0'\]"),
    "no parent": ([[0], [1, 0]], r"\[1, 0\] is there without its parent \[1\]"),
    "no grandparent": ([[0, 0], [0, 0, 0]], r"\[0, 0\] is there without its parent \[0\]"),
    "too many": ([[rank] for rank in range(MAX_NODES)], r"has 1024 nodes, more than 1023"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_bad_paths_are_named(case: str) -> None:
    paths, message = BAD_PATHS[case]
    with pytest.raises(TreeError, match=message):
        make_tree("x", paths)


def test_canonical_order_whatever_the_input_order() -> None:
    paths = [(1,), (0, 1), (0,), (0, 0), (0, 0, 2), (1, 0), (0, 1)]
    for seed in range(5):
        shuffled = paths.copy()
        random.Random(seed).shuffle(shuffled)
        tree = make_tree("x", shuffled)
        assert tree.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 2))
    assert tree.size == 7
    assert tree.parents == (0, 0, 0, 1, 1, 2, 3)
    assert tree.depths == (0, 1, 1, 2, 2, 2, 3)
    assert tree.ancestors[6] == {0, 1, 3, 6}
    assert tree.ancestors[5] == {0, 2, 5}
    assert (tree.depth, tree.width) == (3, 3)


def test_the_tree_of_the_root_alone() -> None:
    tree = make_tree("x", [])
    assert (tree.size, tree.depth, tree.width) == (1, 0, 0)
    assert (tree.parents, tree.depths, tree.ancestors) == ((0,), (0,), (frozenset({0}),))
    tree.check_fits(0, 0)


@pytest.mark.parametrize("name", published_tree_names())
def test_topology_of_published_trees(name: str) -> None:
    tree = load_tree(name)
    assert tree.name == name
    for node, path in enumerate(tree.paths, start=1):
        parent = tree.parents[node]
        assert parent < node
        assert (tree.paths[parent - 1] if parent else ()) == path[:-1]
        assert tree.ancestors[node] == tree.ancestors[parent] | {node}
        assert tree.depths[node] == len(path)
    assert tree.size == 64


def test_a_tree_that_does_not_fit_the_heads() -> None:
    tree = make_tree("x", [[0], [0, 0], [0, 6]])
    tree.check_fits(2, 7)
    assert tree.fits(2, 7)
    assert not tree.fits(1, 7)
    assert not tree.fits(2, 6)
    with pytest.raises(TreeError, match="tree 'x' is 2 deep, but there are only 1 draft heads"):
        tree.check_fits(1, 7)
    with pytest.raises(TreeError, match="tree 'x' uses rank 6, but a head has only 6 guesses"):
        tree.check_fits(2, 6)


def test_trees_from_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("[[1], [0], [0, 3]]")
    assert load_tree(file) == Tree("mine", ((0,), (1,), (0, 3)))
    file.write_text(json.dumps({"name": "other", "paths": [[0]]}))
    assert load_tree(str(file)) == Tree("other", ((0,),))


BROKEN_FILES = {
    "not JSON": (b"[[0]", "is not JSON"),
    "endless nesting": (b"[" * 100_000, "is not JSON"),
    "an endless number": (b"[[1" + b"0" * 10_000 + b"]]", "is not JSON"),
    "not UTF-8": (b"\xff\xfe", "neither a readable file nor one of mc_sim"),
    "a number": (b"3", "holds no list of rank paths"),
    "an object without paths": (b'{"name": "x"}', "holds no list of rank paths"),
    "paths that are text": (b'{"paths": "0"}', "holds no list of rank paths"),
    "a bad path": (b'{"name": "y", "paths": [[0], 7]}', "tree 'y': a path is a non-empty list"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_tree_files(tmp_path: Path, case: str) -> None:
    content, message = BROKEN_FILES[case]
    file = tmp_path / "tree.json"
    file.write_bytes(content)
    with pytest.raises(TreeError, match=message):
        load_tree(file)


@pytest.mark.parametrize("name", ["nosuch", "/nosuch/tree.json", "", "tree\0", "x" * 5000])
def test_no_such_tree(name: str) -> None:
    with pytest.raises(TreeError, match="neither a readable file nor one of mc_sim_7b_63, "):
        load_tree(name)


def all_trees(size: int, depth: int, width: int) -> Iterator[set[RankPath]]:
    """Every prefix-closed set of `size` - 1 paths."""
    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(width), repeat=d)]
    for chosen in itertools.combinations(paths, size - 1):
        tree = set(chosen)
        if all(len(path) == 1 or path[:-1] in tree for path in tree):
            yield tree


@pytest.mark.parametrize("seed", range(8))
def test_grown_tree_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    accuracies = [[rng.random() / 2 for _ in range(3)] for _ in range(2)]  # ranks in any order
    for size in range(1, 8):
        best = max(
            expected_acceptance_length(make_tree("brute", tree), accuracies)
            for tree in all_trees(size, depth=2, width=3)
        )
        grown = grow_tree(accuracies, size)
        assert grown.size == size
        assert expected_acceptance_length(grown, accuracies) == pytest.approx(best, abs=1e-12)


def test_grown_trees_nest_and_gain_with_size() -> None:
    accuracies = [[0.6, 0.15, 0.1, 0.05], [0.4, 0.1, 0.1], [0.3, 0.1]]
    previous = grow_tree(accuracies, 1)
    gains = []
    for size in range(2, 40):
        tree = grow_tree(accuracies, size)
        assert set(previous.paths) < set(tree.paths)
        gains.append(
            expected_acceptance_length(tree, accuracies) - expected_acceptance_length(previous, accuracies)
        )
        previous = tree
    assert min(gains) > 0
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(gains))


def test_growing_ends_where_there_is_nothing_to_add() -> None:
    assert grow_tree([[0.5, 0.2], [0.4]], 100).size == 1 + 2 + 2
    assert grow_tree([], 10).size == 1
    assert grow_tree([[], [0.5]], 10).size == 1
    assert grow_tree([[0.0, 0.0], [0.0]], 10, name="hopeless").name == "hopeless"


def test_expected_acceptance_length_by_hand() -> None:
    tree = make_tree("x", [[0], [1], [0, 1]])
    assert expected_acceptance_length(tree, [[0.5, 0.2], [0.4, 0.3]]) == pytest.approx(1 + 0.5 + 0.2 + 0.15)


@pytest.mark.parametrize(("nodes", "paths"), [(16, 129), (64, 1456)])
def test_superset_of_the_design(nodes: int, paths: int) -> None:
    superset = superset_paths(nodes - 1, 4, nodes - 1)
    assert len(superset) == len(set(superset)) == paths
    assert make_tree("superset", superset[: MAX_NODES - 1]).paths == superset[: MAX_NODES - 1]  # canonical


def test_superset_within_depth_and_width() -> None:
    assert superset_paths(5, 0, 5) == ()
    assert superset_paths(3, 1, 2) == ((0,), (1,))
    assert superset_paths(3, 4, 3) == ((0,), (1,), (2,), (0, 0), (0, 1), (0, 0, 0))


@pytest.mark.parametrize("seed", range(30))
def test_superset_holds_every_best_choice(seed: int) -> None:
    rng = random.Random(seed)
    nodes, depth, width = rng.choice([(3, 3, 3), (7, 3, 7), (11, 2, 11), (6, 4, 4)])
    sharpness = rng.choice([0.2, 1.0, 5.0])
    heads = []
    for _ in range(depth):
        weights = sorted((rng.random() ** sharpness for _ in range(width)), reverse=True)
        heads.append([w / sum(weights) for w in weights])

    def joint(path: RankPath) -> float:
        value = 1.0
        for head, rank in zip(heads, path, strict=False):
            value *= head[rank]
        return value

    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(width), repeat=d)]
    best = sorted(paths, key=joint, reverse=True)[:nodes]
    assert set(best) <= set(superset_paths(nodes, depth, width))
