"""The decode step on a batch: propose, verify, accept, commit; and what a prompt's end decides.

Shapes: B rows, T tree nodes, D tree depth, V vocabulary, E hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import Origin, root_tree
from medusa_core.draft.source import DraftSource
from medusa_core.engine.batch import Batch
from medusa_core.engine.logits_processors import NodePaths
from medusa_core.engine.runner import Runner
from medusa_core.engine.sampling import gumbel_noise
from medusa_core.engine.sequence import Sequence
from medusa_core.engine.timing import PhaseTimer
from medusa_core.model.backbone import BackboneOutput


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's share of a step: accepted drafts and the newly decided token in order, and their origins.

    `path`: accepted nodes, root first; `drafted`: nodes at each depth.
    """

    path: list[int]
    token_ids: list[int]
    origins: list[Origin]
    drafted: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Drafts."""
        return len(self.path) - 1


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's rows, the hidden states of all its nodes, and what it cost (seconds)."""

    rows: list[RowResult]
    hidden_BTE: Tensor
    tree_nodes: int
    propose_seconds: float
    verify_seconds: float
    commit_seconds: float

    @property
    def seconds(self) -> float:
        return self.propose_seconds + self.verify_seconds + self.commit_seconds


def decode_step(runner: Runner, batch: Batch, source: DraftSource | None, timer: PhaseTimer) -> StepResult:
    """One step of every row. No `source` is ordinary decoding: a tree of one node, nothing drafted.

    The caller has marked the step's begin, and advances the cache by the rows' paths: that makes the keys and
    values final which `runner` has moved.
    """
    proposed = source.propose(batch) if source else root_tree(batch.roots_B)
    tree = runner.fit(proposed)
    timer.mark()
    output = runner.verify(batch, tree)
    timer.mark()
    decided = runner.accept(batch, tree, output)
    rows = [unpack(row, tree.max_depth + 1, proposed.max_depth) for row in decided]
    timer.mark()
    propose, verify, commit = timer.seconds()
    return StepResult(rows, output.hidden_BTE, proposed.size, propose, verify, commit)


def unpack(row: list[int], width: int, depth: int | None = None) -> RowResult:
    """Of `Runner.accept`; `width` is D + 1, `depth` what was drafted of that."""
    path, on_path, origins = row[:width], row[width : 2 * width], row[2 * width : 3 * width]
    count, next_root = row[3 * width : 3 * width + 2]
    depths = row[3 * width + 2 :]
    return RowResult(
        path=path[: count + 1],
        token_ids=[*on_path[1 : count + 1], next_root],
        origins=[*map(Origin, origins[1 : count + 1]), Origin.MODEL],
        drafted=tuple(depths.count(depth) for depth in range(1, width if depth is None else depth + 1)),
    )


def first_root(sequence: Sequence, output: BackboneOutput, vocabulary_V: Tensor) -> int:
    """The token after a prompt, from the last row of its prefill's last chunk."""
    history, noise = sequence.token_ids, None
    if not sequence.params.is_greedy:
        noise = gumbel_noise(sequence.request.seed, [len(sequence.token_ids)], vocabulary_V)
    tree = root_tree(torch.tensor(history[-1:], device=vocabulary_V.device))
    decided = sequence.chain.decide(output.logits_BTV[:, -1], NodePaths(history, tree, 0), noise)
    return int(decided)
