"""How many tokens a slot's cache has room for beyond the context."""

from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.tree import Tree
from medusa_core.draft.tree_size import scratch_rows
from medusa_core.programs.sizes import padded_size


def cache_scratch(heads: DraftHeads | None, static_tree: Tree | None, tree_nodes: int | None) -> int:
    """For the largest tree as it runs, and one more: compiled programs never look at all of a cache."""
    return padded_size(scratch_rows(heads, static_tree, tree_nodes)) + 1
