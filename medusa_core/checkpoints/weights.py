"""The tensors of a set of heads in plain dataclasses, between every reader and every writer.

Shapes: K heads, L layers, E hidden size, V output rows.
"""

from dataclasses import dataclass
from itertools import chain

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight [out, in] and its bias [out], if it has one."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """K heads: blocks, then output layers [V, E], none if they share the backbone's.

    `token_map` [V]: token ids of the output rows, int64; None if rows and ids are the same.
    """

    blocks: tuple[tuple[Linear, ...], ...]
    outputs: tuple[Linear, ...]
    token_map: Tensor | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer, in an order that depends on the kind of heads alone."""
        return (*chain.from_iterable(self.blocks), *self.outputs)

    @property
    def num_heads(self) -> int:
        return len(self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.blocks[0])

    @property
    def hidden_size(self) -> int:
        return len(self.linears[0].weight)

    @property
    def rows(self) -> int | None:
        """V; None if only the backbone determines it."""
        if self.token_map is not None:
            return len(self.token_map)
        return len(self.outputs[0].weight) if self.outputs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaWeights(_Weights):
    """Medusa heads: `blocks[k][l]` [E, E]; `outputs` without bias, one a head or one for all heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HydraWeights(_Weights):
    """Hydra heads: first blocks `linear` and `residual` of head k [E, (k+2)E], `blocks[k]` of L - 1 [E, E].

    `outputs`, one a head, have a bias. `prefix`: the prefix layer's weights under the names of a Llama stack
    (`layers.0.…`, `norm.weight`); None without one.
    """

    linear: tuple[Linear, ...]
    residual: tuple[Linear, ...]
    prefix: dict[str, Tensor] | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.linear, *self.residual, *chain.from_iterable(self.blocks), *self.outputs)

    @property
    def num_layers(self) -> int:
        return 1 + len(self.blocks[0])


HeadWeights = MedusaWeights | HydraWeights
