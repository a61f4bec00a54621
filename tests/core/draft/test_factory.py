"""Which drafter a request gets."""

from pathlib import Path

import pytest
import torch

from medusa_core.draft.accuracy import HeadCalibration, default_calibration
from medusa_core.draft.dynamic import DynamicDrafter, StaticDrafter
from medusa_core.draft.factory import SpeculatorFactory
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.source import ParallelSpeculator
from medusa_core.draft.tree import make_tree, published_tree_names
from medusa_core.errors import TreeError
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.conftest import new_heads, speculate

CPU = torch.device("cpu")
CALIBRATION = HeadCalibration(
    accuracies=((0.6, 0.2), (0.5, 0.1), (0.4, 0.1), (0.3, 0.1)),
    temperatures={0.0: (1.0, 1.0, 1.0, 1.0), 1.0: (2.0, 2.0, 3.0, 3.0)},
)


def params(tree: str, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, speculation=speculate(tree=tree))


def test_trees_by_name(random_heads: MedusaHeads) -> None:
    factory = SpeculatorFactory(random_heads, CALIBRATION, CPU)
    assert factory.names == ("dynamic", "static", *published_tree_names())
    assert factory.largest == 64
    for tree, nodes, kind, size in (
        ("dynamic", 12, DynamicDrafter, 12),
        ("static", 12, StaticDrafter, 12),
        ("mc_sim_7b_63", 12, StaticDrafter, 64),
    ):
        factory.check(tree)
        speculator = factory.speculator(params(tree), nodes)
        assert isinstance(speculator, ParallelSpeculator)
        assert isinstance(speculator.drafter, kind)
        assert speculator.drafter.size == size
        assert factory.is_adaptive(tree) == (size == 12)
        again = factory.speculator(params(tree), nodes)
        assert isinstance(again, ParallelSpeculator)
        assert again.drafter is speculator.drafter  # built once


def test_one_node_is_none_unless_a_tree_is_named(random_heads: MedusaHeads) -> None:
    factory = SpeculatorFactory(random_heads, CALIBRATION, CPU)
    assert factory.speculator(params("dynamic"), 1) is None
    assert factory.speculator(params("static"), 1) is None
    assert factory.speculator(params("mc_sim_7b_63"), 1) is not None


def test_taus_of_the_temperature(random_heads: MedusaHeads) -> None:
    factory = SpeculatorFactory(random_heads, CALIBRATION, CPU)
    speculator = factory.speculator(params("dynamic", temperature=0.5), 8)
    assert speculator is not None
    assert speculator.taus == pytest.approx((1.5, 1.5, 2.0, 2.0))


def test_a_tree_of_ones_own_is_what_static_means(random_heads: MedusaHeads) -> None:
    tree = make_tree("own", [[0], [1], [0, 3]])
    factory = SpeculatorFactory(random_heads, CALIBRATION, CPU, tree)
    speculator = factory.speculator(params("static"), 40)
    assert isinstance(speculator, ParallelSpeculator)
    assert speculator.drafter.size == 4
    assert not factory.is_adaptive("static")
    with pytest.raises(TreeError, match="tree 'deep' is 5 deep, but there are only 4 draft heads"):
        SpeculatorFactory(random_heads, CALIBRATION, CPU, make_tree("deep", [[0] * n for n in range(1, 6)]))
    with pytest.raises(TreeError, match="tree 'wide' uses rank 320, but a head has only 320 guesses"):
        SpeculatorFactory(random_heads, CALIBRATION, CPU, make_tree("wide", [[320]]))


def test_heads_with_few_output_rows(tiny_backbone: Backbone) -> None:
    """Published trees need ten guesses a head; a grown one takes what there is."""
    heads = MedusaHeads(num_heads=4, num_layers=1, hidden_size=64, vocab_size=3)
    calibration = HeadCalibration(accuracies=((0.3, 0.2, 0.1, 0.1, 0.1),) * 4)
    factory = SpeculatorFactory(heads, calibration, CPU)
    assert factory.names == ("dynamic", "static")
    for tree in factory.names:
        speculator = factory.speculator(params(tree), 24)
        assert speculator is not None
        drafted = speculator.propose(torch.zeros(1, 64), torch.tensor([9]), 0.0, None)
        assert int(drafted.tokens_BT[0, 1:].max()) < 3


def test_unknown_trees(random_heads: MedusaHeads, tiny_backbone: Backbone, tmp_path: Path) -> None:
    factory = SpeculatorFactory(random_heads, default_calibration(4), CPU)
    file = tmp_path / "tree.json"
    file.write_text("[[0]]")
    for name in ("nosuch", "", "Dynamic", str(file)):  # requests name trees, never files
        with pytest.raises(TreeError, match="choose one of dynamic, static, mc_sim_7b_63"):
            factory.check(name)
    shallow = SpeculatorFactory(new_heads(tiny_backbone, 1), default_calibration(1), CPU)
    assert shallow.names == ("dynamic", "static")
    assert shallow.largest == 1
