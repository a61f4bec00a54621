"""How many nodes a tree gets at start: chosen from step times and expected tokens."""

from collections.abc import Mapping

from medusa_core.draft.accuracy import HeadCalibration, bracket
from medusa_core.draft.head_trees import fitting_trees
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.tree import Tree, expected_acceptance_length, grow_tree

TREE_SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64)  # measured at start, root included
NGRAM_NODES = 16  # where nobody says how many


def expected_tokens(calibration: HeadCalibration, nodes: int, kind: str = "dynamic") -> float:
    """A(T): mean acceptance length with a tree of `nodes`, measured if calibrated, else estimated."""
    measured = calibration.expected.get(kind, {})
    if measured and min(measured) <= nodes <= max(measured):
        low, high, share = bracket(measured, nodes)
        return measured[low] + share * (measured[high] - measured[low])
    return expected_acceptance_length(grow_tree(calibration.accuracies, nodes), calibration.accuracies)


def expected_speedup(seconds: Mapping[int, float], calibration: HeadCalibration, nodes: int) -> float:
    """Tokens per second with trees of that many nodes, relative to none; `seconds`: of a step, by nodes."""
    tokens = expected_tokens(calibration, nodes) if nodes > 1 else 1.0
    return tokens * seconds[1] / seconds[nodes]


def fastest_size(seconds: Mapping[int, float], calibration: HeadCalibration) -> int:
    """The tree size with the most expected tokens per second: argmax A(T) / t(T); 1 is off."""
    return max(seconds, key=lambda nodes: expected_speedup(seconds, calibration, nodes))


def explain_choice(seconds: Mapping[int, float], calibration: HeadCalibration, nodes: int) -> str:
    """Why trees of `nodes` in figures; of 1, what the best tree would have given."""
    trees = [nodes] if nodes > 1 else [size for size in seconds if size > 1]
    tree = max(trees, key=lambda size: expected_speedup(seconds, calibration, size))
    tokens, speedup = expected_tokens(calibration, tree), expected_speedup(seconds, calibration, tree)
    figures = (
        f"{tokens:.2f} tokens expected in a step of {1e3 * seconds[tree]:.2f} ms, one in a plain step of "
        f"{1e3 * seconds[1]:.2f} ms: {speedup:.2f}x"
    )
    if nodes > 1:
        return f"a tree of {tree} nodes has {figures}"
    return f"no tree pays here: the best, of {tree} nodes, has {figures}"


def scratch_rows(heads: DraftHeads | None, static_tree: Tree | None, tree_nodes: int | None) -> int:
    """Cache rows after the context for the largest tree that is measured or asked for."""
    named = [] if heads is None else [tree.size for tree in fitting_trees(heads)]
    own = [static_tree.size] if static_tree is not None else []
    return max(*named, *own, tree_nodes or 1, *TREE_SIZES)
