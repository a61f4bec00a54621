"""What the keys mean: layouts A, B and C told apart, counted and checked strictly."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.errors import CheckpointError

HEAD_PREFIX = "medusa_head."  # format C: heads among a whole model's weights
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KEY = re.compile(r"(?P<head>\d+)\.(?P<layer>\d+)\.(?:linear\.(?P<part>weight|bias)|(?P<output>weight))")
FOREIGN_LAYOUTS = {
    "blocks.": "vLLM's own Medusa layout",
    "medusa_heads.": "the ModelOpt / TensorRT-LLM layout",
    "hydra_mlp.": "Hydra heads",
    "cross_attn.": "Hydra heads",
    "hydra_lm_head.": "Hydra heads",
}
SHOWN_KEYS = 6


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """K heads of L blocks; `has_output` false where they share the backbone's output layer (B)."""

    num_heads: int
    num_layers: int
    has_output: bool

    def keys(self) -> set[str]:
        """Every key such a file must have, and no other."""
        keys = set()
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                keys |= {block_key(head, layer, "weight"), block_key(head, layer, "bias")}
            if self.has_output:
                keys.add(output_key(head, self.num_layers))
        return keys


def block_key(head: int, layer: int, part: str) -> str:
    return f"{head}.{layer}.linear.{part}"


def output_key(head: int, num_layers: int) -> str:
    return f"{head}.{num_layers}.weight"


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Format C keys as A keys; all or none of the keys must carry the prefix."""
    if all(key.startswith(HEAD_PREFIX) for key in tensors):
        return {key.removeprefix(HEAD_PREFIX): tensor for key, tensor in tensors.items()}
    return tensors


def parse_layout(source: str, tensors: dict[str, Tensor]) -> HeadLayout:
    """Count heads and layers, and see that exactly the keys they imply are there, else `CheckpointError`."""
    _refuse_foreign(source, tensors)
    parsed = [match for match in map(KEY.fullmatch, tensors) if match]
    blocks = [match for match in parsed if match["part"]]
    if not blocks:
        raise CheckpointError(
            f"{source} holds no Medusa heads (keys like 0.0.linear.weight): {_some(tensors)}"
        )
    layout = HeadLayout(
        num_heads=1 + max(int(match["head"]) for match in parsed),
        num_layers=1 + max(int(match["layer"]) for match in blocks),
        has_output=any(match["output"] for match in parsed),
    )
    if layout.num_heads * layout.num_layers > len(tensors):  # also keeps a lone "999999999.…" key harmless
        raise CheckpointError(f"{source} has gaps between its heads or layers: {_some(tensors)}")
    expected = layout.keys()
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing", expected - tensors.keys()), ("unexpected", tensors.keys() - expected))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not hold {layout.num_heads} heads of {layout.num_layers} layers: "
            + "; ".join(problems)
        )
    return layout


def check_tensors(source: str, tensors: dict[str, Tensor], layout: HeadLayout, hidden_size: int) -> int:
    """Check kinds and shapes of all tensors; returns the number of output rows (0 for B)."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{source}: {key} is not a dense tensor")
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{source}: {key} is {tensor.dtype}, not a float type")
    first = tensors[block_key(0, 0, "weight")].shape
    if len(first) == 2 and first[0] == first[1] != hidden_size:
        raise CheckpointError(
            f"{source}: heads are for hidden size {first[0]}, the backbone's hidden size is {hidden_size}"
        )
    rows = 0
    if layout.has_output:
        output_shape = tensors[output_key(0, layout.num_layers)].shape
        rows = int(output_shape[0]) if output_shape else 0
    for key, tensor in tensors.items():
        expected = _expected_shape(key, hidden_size, rows)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{source}: {key} has shape {list(tensor.shape)}, expected {list(expected)}"
            )
    return rows


def _expected_shape(key: str, hidden_size: int, rows: int) -> tuple[int, ...]:
    if key.endswith(".linear.weight"):
        return (hidden_size, hidden_size)
    return (hidden_size,) if key.endswith(".linear.bias") else (rows, hidden_size)


def _refuse_foreign(source: str, tensors: dict[str, Tensor]) -> None:
    for prefix, name in FOREIGN_LAYOUTS.items():
        if any(key.startswith(prefix) for key in tensors):
            raise CheckpointError(f"{source} holds {name} ({prefix}*), which cannot be read here")


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _some(keys: "set[str] | dict[str, Tensor]") -> str:
    ordered = sorted(keys, key=_natural)
    more = f" and {len(ordered) - SHOWN_KEYS} more" if len(ordered) > SHOWN_KEYS else ""
    return (", ".join(ordered[:SHOWN_KEYS]) or "no keys at all") + more
