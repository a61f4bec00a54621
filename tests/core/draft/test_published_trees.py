"""The published trees are data; these facts were counted in the reference (63 nodes below the root each)."""

import json
from collections import Counter
from importlib import resources

import pytest

# name: (nodes per depth, leaves)
PUBLISHED = {
    "mc_sim_7b_63": ((10, 28, 23, 2), 42),
    "vicuna_7b_stage2": ((10, 23, 23, 7), 42),
    "vicuna_7b_stage1_ablation": ((10, 21, 25, 7), 42),
    "vicuna_7b_stage1": ((10, 32, 20, 1), 44),
    "vicuna_13b_stage2": ((10, 19, 25, 9), 42),
    "vicuna_13b_stage1": ((10, 29, 23, 1), 44),
    "vicuna_33b_stage2": ((10, 24, 24, 5), 43),
    "vicuna_33b_stage1": ((10, 34, 19), 46),
    "zephyr_stage2": ((10, 27, 23, 3), 44),
}


def read_paths(name: str) -> list[tuple[int, ...]]:
    record = json.loads((resources.files("medusa_core.draft") / "trees" / f"{name}.json").read_text())
    assert record["name"] == name
    assert "FasterDecoding/Medusa" in record["source"]
    return [tuple(path) for path in record["paths"]]


def test_every_shipped_tree_is_listed_here() -> None:
    folder = resources.files("medusa_core.draft") / "trees"
    assert {entry.name for entry in folder.iterdir()} == {f"{name}.json" for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tree_has_the_counted_shape(name: str) -> None:
    paths = read_paths(name)
    per_depth, num_leaves = PUBLISHED[name]
    assert len(paths) == len(set(paths)) == 63
    depths = Counter(len(path) for path in paths)
    assert tuple(depths[depth] for depth in sorted(depths)) == per_depth
    parents = {path[:-1] for path in paths}
    assert sum(path not in parents for path in paths) == num_leaves


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tree_is_prefix_closed_with_contiguous_ranks(name: str) -> None:
    paths = set(read_paths(name))
    for path in paths:
        assert 0 <= path[-1] <= 9
        assert len(path) == 1 or path[:-1] in paths
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths


def test_published_trees_differ() -> None:
    trees = {frozenset(read_paths(name)) for name in PUBLISHED}
    assert len(trees) == len(PUBLISHED)
