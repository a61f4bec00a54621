"""What one step works on: B running sequences as tensors.

Why a seam: everything below the engine sees rows of a batch, each with its own length, root, parameters, seed
and tree, and no slot of its own choosing. One sequence is a batch of one.

Shapes: B rows, D depth of the deepest tree, P positions that a step can decide, V vocabulary.
"""

import struct
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from medusa_core.engine.logits_processors import LogitsChain
from medusa_core.engine.sampling import Noise, NoiseOfKeys, noise_keys, noise_of_keys
from medusa_core.engine.sequence import Sequence
from medusa_core.sampling_params import SamplingParams

_NOT_OFF = 1.0 - 2.0**-24  # the greatest float32 below 1: a top_p closer to 1 must not become 1, which is off


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step. `histories`: each row's tokens, the root last; `nodes`: the budget of its tree.

    Tensors are on the device: `slots_B`, `lengths_B` (committed tokens n), `roots_B`, `places_D` (0..D).
    `sampling_B4`: temperature, top_k, top_p, min_p as float32, 0, 0, 1, 0 for a greedy row; `noise`: what the
    tokens from position n + 1 on are drawn with. Both are None if all rows are greedy.
    """

    slots: tuple[int, ...]
    params: tuple[SamplingParams, ...]
    nodes: tuple[int, ...]
    chains: tuple[LogitsChain, ...]
    histories: tuple[SequenceOf[int], ...]
    slots_B: Tensor
    lengths_B: Tensor
    roots_B: Tensor
    places_D: Tensor
    sampling_B4: Tensor | None
    noise: Noise | None

    def draft_noise(self, depth: int) -> Tensor | None:
        """The noise that drafts of that depth are judged with, and one position more: [B, depth + 1, V]."""
        return None if self.noise is None else self.noise.first(depth + 1)

    def with_nodes(self, nodes: tuple[int, ...]) -> "Batch":
        """The same with other budgets."""
        return replace(self, nodes=nodes)


def make_batch(
    sequences: SequenceOf[Sequence],
    nodes: SequenceOf[int],
    depth: int,
    vocabulary_V: Tensor,
    noise: NoiseOfKeys | None = None,
) -> Batch:
    """Gather sequences whose trees are at most `depth` deep; one copy to the device of `vocabulary_V`.

    `noise`: draws for that vocabulary, faster than `noise_of_keys`.
    """
    depth = max(1, depth)  # programs are compiled for two places or more
    sampled = any(not sequence.params.is_greedy for sequence in sequences)
    rows = [_greedy_row(s) + _sampling_row(s, depth + 1) if sampled else _greedy_row(s) for s in sequences]
    packed = torch.tensor(rows, device=vocabulary_V.device)
    draw = noise or partial(noise_of_keys, token_ids_V=vocabulary_V)
    return Batch(
        slots=tuple(sequence.slot for sequence in sequences),
        params=tuple(sequence.params for sequence in sequences),
        nodes=tuple(nodes),
        chains=tuple(sequence.chain for sequence in sequences),
        histories=tuple(sequence.token_ids for sequence in sequences),
        slots_B=packed[:, 0],
        lengths_B=packed[:, 1],
        roots_B=packed[:, 2],
        places_D=vocabulary_V[: depth + 1],
        sampling_B4=packed[:, 3:5].view(torch.float32) if sampled else None,
        noise=Noise(packed[:, 5:], draw) if sampled else None,
    )


def _greedy_row(sequence: Sequence) -> list[int]:
    return [sequence.slot, sequence.num_cached, sequence.root]


def _sampling_row(sequence: Sequence, count: int) -> list[int]:
    """Four float32 in the bits of two integers, and `count` noise keys."""
    params = sequence.params
    if params.is_greedy:
        return [*_as_integers(0.0, 0.0, 1.0, 0.0), *[0] * count]
    top_p = params.top_p if params.top_p == 1.0 else min(params.top_p, _NOT_OFF)
    first = sequence.num_cached + 1  # the root stands at position n
    keys = noise_keys(sequence.request.seed, range(first, first + count))
    return [*_as_integers(params.temperature, params.top_k, top_p, params.min_p), *keys]


def _as_integers(*values: float) -> tuple[int, ...]:
    return struct.unpack("=2q", struct.pack("=4f", *values))
