"""Which drafter a request gets: trees by kind, name and size, built once and kept."""

import torch

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.source import (
    AnyDrafter,
    Speculator,
    dynamic_drafter,
    make_speculator,
    static_drafter,
)
from medusa_core.draft.tree import Tree, grow_tree, load_tree, published_tree_names
from medusa_core.engine.step_times import TREE_SIZES
from medusa_core.errors import TreeError
from medusa_core.sampling_params import SamplingParams

DYNAMIC, STATIC = "dynamic", "static"


class SpeculatorFactory:
    """Turns a request's `speculation.tree` and a size into a `Speculator`.

    `static_tree`: what "static" means. `coupled` False drafts without the target's noise, to measure what
    that gains.
    """

    def __init__(
        self,
        heads: DraftHeads,
        calibration: HeadCalibration,
        device: torch.device,
        static_tree: Tree | None = None,
    ) -> None:
        if static_tree:
            static_tree.check_fits(heads.num_heads, heads.vocab_size)
        self.heads, self.calibration, self._device = heads, calibration, device
        self.coupled = True
        self._static_tree = static_tree
        trees = [load_tree(name) for name in published_tree_names()]
        self._published = {tree.name: tree for tree in trees if tree.fits(heads.num_heads, heads.vocab_size)}
        self._drafters: dict[tuple[str, int], AnyDrafter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tree a request may ask for that these heads can fill."""
        return (DYNAMIC, STATIC, *self._published)

    @property
    def largest(self) -> int:
        """Nodes of the largest tree a request can name."""
        named = [tree.size for tree in self._published.values()]
        return max([*named, self._static_tree.size if self._static_tree else 1])

    def is_adaptive(self, tree: str) -> bool:
        """Whether the engine chooses this tree's size; a named tree is used as it is."""
        return tree == DYNAMIC or (tree == STATIC and self._static_tree is None)

    def check(self, tree: str) -> None:
        """Raise `TreeError` if no such tree can be filled."""
        if tree not in self.names:
            raise TreeError(f"no draft tree {tree!r}; choose one of {', '.join(self.names)}")

    def speculator(self, params: SamplingParams, nodes: int) -> Speculator | None:
        """For one step; `nodes` (root included) applies to adaptive trees, 1 means none."""
        tree = params.speculation.tree
        if self.is_adaptive(tree) and nodes <= 1:
            return None
        taus = self.calibration.taus(params.temperature, self.heads.num_heads)
        return make_speculator(self.heads, self._drafter(tree, nodes), taus, coupled=self.coupled)

    def _drafter(self, tree: str, nodes: int) -> AnyDrafter:
        key = (tree, nodes if self.is_adaptive(tree) else 0)
        if key not in self._drafters:
            self._drafters[key] = self._build(tree, nodes)
        return self._drafters[key]

    def _build(self, tree: str, nodes: int) -> AnyDrafter:
        if tree == DYNAMIC:
            return dynamic_drafter(self.heads, nodes, self._device)
        if tree == STATIC:
            return static_drafter(self.heads, self._static_tree or self._grown(nodes), self._device)
        return static_drafter(self.heads, self._published[tree], self._device)

    def _grown(self, nodes: int) -> Tree:
        """From the calibrated accuracies, of ranks that a small vocabulary has."""
        accuracies = self.calibration.accuracies[: self.heads.num_heads]
        return grow_tree([head[: self.heads.vocab_size] for head in accuracies], nodes)


def scratch_rows(factory: SpeculatorFactory | None, tree_nodes: int | None) -> int:
    """Cache rows behind the context for the largest tree that is measured or asked for."""
    return 1 if factory is None else max(factory.largest, tree_nodes or 1, *TREE_SIZES)
