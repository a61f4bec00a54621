"""Sizes in which trees run: few different ones, so that a row is computed the same way in each."""

from medusa_core.programs.program import MAX_NODES, MIN_NODES

FINE_STEP, COARSE_STEP = 4, 8  # between sizes up to 16 nodes, and beyond
FINE_SIZES = 16


def padded_size(nodes: int) -> int:
    """The size that trees of so many nodes run in."""
    step = FINE_STEP if nodes <= FINE_SIZES else COARSE_STEP
    return min(MAX_NODES, max(MIN_NODES, -(-nodes // step) * step))
