"""What the keys of Hydra heads mean (layout F), with the quirks of the published files.

Dropout modules shift the blocks of a head to odd positions and its output layer to position 1, so positions
are sorted and counted. Submodules that are the backbone's own were saved along (`input_embed_fn`, `lm_head`):
they are dropped, for loading them would overwrite the backbone with rounded copies.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medusa_core.checkpoints.formats import TOKEN_MAP, refuse_differences, some
from medusa_core.checkpoints.weights import (
    HydraWeights,
    Linear,
    check_float,
    check_shape,
    check_token_map,
)
from medusa_core.errors import CheckpointError

MLP, OUTPUT, PREFIX = "hydra_mlp.", "hydra_lm_head.", "prefix_embeding_layer."  # the last as published
ARCH_MLP, ARCH_PREFIX = "mlp", "prefix-mlp"
FOREIGN_PREFIXES = {"cross_attn.": "cross-attn", "attn.": "eagle-attn", "fc.": "eagle-attn"}
ALIASED = ("input_embed_fn.", "lm_head.", PREFIX + "embed_tokens.")
BLOCK_KEY = re.compile(
    r"hydra_mlp\.(?P<head>\d{1,9})\.(?P<position>\d{1,9})\.(?:linear|res_connection)\.(?:weight|bias)"
)
OUTPUT_KEY = re.compile(r"hydra_lm_head\.\d{1,9}\.(?P<inner>1\.)?(?:weight|bias)")


@dataclass(frozen=True, slots=True)
class HydraLayout:
    """K heads with blocks at `positions`. `output_inner`: "1." behind dropout, ""; None without outputs."""

    num_heads: int
    positions: tuple[int, ...]
    output_inner: str | None
    prefix_keys: frozenset[str] = frozenset()
    has_token_map: bool = False

    def block_key(self, head: int, layer: int, module: str) -> str:
        return f"{MLP}{head}.{self.positions[layer]}.{module}"

    def output_key(self, head: int) -> str:
        return f"{OUTPUT}{head}.{self.output_inner}".removesuffix(".")

    def keys(self) -> set[str]:
        """Every key such a file must have; the prefix layer's are checked against its shape when loaded."""
        modules = set()
        for head in range(self.num_heads):
            modules |= {self.block_key(head, layer, "linear") for layer in range(len(self.positions))}
            modules.add(self.block_key(head, 0, "res_connection"))
            if self.output_inner is not None:
                modules.add(self.output_key(head))
        keys = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
        return keys | self.prefix_keys | ({TOKEN_MAP} if self.has_token_map else set())


def is_hydra(keys: Iterable[str]) -> bool:
    """Whether these are Hydra heads of any architecture."""
    return any(key.startswith((MLP, OUTPUT, PREFIX, *FOREIGN_PREFIXES)) for key in keys)


def parse_hydra(
    source: str, tensors: dict[str, Tensor], config: dict[str, Any], hidden_size: int | None
) -> HydraWeights:
    """The tensors in their places, after all were checked. `hidden_size` None: whatever the file has."""
    _refuse_architectures(source, tensors, config)
    own = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(ALIASED) and not key.endswith("rotary_emb.inv_freq")
    }
    layout = _parse_layout(source, own)
    if config.get("hydra_head_arch") == ARCH_PREFIX and not layout.prefix_keys:
        raise CheckpointError(f"{source} lacks {PREFIX}*, though config.json says {ARCH_PREFIX}")
    token_map = check_token_map(source, TOKEN_MAP, own.pop(TOKEN_MAP)) if layout.has_token_map else None
    floats = {key: check_float(source, key, tensor) for key, tensor in own.items()}
    rows = _check_shapes(source, floats, layout, hidden_size)
    if token_map is not None and rows is not None and len(token_map) != rows:
        raise CheckpointError(
            f"{source}: {TOKEN_MAP} has {len(token_map)} ids, {layout.output_key(0)}.weight has {rows} rows"
        )
    return _placed(floats, layout, token_map)


def written_layout(weights: HydraWeights) -> HydraLayout:
    """The published layout for such heads: with a prefix layer, positions are those behind dropout."""
    shifted = weights.prefix is not None
    positions = range(1, 2 * weights.num_layers, 2) if shifted else range(weights.num_layers)
    inner = None if not weights.outputs else "1." if shifted else ""
    return HydraLayout(weights.num_heads, tuple(positions), inner)


