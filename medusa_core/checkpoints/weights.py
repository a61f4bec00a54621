"""What a head file says, as plain tensors: between every reader and every writer.

Shapes: K heads, L layers, E hidden size, V output rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.errors import CheckpointError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight [out, in] and its bias [out], if it has one."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class MedusaWeights:
    """K heads: `blocks[k][l]` [E, E], and output layers without bias.

    `outputs` [V, E]: one a head, one for all of them, or none where the backbone's is meant. `token_map` [V]:
    the token ids of the output rows, int64; None: rows and ids are the same.
    """

    blocks: tuple[tuple[Linear, ...], ...]
    outputs: tuple[Tensor, ...]
    token_map: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return len(self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.blocks[0])

    @property
    def hidden_size(self) -> int:
        return int(self.blocks[0][0].weight.shape[0])

    @property
    def rows(self) -> int | None:
        """V, or None where only the backbone knows."""
        return _rows(self.outputs, self.token_map)


@dataclass(frozen=True, slots=True)
class HydraWeights:
    """K Hydra heads: first blocks `linear` and `residual` of head k [E, (k+2)E], `blocks[k]` of L - 1 [E, E].

    `outputs[k]` [V, E] have a bias; none where the backbone's output layer is meant. `prefix`: the prefix
    layer's weights under the names of a Llama stack (`layers.0.…`, `norm.weight`); None without one.
    """

    linear: tuple[Linear, ...]
    residual: tuple[Linear, ...]
    blocks: tuple[tuple[Linear, ...], ...]
    outputs: tuple[Linear, ...]
    prefix: dict[str, Tensor] | None
    token_map: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return len(self.linear)

    @property
    def num_layers(self) -> int:
        return 1 + len(self.blocks[0])

    @property
    def hidden_size(self) -> int:
        return int(self.linear[0].weight.shape[0])

    @property
    def rows(self) -> int | None:
        """V, or None where only the backbone knows."""
        return _rows(tuple(output.weight for output in self.outputs), self.token_map)


HeadWeights = MedusaWeights | HydraWeights


def _rows(outputs: tuple[Tensor, ...], token_map: Tensor | None) -> int | None:
    if token_map is not None:
        return len(token_map)
    return len(outputs[0]) if outputs else None


def check_dense(source: str, key: str, tensor: object) -> Tensor:
    """The tensor, if it is one that lies in memory row by row, else `CheckpointError`."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_quantized
    ):
        raise CheckpointError(f"{source}: {key} is not a dense tensor")
    return tensor


def check_float(source: str, key: str, tensor: object) -> Tensor:
    """The tensor, if it is dense and of a float type of at least 16 bits, else `CheckpointError`."""
    dense = check_dense(source, key, tensor)
    if dense.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{source}: {key} is {dense.dtype}, not a float type of 16 bits or more")
    return dense


def check_shape(source: str, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raises `CheckpointError` naming key and both shapes."""
    if tuple(tensor.shape) != expected:
        raise CheckpointError(f"{source}: {key} has shape {list(tensor.shape)}, expected {list(expected)}")


def check_token_map(source: str, key: str, tensor: object) -> Tensor:
    """A map from output rows to token ids as int64 [V], else `CheckpointError`: integers, each id once."""
    ids = check_dense(source, key, tensor)
    if ids.dtype not in INTEGER_DTYPES:
        raise CheckpointError(f"{source}: {key} is {ids.dtype}, not an integer type")
    if ids.ndim != 1 or not len(ids):
        raise CheckpointError(f"{source}: {key} has shape {list(ids.shape)}, expected one token id per row")
    ids = ids.long()
    if int(ids.min()) < 0:
        raise CheckpointError(f"{source}: {key} holds {int(ids.min())}, which is no token id")
    unique, counts = ids.unique(return_counts=True)
    if len(unique) < len(ids):
        repeated = int(unique[counts.argmax()])
        raise CheckpointError(f"{source}: {key} names token {repeated} {int(counts.max())} times")
    return ids
