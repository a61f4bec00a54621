"""What one step works on: B running sequences as tensors.

Why a seam: everything below the engine sees rows of a batch, each with its own length, root, parameters, seed
and tree, and no slot of its own choosing. One sequence is a batch of one.

Shapes: B rows, D depth of the deepest tree, P positions that a step can decide, V vocabulary.
"""

import struct
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from medusa_core.engine.logits_processors import LogitsChain
from medusa_core.engine.sampling import Noise, NoiseOfKeys, noise_keys, noise_of_keys
from medusa_core.engine.sequence import Sequence
from medusa_core.sampling_params import SamplingParams

# The greatest float32 below 1: a top_p closer to 1 must not become 1, which is off.
_NOT_OFF = 1.0 - 2.0**-24


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
    rows, keys = len(sequences), depth + 1 if sampled else 0
    # One after the other, not as columns: so each is contiguous, as compiled programs expect.
    numbers = [s.slot for s in sequences] + [s.num_cached for s in sequences] + [s.root for s in sequences]
    if sampled:
        numbers += chain.from_iterable(_sampling_bits(sequence.params) for sequence in sequences)
        numbers += chain.from_iterable(_noise_keys(sequence, keys) for sequence in sequences)
    packed = torch.tensor(numbers, device=vocabulary_V.device)
    slots_B, lengths_B, roots_B, bits, keys_N = packed.split(
        (rows, rows, rows, 2 * rows * sampled, rows * keys)
    )
    draw = noise or partial(noise_of_keys, token_ids_V=vocabulary_V)
    return Batch(
        slots=tuple(sequence.slot for sequence in sequences),
        params=tuple(sequence.params for sequence in sequences),
        nodes=tuple(nodes),
        chains=tuple(sequence.chain for sequence in sequences),
        histories=tuple(sequence.token_ids for sequence in sequences),
        slots_B=slots_B,
        lengths_B=lengths_B,
        roots_B=roots_B,
        places_D=vocabulary_V[: depth + 1],
        sampling_B4=bits.view(torch.float32).view(rows, 4) if sampled else None,
        noise=Noise(keys_N.view(rows, keys), draw) if sampled else None,
    )


def _sampling_bits(params: SamplingParams) -> tuple[int, ...]:
    """A row of `Batch.sampling_B4`: four float32 in the bits of two integers."""
    row = (0.0, 0.0, 1.0, 0.0)
    if not params.is_greedy:
        top_p = params.top_p if params.top_p == 1.0 else min(params.top_p, _NOT_OFF)
        row = (params.temperature, params.top_k, top_p, params.min_p)
    return struct.unpack("=2q", struct.pack("=4f", *row))


def _noise_keys(sequence: Sequence, count: int) -> list[int]:
    """The root stands at position n: the next undecided one is n + 1."""
    if sequence.params.is_greedy:
        return [0] * count
    first = sequence.num_cached + 1
    return noise_keys(sequence.request.seed, range(first, first + count))
