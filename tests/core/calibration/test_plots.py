"""The pictures of a calibration, really drawn."""

import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medusa_core.calibration import plots
from medusa_core.calibration.plots import (
    draw_accuracy,
    draw_speedup,
    draw_tree,
    layout,
    save_plots,
    shown_tree,
)
from medusa_core.checkpoints.writing import save_heads
from medusa_core.cli.main import app
from medusa_core.draft.accuracy import HeadCalibration, default_calibration, save_calibration
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.tree import grow_tree, make_tree
from medusa_core.errors import ConfigError, DataError

MEASURED = HeadCalibration(
    accuracies=((0.6, 0.1, 0.0), (0.4, 0.1, 0.05)),
    counts=(200, 180),
    expected={"static": {2: 1.6, 4: 1.9, 8: 2.0}, "dynamic": {2: 1.6, 4: 2.0, 8: 2.2}},
    step_seconds={1: 0.010, 2: 0.0125, 4: 0.015, 8: 0.020},
    tree_nodes=4,
    machine="x86_64 cpu float32",
)
NAMES = [f"{name}.{kind}" for name in ("tree", "accuracy", "speedup") for kind in ("png", "svg")]


def test_six_pictures(tmp_path: Path) -> None:
    paths = save_plots(MEASURED, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == NAMES
    for path in paths:
        if path.suffix == ".png":
            head = path.read_bytes()[:24]
            assert head.startswith(b"\x89PNG")
            assert min(struct.unpack(">II", head[16:24])) > 300  # width and height, pixels
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_the_tree_has_its_nodes_and_edges() -> None:
    tree = shown_tree(MEASURED)
    assert tree.size == 4
    axes = draw_tree(MEASURED).axes[0]
    assert len(axes.lines) == tree.size - 1
    assert [tuple(offset) for offset in axes.collections[0].get_offsets().tolist()] == layout(tree)
    assert "4 nodes" in axes.get_title()
    assert (
        len(draw_tree(default_calibration(5)).axes[0].lines)
        == shown_tree(default_calibration(5)).size - 1
        == 15
    )


def test_layout_keeps_subtrees_apart() -> None:
    tree = make_tree("t", [[0], [1], [0, 0], [0, 1], [1, 0]])
    assert layout(tree) == [(1.25, 0), (0.5, -1), (2.0, -1), (0, -2), (1, -2), (2, -2)]
    places = layout(grow_tree(default_calibration(4).accuracies, 64))
    assert len(set(places)) == 64


def test_accuracies_have_their_intervals() -> None:
    axes = draw_accuracy(MEASURED).axes[0]
    first, second = axes.containers
    assert list(first.lines[0].get_xdata()) == [1, 2]  # a rate of 0 has no place on a logarithmic axis
    assert list(second.lines[0].get_ydata()) == [0.4, 0.1, 0.05]
    assert second.has_yerr
    assert not draw_accuracy(default_calibration(2)).axes[0].containers[0].has_yerr
    assert draw_accuracy(HeadCalibration(accuracies=((0.0,),))).axes[0].containers == []


def test_speedup_is_length_over_step_time() -> None:
    axes = draw_speedup(MEASURED).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["dynamic tree"].get_xdata()) == [2, 4, 8]
    assert list(lines["dynamic tree"].get_ydata()) == pytest.approx([1.28, 2.0 / 1.5, 1.1])
    assert axes.get_ylabel() == "speedup (greedy)"
    assert "fastest here: 4" in lines


def test_without_step_times_it_is_the_length() -> None:
    axes = draw_speedup(default_calibration(4)).axes[0]
    assert axes.get_ylabel() == "tokens per step (greedy)"
    lengths = list(axes.lines[0].get_ydata())
    assert lengths == sorted(lengths)
    assert 2.0 < lengths[-1] < 2.6


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write plots"):
        save_plots(MEASURED, tmp_path / "file" / "below")


def calibrate(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["calibrate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_command_draws_what_it_measures_and_what_is_stored(
    tmp_path: Path, tiny_model_dir: Path, random_heads: MedusaHeads
) -> None:
    heads = tmp_path / "heads"
    save_heads(random_heads, heads, base_model=str(tiny_model_dir))
    where = ("--model", tiny_model_dir, "--heads", heads)
    with pytest.raises(DataError, match=r"no calibration.json in .* to draw"):
        calibrate(*where, "--plot", tmp_path / "a", "--plot-only")
    quick = ("--max-tokens", "10", "--temperatures", "0.7", "--limit", "2", "--max-length", "64")
    calibrate(*where, *quick, "--dtype", "float32", "--plot", tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(NAMES)
    shown = calibrate(*where, "--plot", tmp_path / "b", "--plot-only")
    assert f"Drawn in {tmp_path / 'b'}: tree.png" in shown
    for name in NAMES:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    save_calibration(MEASURED, tmp_path)
    with pytest.raises(ConfigError, match=r'pip install "medusa-serve\[plot\]"'):
        calibrate("--plot", tmp_path / "a", "--plot-only", "--out", tmp_path)
    assert not (tmp_path / "a").exists()