def _refuse_architectures(source: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    arch = config.get("hydra_head_arch")
    for prefix, name in FOREIGN_PREFIXES.items():
        if any(key.startswith(prefix) for key in tensors):
            arch = name
    if arch not in (None, ARCH_MLP, ARCH_PREFIX):
        raise CheckpointError(
            f"{source} holds Hydra heads of architecture {arch}: only {ARCH_MLP} and {ARCH_PREFIX} can be "
            "read"
        )
    if config.get("grounded_heads") is False:
        raise CheckpointError(
            f"{source} holds Hydra heads with grounded_heads false, which see no drafted tokens: only "
            "grounded ones can be read"
        )
    if config.get("hidden_state_offset", 0) != 0:
        raise CheckpointError(
            f"{source} holds Hydra heads with hidden_state_offset {config['hidden_state_offset']}: only "
            "those on the last hidden states (0) can be read"
        )


def _parse_layout(source: str, tensors: dict[str, Tensor]) -> HydraLayout:
    parsed = [match for match in map(BLOCK_KEY.fullmatch, tensors) if match]
    if not parsed:
        raise CheckpointError(
            f"{source} holds no Hydra heads (keys like {MLP}0.0.linear.weight): {some(tensors)}"
        )
    num_heads = 1 + max(int(match["head"]) for match in parsed)
    positions = tuple(sorted({int(match["position"]) for match in parsed}))
    behind_dropout = positions[0] == 1
    regular = range(1, 2 * len(positions), 2) if behind_dropout else range(len(positions))
    if positions != tuple(regular) or num_heads * len(positions) > len(tensors):
        raise CheckpointError(f"{source} has gaps between its heads or layers: {some(tensors)}")
    outputs = [match for match in map(OUTPUT_KEY.fullmatch, tensors) if match]
    layout = HydraLayout(
        num_heads=num_heads,
        positions=positions,
        output_inner=(outputs[0]["inner"] or "") if outputs else None,
        prefix_keys=frozenset(key for key in tensors if key.startswith(PREFIX)),
        has_token_map=TOKEN_MAP in tensors,
    )
    refuse_differences(
        f"{source} does not hold {num_heads} Hydra heads of {len(positions)} layers", layout.keys(), tensors
    )
    return layout


def _check_shapes(
    source: str, tensors: dict[str, Tensor], layout: HydraLayout, hidden_size: int | None
) -> int | None:
    """Returns the number of output rows, None without output layers."""
    bias = tensors[layout.block_key(0, 0, "linear") + ".bias"]
    own = int(bias.shape[0]) if bias.ndim == 1 else 0
    first = tuple(tensors[layout.block_key(0, 0, "linear") + ".weight"].shape)
    if hidden_size is not None and own != hidden_size and first == (own, 2 * own):
        raise CheckpointError(
            f"{source}: heads are for hidden size {own}, the backbone's hidden size is {hidden_size}"
        )
    size = hidden_size or own
    rows = None
    if layout.output_inner is not None:
        shape = tensors[layout.output_key(0) + ".weight"].shape
        rows = int(shape[0]) if shape else 0
        if not rows:
            raise CheckpointError(f"{source}: {layout.output_key(0)}.weight has a vocabulary of 0")

    def check(module: str, out: int, width: int) -> None:
        check_shape(source, module + ".weight", tensors[module + ".weight"], (out, width))
        check_shape(source, module + ".bias", tensors[module + ".bias"], (out,))

    for head in range(layout.num_heads):
        check(layout.block_key(head, 0, "linear"), size, (head + 2) * size)
        check(layout.block_key(head, 0, "res_connection"), size, (head + 2) * size)
        for layer in range(1, len(layout.positions)):
            check(layout.block_key(head, layer, "linear"), size, size)
        if rows is not None:
            check(layout.output_key(head), rows, size)
    return rows


def _placed(tensors: dict[str, Tensor], layout: HydraLayout, token_map: Tensor | None) -> HydraWeights:
    def linear(module: str) -> Linear:
        return Linear(tensors[module + ".weight"], tensors[module + ".bias"])

    heads, later = range(layout.num_heads), range(1, len(layout.positions))
    prefix = {key.removeprefix(PREFIX): tensors[key] for key in layout.prefix_keys}
    outputs: tuple[Linear, ...] = ()
    if layout.output_inner is not None:
        outputs = tuple(linear(layout.output_key(head)) for head in heads)
    return HydraWeights(
        linear=tuple(linear(layout.block_key(head, 0, "linear")) for head in heads),
        residual=tuple(linear(layout.block_key(head, 0, "res_connection")) for head in heads),
        blocks=tuple(
            tuple(linear(layout.block_key(head, layer, "linear")) for layer in later) for head in heads
        ),
        outputs=outputs,
        prefix=prefix or None,
        token_map=token_map,
    )
