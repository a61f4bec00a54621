"""What one step works on: B running sequences as tensors.

Why a seam: everything below the engine sees rows of a batch, each with its own length, root, parameters, seed
and tree, and no slot of its own choosing. One sequence is a batch of one.

Shapes: B rows, P positions that a step can decide, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medusa_core.engine.logits_processors import LogitsChain
from medusa_core.engine.sampling import Noise, noise_key
from medusa_core.engine.sequence import Sequence
from medusa_core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step. `histories`: each row's tokens, the root last; `nodes`: the budget of its tree.

    `slots_B`, `lengths_B` (committed tokens n) and `roots_B` are on the device. `noise`: what the tokens from
    position n + 1 on are drawn with; None if all rows are greedy.
    """

    slots: tuple[int, ...]
    params: tuple[SamplingParams, ...]
    nodes: tuple[int, ...]
    chains: tuple[LogitsChain, ...]
    histories: tuple[SequenceOf[int], ...]
    slots_B: Tensor
    lengths_B: Tensor
    roots_B: Tensor
    noise: Noise | None

    def draft_noise(self, depth: int) -> Tensor | None:
        """The noise that drafts of that depth are judged with, and one position more: [B, depth + 1, V]."""
        return None if self.noise is None else self.noise.first(depth + 1)

    def with_nodes(self, nodes: tuple[int, ...]) -> "Batch":
        """The same with other budgets."""
        return replace(self, nodes=nodes)


def make_batch(
    sequences: SequenceOf[Sequence], nodes: SequenceOf[int], depth: int, vocabulary_V: Tensor
) -> Batch:
    """Gather sequences whose trees are at most `depth` deep; one copy to the device of `vocabulary_V`."""
    sampled = any(not sequence.params.is_greedy for sequence in sequences)
    keys = depth + 1 if sampled else 0
    rows = [[s.slot, s.num_cached, s.root, *_noise_keys(s, keys)] for s in sequences]
    packed = torch.tensor(rows, device=vocabulary_V.device)
    return Batch(
        slots=tuple(sequence.slot for sequence in sequences),
        params=tuple(sequence.params for sequence in sequences),
        nodes=tuple(nodes),
        chains=tuple(sequence.chain for sequence in sequences),
        histories=tuple(sequence.token_ids for sequence in sequences),
        slots_B=packed[:, 0],
        lengths_B=packed[:, 1],
        roots_B=packed[:, 2],
        noise=Noise(packed[:, 3:], vocabulary_V) if sampled else None,
    )


def _noise_keys(sequence: Sequence, count: int) -> list[int]:
    """The root stands at position n: the next undecided one is n + 1."""
    if sequence.params.is_greedy:
        return [0] * count
    first = sequence.num_cached + 1
    return [noise_key(sequence.request.seed, position) for position in range(first, first + count)]
