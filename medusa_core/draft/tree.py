"""Draft trees as plain data: rank paths, their validation, published and grown trees. No tensors.

A tree is a set of *rank paths*: (r1, ..., rj) is the node reached by head 1's guess of rank r1, then head 2's
of rank r2, and so on (rank 0 is the best guess). Node 0 is the root, the already decided token; paths follow
sorted by length, then lexicographically, so a parent always precedes its children.
"""

import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from medusa_core.errors import TreeError

RankPath = tuple[int, ...]
Accuracies = Sequence[Sequence[float]]  # [head][rank]: P(the guess of that rank is right)
MAX_NODES = 1024


@dataclass(frozen=True)
class Tree:
    """A prefix-closed set of rank paths in canonical order. `size` counts the root."""

    name: str
    paths: tuple[RankPath, ...]

    @property
    def size(self) -> int:
        return len(self.paths) + 1

    @cached_property
    def depth(self) -> int:
        """Drafted tokens on the longest path: as many heads are needed."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def width(self) -> int:
        """Candidates needed of a head: highest rank + 1."""
        return max((max(path) + 1 for path in self.paths), default=0)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Index of each node's parent; the root is its own."""
        index = {path: i + 1 for i, path in enumerate(self.paths)} | {(): 0}
        return (0, *(index[path[:-1]] for path in self.paths))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return (0, *(len(path) for path in self.paths))

    @cached_property
    def ancestors(self) -> tuple[frozenset[int], ...]:
        """For each node: itself and every node on the way to the root."""
        result: list[frozenset[int]] = [frozenset({0})]
        for node in range(1, self.size):
            result.append(result[self.parents[node]] | {node})
        return tuple(result)

    def fits(self, num_heads: int, num_candidates: int) -> bool:
        """Whether heads can fill this tree."""
        return self.depth <= num_heads and self.width <= num_candidates

    def check_fits(self, num_heads: int, num_candidates: int) -> None:
        """Raise `TreeError` if the heads cannot fill this tree."""
        if self.depth > num_heads:
            raise TreeError(
                f"tree {self.name!r} is {self.depth} deep, but there are only {num_heads} draft heads"
            )
        if self.width > num_candidates:
            raise TreeError(
                f"tree {self.name!r} uses rank {self.width - 1}, but a head has only {num_candidates} guesses"
            )


def make_tree(name: str, paths: Iterable[Sequence[int]]) -> Tree:
    """Validate and order rank paths. Raises `TreeError` naming the first bad path."""
    seen: set[RankPath] = set()
    for raw in paths:
        if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
            raise TreeError(f"tree {name!r}: a path is a non-empty list of ranks, not {raw!r}")
        if any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in raw):
            raise TreeError(f"tree {name!r}: ranks are whole numbers from 0 on, not {list(raw)!r}")
        seen.add(tuple(raw))
    if len(seen) >= MAX_NODES:
        raise TreeError(f"tree {name!r} has {len(seen)} nodes, more than {MAX_NODES - 1}")
    for path in sorted(seen):
        if len(path) > 1 and path[:-1] not in seen:
            raise TreeError(f"tree {name!r}: {list(path)} is there without its parent {list(path[:-1])}")
    return Tree(name, tuple(sorted(seen, key=lambda p: (len(p), p))))


def published_tree_names() -> tuple[str, ...]:
    """Names of the trees shipped as data, the ones the Medusa authors published."""
    folder = resources.files("medusa_core.draft") / "trees"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def load_tree(name_or_file: str | Path) -> Tree:
    """A published tree by name, or one from a JSON file: a list of rank paths, or an object with `paths`."""
    text = str(name_or_file)
    if text in published_tree_names():
        raw = (resources.files("medusa_core.draft") / "trees" / f"{text}.json").read_text(encoding="utf-8")
    else:
        try:
            raw = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a null byte
            names = ", ".join(published_tree_names())
            raise TreeError(f"no tree {text!r}: neither a readable file nor one of {names}") from error
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TreeError(f"tree file {text} is not JSON: {error}") from error
    paths = data.get("paths") if isinstance(data, dict) else data
    if not isinstance(paths, list):
        raise TreeError(f"tree file {text} holds no list of rank paths")
    name = data.get("name", Path(text).stem) if isinstance(data, dict) else Path(text).stem
    return make_tree(str(name), paths)


def grow_tree(accuracies: Accuracies, size: int, name: str | None = None) -> Tree:
    """The tree of `size` nodes with the greatest expected acceptance length (paper §2.3.3 and appendix).

    Greedy: of all nodes whose parent is in the tree, add the one whose path is likeliest right. Optimal when
    the heads err independently, which the product of accuracies assumes.
    """
    ranked = [
        sorted(((p, rank) for rank, p in enumerate(head)), key=lambda item: (-item[0], item[1]))
        for head in accuracies
    ]
    heap: list[tuple[float, int, RankPath, tuple[int, ...]]] = []

    def offer(value: float, path: RankPath, order: tuple[int, ...]) -> None:
        heapq.heappush(heap, (-value, len(path), path, order))

    if ranked and ranked[0]:
        offer(ranked[0][0][0], (ranked[0][0][1],), (0,))
    chosen: list[RankPath] = []
    while heap and len(chosen) < size - 1:
        negative, depth, path, order = heapq.heappop(heap)
        chosen.append(path)
        head, place = ranked[depth - 1], order[-1]
        if place + 1 < len(head) and head[place][0] > 0:
            sibling = -negative / head[place][0] * head[place + 1][0]
            offer(sibling, (*path[:-1], head[place + 1][1]), (*order[:-1], place + 1))
        if depth < len(ranked) and ranked[depth]:
            best = ranked[depth][0]
            offer(-negative * best[0], (*path, best[1]), (*order, 0))
    return make_tree(name or f"grown-{size}", chosen)


def expected_acceptance_length(tree: Tree, accuracies: Accuracies) -> float:
    """Tokens per step if heads err independently: 1 + the sum over nodes of their path's probability."""
    total = 1.0
    for path in tree.paths:
        value = 1.0
        for depth, rank in enumerate(path):
            value *= accuracies[depth][rank]
        total += value
    return total


def superset_paths(nodes: int, depth: int, width: int) -> tuple[RankPath, ...]:
    """Every path that can be among the best `nodes` drafted ones, whatever the heads say.

    With ranks r counted from 1, path (r1..rd) is beaten or matched by every (s1..sj), j <= d, s <= r, of
    which there are the sum over j of r1*...*rj: a path with more than `nodes` of them is never needed.
    """
    result: list[RankPath] = []

    def extend(path: RankPath, product: int, total: int) -> None:
        for rank in range(width):
            new_product = product * (rank + 1)
            new_total = total + new_product
            if new_total > nodes:
                break
            result.append((*path, rank))
            if len(path) + 1 < depth:
                extend((*path, rank), new_product, new_total)

    if depth > 0:
        extend((), 1, 0)
    return tuple(sorted(result, key=lambda p: (len(p), p)))
