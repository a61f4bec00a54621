"""Checks of keys and tensors from files; each raises a `CheckpointError` that names source and key."""

from collections.abc import Iterable

import torch
from torch import Tensor

from medusa_core.errors import CheckpointError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
SHOWN_KEYS = 6


def check_dense(source: str, key: str, tensor: object) -> Tensor:
    """The tensor, if it is an ordinary strided one with data."""
    if (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
    ):
        return tensor
    raise CheckpointError(f"{source}: {key} is not a dense tensor")


def check_float(source: str, key: str, tensor: object) -> Tensor:
    """The tensor, if it is dense and of a float type of at least 16 bits."""
    dense = check_dense(source, key, tensor)
    if dense.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{source}: {key} is {dense.dtype}, not a float type of 16 bits or more")
    return dense


def check_shape(source: str, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse any other shape."""
    if tuple(tensor.shape) != expected:
        raise CheckpointError(f"{source}: {key} has shape {list(tensor.shape)}, expected {list(expected)}")


def check_hidden_size(source: str, own: int, backbone: int) -> None:
    """Refuse heads of another hidden size than the backbone's."""
    if own != backbone:
        raise CheckpointError(
            f"{source}: heads are for hidden size {own}, the backbone's hidden size is {backbone}"
        )


def check_rows(source: str, key: str, output: Tensor) -> int:
    """Rows V of an output layer, at least one."""
    rows = len(output) if output.ndim else 1  # one without dimensions fails the check of its shape
    if not rows:
        raise CheckpointError(f"{source}: {key} has a vocabulary of 0")
    return rows


def check_token_map(source: str, key: str, tensor: object) -> Tensor:
    """A map from output rows to token ids as int64 [V]: integers, each id once."""
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


def check_keys(complaint: str, expected: set[str], found: Iterable[str]) -> None:
    """Refuse missing and unexpected keys, naming the first few of each after `complaint`."""
    missing, unexpected = expected - set(found), set(found) - expected
    named = (("missing", missing), ("unexpected", unexpected))
    problems = [f"{what} {some_keys(keys)}" for what, keys in named if keys]
    if problems:
        raise CheckpointError(f"{complaint}: " + "; ".join(problems))


def some_keys(keys: Iterable[str]) -> str:
    """The first few of many keys, in their natural order."""
    ordered = sorted(keys, key=_natural)
    more = f" and {len(ordered) - SHOWN_KEYS} more" if len(ordered) > SHOWN_KEYS else ""
    return (", ".join(ordered[:SHOWN_KEYS]) or "no keys at all") + more


def _natural(key: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isascii() and part.isdigit() and len(part) < 10 else (-1, part)
        for part in key.split(".")
    ]
