"""The draft trees that a set of heads can fill, by name and size: drafters are built once and kept."""

from collections.abc import Callable

import torch

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.head_drafter import HeadDrafter, make_drafter
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.tree import Tree, grow_tree, load_tree, published_tree_names
from medusa_core.errors import TreeError
from medusa_core.programs.switch import Switch

DYNAMIC, STATIC = "dynamic", "static"


class HeadTrees:
    """Turns a tree's name and a size into a drafter. `static_tree`: what "static" means."""

    def __init__(
        self,
        heads: DraftHeads,
        calibration: HeadCalibration,
        device: torch.device,
        static_tree: Tree | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`vocab_size`: the backbone's, if the heads' is smaller."""
        if static_tree:
            static_tree.check_fits(heads.num_heads, heads.vocab_size)
        self.heads, self.calibration, self._device = heads, calibration, device
        self._static_tree = static_tree
        self._published = {tree.name: tree for tree in fitting_trees(heads)}
        self._vocab_size = vocab_size
        self._drafters: dict[tuple[str, int], HeadDrafter] = {}
        self._on_new: Callable[[Switch], None] | None = None

    def on_new(self, tell: Callable[[Switch], None]) -> None:
        """Have `tell` called with the program of each drafter that is built."""
        self._on_new = tell

    @property
    def names(self) -> tuple[str, ...]:
        """Every tree a request may ask for that these heads can fill."""
        return (DYNAMIC, STATIC, *self._published)

    def check(self, name: str) -> None:
        """Raise `TreeError` if no such tree can be filled."""
        if name not in self.names:
            raise TreeError(f"no draft tree {name!r}; choose one of {', '.join(self.names)}")

    def is_adaptive(self, name: str) -> bool:
        """Whether the tree comes in any size."""
        return name == DYNAMIC or (name == STATIC and self._static_tree is None)

    def drafter(self, name: str, nodes: int) -> HeadDrafter:
        """`nodes` (root included) applies to adaptive trees."""
        key = (name, nodes if self.is_adaptive(name) else 0)
        if key not in self._drafters:
            shape = self._shape(name, nodes)
            drafter = make_drafter(self.heads, shape, self._device, self._vocab_size)
            if self._on_new is not None:
                self._on_new(drafter.run)
            self._drafters[key] = drafter
        return self._drafters[key]

    def _shape(self, name: str, nodes: int) -> Tree | int:
        if name == DYNAMIC:
            return nodes
        if name == STATIC:
            return self._static_tree or self._grown(nodes)
        return self._published[name]

    def _grown(self, nodes: int) -> Tree:
        """From the calibrated accuracies, of ranks that a small vocabulary has."""
        accuracies = self.calibration.accuracies[: self.heads.num_heads]
        return grow_tree([head[: self.heads.vocab_size] for head in accuracies], nodes)


def fitting_trees(heads: DraftHeads) -> list[Tree]:
    """The published trees that these heads can fill."""
    trees = [load_tree(name) for name in published_tree_names()]
    return [tree for tree in trees if tree.fits(heads.num_heads, heads.vocab_size)]
