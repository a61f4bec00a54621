"""Hydra heads (layout F): names of their tensors, read with the quirks of the published files.

Dropout modules shift a head's blocks to odd positions and its output layer to position 1, so positions are
sorted and counted. The files also hold modules of the backbone (`input_embed_fn`, `lm_head`); they are
dropped, since loading them would overwrite the backbone with rounded copies.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medusa_core.checkpoints import checks
from medusa_core.checkpoints.medusa_format import TOKEN_MAP
from medusa_core.checkpoints.weights import HydraWeights, Linear
from medusa_core.errors import CheckpointError

MLP, OUTPUT, PREFIX = "hydra_mlp.", "hydra_lm_head.", "prefix_embeding_layer."  # the last as published
ARCH_MLP, ARCH_PREFIX = "mlp", "prefix-mlp"
FOREIGN_PREFIXES = {"cross_attn.": "cross-attn", "attn.": "eagle-attn", "fc.": "eagle-attn"}
ALIASED = ("input_embed_fn.", "lm_head.", PREFIX + "embed_tokens.")  # modules of the backbone, saved along
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

    def block_key(self, head: int, layer: int, module: str = "linear") -> str:
        return f"{MLP}{head}.{self.positions[layer]}.{module}"

    def output_key(self, head: int) -> str:
        return f"{OUTPUT}{head}.{self.output_inner}".removesuffix(".")

    def keys(self) -> set[str]:
        """Every key such a file must have; the prefix layer's are checked against its shape when loaded."""
        modules = set()
        for head in range(self.num_heads):
            modules |= {self.block_key(head, layer) for layer in range(len(self.positions))}
            modules.add(self.block_key(head, 0, "res_connection"))
            if self.output_inner is not None:
                modules.add(self.output_key(head))
        keys = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
        return keys | self.prefix_keys | ({TOKEN_MAP} if self.has_token_map else set())


def is_hydra(keys: Iterable[str]) -> bool:
    """Whether these are Hydra heads of any architecture."""
    return any(key.startswith((MLP, OUTPUT, PREFIX, *FOREIGN_PREFIXES)) for key in keys)


def block_positions(num_layers: int, *, behind_dropout: bool) -> tuple[int, ...]:
    """Positions of a head's blocks: odd ones if a dropout module stands before each."""
    return tuple(range(1, 2 * num_layers, 2) if behind_dropout else range(num_layers))


def written_layout(weights: HydraWeights) -> HydraLayout:
    """The published layout of such heads: with a prefix layer, positions are those behind dropout."""
    shifted = weights.prefix is not None
    inner = None if not weights.outputs else "1." if shifted else ""
    return HydraLayout(weights.num_heads, block_positions(weights.num_layers, behind_dropout=shifted), inner)


def parse_hydra(
    source: str, tensors: dict[str, Tensor], config: dict[str, Any], hidden_size: int | None
) -> HydraWeights:
    """The checked tensors in their places. `hidden_size` None accepts any."""
    _refuse_architectures(source, tensors, config)
    own = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(ALIASED) and not key.endswith("rotary_emb.inv_freq")
    }
    layout = _parse_layout(source, own)
    if config.get("hydra_head_arch") == ARCH_PREFIX and not layout.prefix_keys:
        raise CheckpointError(f"{source} lacks {PREFIX}*, though config.json says {ARCH_PREFIX}")
    token_map = (
        checks.check_token_map(source, TOKEN_MAP, own.pop(TOKEN_MAP)) if layout.has_token_map else None
    )
    floats = {key: checks.check_float(source, key, tensor) for key, tensor in own.items()}
    weights = _weights(floats, layout, token_map)
    _check_shapes(source, weights, layout, hidden_size)
    return weights


