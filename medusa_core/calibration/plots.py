"""Plots of a calibration as PNG and SVG: static tree, accuracy by rank, speedup by tree size.

Needs matplotlib (the extra `plot`); figures only, so no window and no state between calls.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_core.draft.accuracy import HeadCalibration, wilson_interval
from medusa_core.draft.tree import Tree, grow_tree
from medusa_core.draft.tree_size import TREE_SIZES, expected_tokens
from medusa_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_RANKS = 10
DEFAULT_NODES = 16  # of the tree shown if calibration chose none or only the root
FORMATS = ("png", "svg")
DPI = 150


def check_matplotlib() -> None:
    """Raise `ConfigError` without matplotlib; call it before calibrating."""
    if find_spec("matplotlib") is None:
        raise ConfigError('plots need matplotlib: pip install "medusa-serve[plot]"')


def save_plots(calibration: HeadCalibration, folder: Path) -> list[Path]:
    """Write `tree`, `accuracy` and `speedup` to `folder`, each as .png and .svg; returns the six files.

    Raises `DataError` if they cannot be written.
    """
    check_matplotlib()
    from matplotlib import rc_context

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in (("tree", draw_tree), ("accuracy", draw_accuracy), ("speedup", draw_speedup)):
            figure = draw(calibration)
            for kind in FORMATS:
                paths.append(folder / f"{name}.{kind}")
                # Neither a date nor random ids: the same calibration is the same file.
                with rc_context({"svg.hashsalt": name}):
                    figure.savefig(paths[-1], dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise DataError(f"cannot write plots to {folder}: {error.strerror}") from error
    return paths


def draw_tree(calibration: HeadCalibration) -> "Figure":
    """The static tree of the chosen size; a node's area shows how likely its path is right."""
    tree = shown_tree(calibration)
    places = layout(tree)
    figure, axes = _axes(max(6.0, 0.28 * tree.size), 1.2 + 1.1 * tree.depth)
    values = [1.0, *(_path_value(path, calibration) for path in tree.paths)]
    for node in range(1, tree.size):
        (x, y), (above_x, above_y) = places[node], places[tree.parents[node]]
        axes.plot([above_x, x], [above_y, y], color="0.6", linewidth=0.5 + 3.0 * values[node], zorder=1)
    xs, ys = zip(*places, strict=True)
    sizes = [60.0 + 400.0 * value for value in values]
    axes.scatter(xs, ys, s=sizes, c=tree.depths, cmap="viridis", vmin=-1, zorder=2)
    for node, path in enumerate(tree.paths, start=1):
        label = f"{path[-1] + 1}"
        axes.annotate(label, places[node], xytext=(0, -14), textcoords="offset points", ha="center", size=7)
    axes.set_yticks(range(0, -tree.depth - 1, -1), ["root", *(f"head {k + 1}" for k in range(tree.depth))])
    axes.set_xticks([])
    axes.set_ylim(-tree.depth - 0.5, 0.5)
    axes.set_frame_on(False)
    axes.set_title(f"Static draft tree, {tree.size} nodes (numbers: rank of the guess)")
    return figure


def draw_accuracy(calibration: HeadCalibration) -> "Figure":
    """Accuracy of each head by rank, with 95 % intervals if positions were counted."""
    figure, axes = _axes(7.0, 4.5)
    for head, rates in enumerate(calibration.accuracies):
        shown = [(rank, rate) for rank, rate in enumerate(rates[:SHOWN_RANKS], start=1) if rate > 0.0]
        if not shown:
            continue
        ranks, values = zip(*shown, strict=True)
        errors = None
        if calibration.counts:
            bounds = [wilson_interval(value, calibration.counts[head]) for value in values]
            spans = [(v - low, high - v) for v, (low, high) in zip(values, bounds, strict=True)]
            errors = list(zip(*spans, strict=True))
        name = f"head {head + 1}"
        axes.errorbar(ranks, values, yerr=errors, marker="o", markersize=4, capsize=2, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(1, SHOWN_RANKS + 1))
    axes.set_xlabel("rank of the guess")
    axes.set_ylabel("share of positions at which it was right")
    axes.set_title("Head accuracy by rank" + (" (95 % intervals)" if calibration.counts else ""))
    axes.grid(visible=True, which="both", alpha=0.3)
    if axes.containers:
        axes.legend()
    return figure


def draw_speedup(calibration: HeadCalibration) -> "Figure":
    """Expected speedup by tree size; tokens per step without measured step times."""
    seconds = calibration.step_seconds if 1 in calibration.step_seconds else {}
    figure, axes = _axes(7.0, 4.5)
    for kind, lengths in expected_lengths(calibration).items():
        sizes = [n for n in sorted(lengths) if not seconds or n in seconds]
        values = [lengths[n] * (seconds[1] / seconds[n] if seconds else 1.0) for n in sizes]
        axes.plot(sizes, values, marker="o", markersize=4, label=kind)
    axes.axhline(1.0, color="0.5", linewidth=0.8, label="no speculation")
    if calibration.tree_nodes:
        chosen = f"fastest here: {calibration.tree_nodes}"
        axes.axvline(calibration.tree_nodes, color="0.5", linestyle="--", linewidth=0.8, label=chosen)
    axes.set_xlabel("nodes of the tree, root included")
    axes.set_ylabel("speedup (greedy)" if seconds else "tokens per step (greedy)")
    where = f" on {calibration.machine}" if seconds and calibration.machine else ""
    axes.set_title(f"Expected {'speedup' if seconds else 'acceptance length'} by tree size{where}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def shown_tree(calibration: HeadCalibration) -> Tree:
    """The static tree of the size calibration chose."""
    nodes = calibration.tree_nodes or DEFAULT_NODES
    return grow_tree(calibration.accuracies, nodes if nodes > 1 else DEFAULT_NODES)


def expected_lengths(calibration: HeadCalibration) -> Mapping[str, Mapping[int, float]]:
    """Tokens per step by kind of tree and size: measured, else estimated from the accuracies."""
    measured = {f"{kind} tree": row for kind, row in calibration.expected.items() if row}
    if measured:
        return measured
    estimated = {n: expected_tokens(calibration, n, "static") for n in TREE_SIZES}
    return {"static tree, if heads err independently": estimated}


def layout(tree: Tree) -> list[tuple[float, float]]:
    """(x, y) of each node: y = -depth, leaves side by side, a parent above the middle of its children."""
    children: dict[int, list[int]] = {node: [] for node in range(tree.size)}
    for node in range(1, tree.size):
        children[tree.parents[node]].append(node)
    xs = [math.nan] * tree.size
    next_leaf = 0

    def place(node: int) -> None:
        nonlocal next_leaf
        for child in children[node]:
            place(child)
        if children[node]:
            xs[node] = (xs[children[node][0]] + xs[children[node][-1]]) / 2
        else:
            xs[node] = float(next_leaf)
            next_leaf += 1

    place(0)
    return [(x, -float(depth)) for x, depth in zip(xs, tree.depths, strict=True)]


def _path_value(path: tuple[int, ...], calibration: HeadCalibration) -> float:
    return math.prod(calibration.accuracies[depth][rank] for depth, rank in enumerate(path))


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
