"""Executes a step's tensor work on a batch: verify, then accept and commit.

Why a seam: the eager runner is the reference; the static one does the same by programs that may be compiled.
Both phases take tensors and give tensors, and what they decided is read by the host after the second one.

Shapes: B rows, T tree nodes, D tree depth, P positions, V vocabulary, E hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree
from medusa_core.engine.acceptance import longest_path, match_drafts, typical_drafts
from medusa_core.engine.batch import Batch
from medusa_core.engine.logits_processors import NodePaths
from medusa_core.engine.sampling import NoiseOfKeys, draw_tokens
from medusa_core.model.backbone import Backbone, BackboneOutput
from medusa_core.model.kv_cache import KVCache
from medusa_core.sampling_params import SpeculationMode


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step decided, on the device.

    `path_BD` [B, D+1]: accepted nodes, root first, of which `count_B` drafts count. `next_roots_B`: the
    tokens decided after them.
    """

    path_BD: Tensor
    count_B: Tensor
    next_roots_B: Tensor


class Runner(Protocol):
    """Runs a step's two phases. Nothing is decided on the host inside of one."""

    @property
    def noise(self) -> NoiseOfKeys | None:
        """What draws the noise; None: `noise_of_keys`."""

    def fit(self, tree: DraftTree) -> DraftTree:
        """The tree in a size that this runner runs: padded with nodes that are on no path."""

    def verify(self, batch: Batch, tree: DraftTree) -> BackboneOutput:
        """One forward pass over all nodes; their keys and values lie uncommitted after each row's own."""

    def accept(self, batch: Batch, tree: DraftTree, output: BackboneOutput) -> list[list[int]]:
        """Choose each row's path and move its keys and values to follow the committed ones.

        What was decided, per row on the host: path, its tokens, its origins (D + 1 each), number of accepted
        drafts, next root, depths of all nodes.
        """


class EagerRunner:
    """Operation by operation, on any device."""

    noise: NoiseOfKeys | None = None

    def __init__(self, backbone: Backbone, cache: KVCache) -> None:
        self._backbone, self._cache = backbone, cache

    def fit(self, tree: DraftTree) -> DraftTree:
        return tree

    def verify(self, batch: Batch, tree: DraftTree) -> BackboneOutput:
        positions_BT = batch.lengths_B[:, None] + tree.depths_BT
        rows = self._cache.rows(batch.slots)
        return self._backbone.forward(tree.tokens_BT, positions_BT, tree.ancestors_BTT, rows)

    def accept(self, batch: Batch, tree: DraftTree, output: BackboneOutput) -> list[list[int]]:
        rows: list[list[int]] = pack(tree, self.decide(batch, tree, output)).tolist()
        return rows

    def decide(self, batch: Batch, tree: DraftTree, output: BackboneOutput) -> Decision:
        """`accept`, left on the device."""
        judged = [_judge(batch, row, tree, output.logits_BTV[row]) for row in range(len(batch.slots))]
        right_BT, targets_BT, scores_BT = (torch.stack(part) for part in zip(*judged, strict=True))
        accepted = longest_path(right_BT, tree.ancestors_BTT, tree.depths_BT, tree.max_depth, scores_BT)
        self._cache.keep(batch.slots_B, batch.lengths_B, accepted.path_BD)
        next_roots_B = targets_BT.gather(1, accepted.leaf_B[:, None])[:, 0]
        return Decision(accepted.path_BD, accepted.count_B, next_roots_B)


def pack(tree: DraftTree, decision: Decision) -> Tensor:
    """What a step decided as one tensor: the step's one transfer."""
    return torch.cat(
        [
            decision.path_BD,
            tree.tokens_BT.gather(1, decision.path_BD),
            tree.origins_BT.gather(1, decision.path_BD),
            decision.count_B[:, None],
            decision.next_roots_B[:, None],
            tree.depths_BT,
        ],
        dim=1,
    )


def _judge(batch: Batch, row: int, tree: DraftTree, logits_TV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row: which drafts are right, each node's own token, a score for ties of the longest path [T]."""
    params, chain = batch.params[row], batch.chains[row]
    paths = NodePaths(batch.histories[row], tree, row)
    tokens_1T, parents_1T = tree.tokens_BT[row : row + 1], tree.parents_BT[row : row + 1]
    noise_TV = None
    if not params.is_greedy:
        noise_BPV = batch.draft_noise(tree.max_depth)
        assert noise_BPV is not None
        noise_TV = noise_BPV[row, tree.depths_BT[row]]
    if params.speculation.mode is SpeculationMode.TYPICAL and not params.is_greedy:
        processed = chain.process(logits_TV, paths)
        targets_T = draw_tokens(processed, params.temperature, noise_TV)
        log_probs = (processed / params.temperature).log_softmax(dim=-1)
        epsilon, delta = params.speculation.epsilon, params.speculation.delta
        right, scores = typical_drafts(tokens_1T, parents_1T, log_probs[None], epsilon, delta)
        return right[0], targets_T, scores[0]
    targets_T = chain.decide(logits_TV, paths, noise_TV)
    right = match_drafts(tokens_1T, parents_1T, targets_T[None])[0]
    return right, targets_T, torch.zeros_like(right, dtype=torch.float32)
