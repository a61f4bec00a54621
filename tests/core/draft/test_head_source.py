"""Which trees heads draft for a request, and what they remember of sequences."""

from pathlib import Path

import pytest
import torch

from medusa_core.draft.accuracy import HeadCalibration, default_calibration
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.head_trees import HeadTrees
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.tree import make_tree, published_tree_names
from medusa_core.draft.tree_size import scratch_rows
from medusa_core.errors import TreeError
from medusa_core.model.backbone import Backbone
from tests.core.conftest import new_heads, speculate
from tests.core.stepping import head_source

CPU = torch.device("cpu")
CALIBRATION = HeadCalibration(
    accuracies=((0.6, 0.2), (0.5, 0.1), (0.4, 0.1), (0.3, 0.1)),
    temperatures={0.0: (1.0, 1.0, 1.0, 1.0), 1.0: (2.0, 2.0, 3.0, 3.0)},
)


def test_trees_by_name(random_heads: MedusaHeads) -> None:
    trees = HeadTrees(random_heads, CALIBRATION, CPU)
    assert trees.names == ("dynamic", "static", *published_tree_names())
    scores = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    for tree, nodes, size in (("dynamic", 12, 12), ("static", 12, 12), ("mc_sim_7b_63", 12, 64)):
        trees.check(tree)
        drafter = trees.drafter(tree, nodes)
        drafted = [
            drafter.draft(hidden, torch.tensor([9]), (1.0,) * 4, 0.0, None) for hidden in (scores, -scores)
        ]
        assert [draft.size for draft in drafted] == [drafter.size] * 2 == [size] * 2
        same_shape = torch.equal(drafted[0].parents_BT, drafted[1].parents_BT)
        assert same_shape == (tree != "dynamic")
        assert trees.is_adaptive(tree) == (size == 12)
        assert trees.drafter(tree, nodes) is drafter  # built once


def test_depth_and_adaptivity_of_what_requests_ask_for(random_heads: MedusaHeads) -> None:
    source = HeadSource(HeadTrees(random_heads, CALIBRATION, CPU))
    assert source.is_adaptive(speculate(tree="dynamic"))
    assert not source.is_adaptive(speculate(tree="mc_sim_7b_63"))
    assert source.max_depth(speculate(tree="mc_sim_7b_63"), 1) == 4
    assert source.max_depth(speculate(), 3) == 2


def test_a_tree_of_ones_own_is_what_static_means(random_heads: MedusaHeads) -> None:
    trees = HeadTrees(random_heads, CALIBRATION, CPU, make_tree("own", [[0], [1], [0, 3]]))
    assert trees.drafter("static", 40).size == 4
    assert not trees.is_adaptive("static")
    with pytest.raises(TreeError, match="tree 'deep' is 5 deep, but there are only 4 draft heads"):
        HeadTrees(random_heads, CALIBRATION, CPU, make_tree("deep", [[0] * n for n in range(1, 6)]))
    with pytest.raises(TreeError, match="tree 'wide' uses rank 320, but a head has only 320 guesses"):
        HeadTrees(random_heads, CALIBRATION, CPU, make_tree("wide", [[320]]))


def test_heads_with_few_output_rows() -> None:
    """Published trees need ten guesses a head; a grown one takes what there is."""
    heads = MedusaHeads(num_heads=4, num_layers=1, hidden_size=64, vocab_size=3)
    calibration = HeadCalibration(accuracies=((0.3, 0.2, 0.1, 0.1, 0.1),) * 4)
    trees = HeadTrees(heads, calibration, CPU)
    assert trees.names == ("dynamic", "static")
    for tree in trees.names:
        drafted = trees.drafter(tree, 24).draft(torch.zeros(1, 64), torch.tensor([9]), (1.0,) * 4, 0.0, None)
        assert int(drafted.tokens_BT[0, 1:].max()) < 3


def test_unknown_trees(random_heads: MedusaHeads, tiny_backbone: Backbone, tmp_path: Path) -> None:
    source = head_source(random_heads)
    file = tmp_path / "tree.json"
    file.write_text("[[0]]")
    for name in ("nosuch", "", "Dynamic", str(file)):  # requests name trees, never files
        with pytest.raises(TreeError, match="choose one of dynamic, static, mc_sim_7b_63"):
            source.check(speculate(tree=name))
    shallow = HeadTrees(new_heads(tiny_backbone, 1), default_calibration(1), CPU)
    assert shallow.names == ("dynamic", "static")


def test_scratch_rows_hold_the_largest_tree(random_heads: MedusaHeads, tiny_backbone: Backbone) -> None:
    assert scratch_rows(None, None, None) == 64  # n-grams need no heads
    assert scratch_rows(random_heads, None, None) == 64
    assert scratch_rows(new_heads(tiny_backbone, 1), None, 100) == 100
    assert scratch_rows(random_heads, make_tree("wide", [[n] for n in range(90)]), None) == 91