def _refuse_architectures(source: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    arch, offset = config.get("hydra_head_arch"), config.get("hidden_state_offset", 0)
    for prefix, name in FOREIGN_PREFIXES.items():
        if any(key.startswith(prefix) for key in tensors):
            arch = name
    refused = None
    if arch not in (None, ARCH_MLP, ARCH_PREFIX):
        refused = f"of architecture {arch}: only {ARCH_MLP} and {ARCH_PREFIX} can be read"
    elif config.get("grounded_heads") is False:
        refused = "with grounded_heads false, which see no drafted tokens: only grounded ones can be read"
    elif offset != 0:
        refused = f"with hidden_state_offset {offset}: only those on the last hidden states (0) can be read"
    if refused is not None:
        raise CheckpointError(f"{source} holds Hydra heads {refused}")


def _parse_layout(source: str, tensors: dict[str, Tensor]) -> HydraLayout:
    parsed = [match for match in map(BLOCK_KEY.fullmatch, tensors) if match]
    if not parsed:
        raise CheckpointError(
            f"{source} holds no Hydra heads (keys like {MLP}0.0.linear.weight): {checks.some_keys(tensors)}"
        )
    num_heads = 1 + max(int(match["head"]) for match in parsed)
    positions = tuple(sorted({int(match["position"]) for match in parsed}))
    regular = block_positions(len(positions), behind_dropout=positions[0] == 1)
    if positions != regular or num_heads * len(positions) > len(tensors):
        raise CheckpointError(f"{source} has gaps between its heads or layers: {checks.some_keys(tensors)}")
    outputs = [match for match in map(OUTPUT_KEY.fullmatch, tensors) if match]
    layout = HydraLayout(
        num_heads=num_heads,
        positions=positions,
        output_inner=(outputs[0]["inner"] or "") if outputs else None,
        prefix_keys=frozenset(key for key in tensors if key.startswith(PREFIX)),
        has_token_map=TOKEN_MAP in tensors,
    )
    complaint = f"{source} does not hold {num_heads} Hydra heads of {len(positions)} layers"
    checks.check_keys(complaint, layout.keys(), tensors)
    return layout


def _weights(tensors: dict[str, Tensor], layout: HydraLayout, token_map: Tensor | None) -> HydraWeights:
    def linear(module: str) -> Linear:
        return Linear(tensors[module + ".weight"], tensors[module + ".bias"])

    heads, later = range(layout.num_heads), range(1, len(layout.positions))
    outputs = () if layout.output_inner is None else tuple(linear(layout.output_key(k)) for k in heads)
    return HydraWeights(
        linear=tuple(linear(layout.block_key(head, 0)) for head in heads),
        residual=tuple(linear(layout.block_key(head, 0, "res_connection")) for head in heads),
        blocks=tuple(tuple(linear(layout.block_key(head, layer)) for layer in later) for head in heads),
        outputs=outputs,
        prefix={key.removeprefix(PREFIX): tensors[key] for key in layout.prefix_keys} or None,
        token_map=token_map,
    )


def _check_shapes(source: str, weights: HydraWeights, layout: HydraLayout, hidden_size: int | None) -> None:
    bias = weights.linear[0].bias
    own = len(bias) if bias is not None and bias.ndim == 1 else 0
    first = tuple(weights.linear[0].weight.shape)
    if hidden_size is not None and first == (own, 2 * own):
        checks.check_hidden_size(source, own, hidden_size)
    size = hidden_size or own
    for head, blocks in enumerate(weights.blocks):
        _check_linear(source, layout.block_key(head, 0), weights.linear[head], size, (head + 2) * size)
        residual = layout.block_key(head, 0, "res_connection")
        _check_linear(source, residual, weights.residual[head], size, (head + 2) * size)
        for layer, block in enumerate(blocks, start=1):
            _check_linear(source, layout.block_key(head, layer), block, size, size)
    key = layout.output_key(0) + ".weight"
    for head, output in enumerate(weights.outputs):
        rows = checks.check_rows(source, key, weights.outputs[0].weight)
        _check_linear(source, layout.output_key(head), output, rows, size)
        if weights.token_map is not None and len(weights.token_map) != rows:
            raise CheckpointError(
                f"{source}: {TOKEN_MAP} has {len(weights.token_map)} ids, {key} has {rows} rows"
            )


def _check_linear(source: str, module: str, linear: Linear, rows: int, width: int) -> None:
    assert linear.bias is not None
    checks.check_shape(source, module + ".weight", linear.weight, (rows, width))
    checks.check_shape(source, module + ".bias", linear.bias, (rows,))
