"""The seam between the engine and whatever drafts: what a source is told, asked for, and answers.

Shapes: B rows, T tokens of a forward pass, P positions, V vocabulary, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree
from medusa_core.sampling_params import SamplingParams, SpeculationParams


@dataclass(frozen=True, slots=True)
class Committed:
    """What a forward pass added to one sequence.

    `token_ids`: committed now, in order; `root`: the token decided after them, None while a prompt is not
    read to its end. `hidden_TE`: hidden states (after the final norm) of all rows of the pass, of which those
    in `path` belong to `token_ids`.
    """

    slot: int
    token_ids: Sequence[int]
    root: int | None
    hidden_TE: Tensor
    path: Sequence[int]

    @property
    def features_UE(self) -> Tensor:
        """Hidden states of the committed tokens."""
        first, count = self.path[0], len(self.path)
        if list(self.path) == list(range(first, first + count)):
            return self.hidden_TE[first : first + count]
        return self.hidden_TE[list(self.path)]


class DraftBatch(Protocol):
    """What a source may look at of the sequences that it proposes for, a row each."""

    @property
    def slots(self) -> tuple[int, ...]: ...

    @property
    def params(self) -> tuple[SamplingParams, ...]: ...

    @property
    def nodes(self) -> tuple[int, ...]:
        """Budget of each row's tree, root included."""

    @property
    def roots_B(self) -> Tensor: ...

    def draft_noise(self, depth: int) -> Tensor | None:
        """The noise the target will draw with at depths up to `depth` [B, P, V]; None if all are greedy."""

    def with_nodes(self, nodes: tuple[int, ...]) -> "DraftBatch":
        """The same with other budgets."""


class DraftSource(Protocol):
    """Proposes trees of drafts, and owns everything it remembers of sequences to do so, slot by slot.

    Why a seam: the engine tells what was committed and asks for a tree, whatever the drafts come from. Heads,
    n-grams, or a drafter with features of its own (EAGLE kind) are a class each, and no branch in the step.
    """

    def check(self, speculation: SpeculationParams) -> None:
        """Raise `TreeError` if it cannot draft what a request asks for."""

    def is_adaptive(self, speculation: SpeculationParams) -> bool:
        """Whether the engine chooses the size of this request's trees; a named tree is used as it is."""

    def max_depth(self, speculation: SpeculationParams, nodes: int) -> int:
        """Greatest depth of the trees it would propose, hence the most drafts a step can accept."""

    def start(self, slot: int) -> None:
        """A new sequence takes the slot: forget the one before."""

    def observe(self, committed: Committed) -> None:
        """Take in what a sequence gained, in order and without gaps."""

    def propose(self, batch: DraftBatch) -> DraftTree:
        """A tree for each row below its root, of at most the row's budget."""
