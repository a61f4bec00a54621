"""Medusa heads in layouts A to E: their tensors' names; told apart by keys, counted and checked strictly."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.checkpoints.checks import (
    check_float,
    check_hidden_size,
    check_keys,
    check_rows,
    check_shape,
    check_token_map,
    some_keys,
)
from medusa_core.checkpoints.weights import Linear, MedusaWeights
from medusa_core.errors import CheckpointError

HEAD_PREFIX = "medusa_head."  # layout C: heads among a whole model's weights
MODELOPT_PREFIX = "medusa_heads."  # layout E, and optionally D
TOKEN_MAP = "token_map"  # noqa: S105  # nosec B105


@dataclass(frozen=True, slots=True)
class Naming:
    """A layout's key templates; `{layer}` of an output layer is the number of blocks."""

    title: str
    pattern: re.Pattern[str]  # groups: head, layer, part (of a block) or output
    block: str
    output: str
    token_map: str
    example: str


def _dotted(prefix: str, title: str) -> Naming:
    pattern = (
        re.escape(prefix)
        + r"(?P<head>\d{1,9})\.(?P<layer>\d{1,9})\.(?:linear\.(?P<part>weight|bias)|(?P<output>weight))"
    )
    block, output = prefix + "{head}.{layer}.linear.{part}", prefix + "{head}.{layer}.weight"
    return Naming(title, re.compile(pattern), block, output, prefix + TOKEN_MAP, prefix + "0.0.linear.weight")


PLAIN = _dotted("", "Medusa heads")
IN_MODEL = _dotted(HEAD_PREFIX, "Medusa heads of a whole model")
MODELOPT = _dotted(MODELOPT_PREFIX, "the ModelOpt / TensorRT-LLM layout")
VLLM = Naming(
    title="vLLM's own Medusa layout",
    pattern=re.compile(
        r"(?P<output>lm_heads\.)?(?(output)|blocks\.)(?P<head>\d{1,9})\."
        r"(?(output)|layers\.(?P<layer>\d{1,9})\.)(?P<part>weight|bias)"
    ),
    block="blocks.{head}.layers.{layer}.{part}",
    output="lm_heads.{head}.weight",
    token_map=TOKEN_MAP,
    example="blocks.0.layers.0.weight",
)
VLLM_KEY = re.compile(rf"(?:{re.escape(MODELOPT_PREFIX)})?(?:blocks\.\d+\.layers|lm_heads\.\d+)\..*")


def is_vllm_key(key: str) -> bool:
    """Whether only layout D has such a key, with or without its optional prefix."""
    return VLLM_KEY.fullmatch(key) is not None


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """K heads of L blocks. `num_outputs`: K, 1 for all heads together, or 0 for the backbone's."""

    naming: Naming
    num_heads: int
    num_layers: int
    num_outputs: int
    has_bias: bool = True
    has_token_map: bool = False

    def block_key(self, head: int, layer: int, part: str) -> str:
        return self.naming.block.format(head=head, layer=layer, part=part)

    def output_key(self, head: int) -> str:
        return self.naming.output.format(head=head, layer=self.num_layers)

    def block_keys(self, part: str) -> set[str]:
        """The key of that part ("weight" or "bias") of every block."""
        places = [(head, layer) for head in range(self.num_heads) for layer in range(self.num_layers)]
        return {self.block_key(head, layer, part) for head, layer in places}

    def output_keys(self) -> list[str]:
        return [self.output_key(head) for head in range(self.num_outputs)]

    def keys(self) -> set[str]:
        """Every key such a file must have, and no other."""
        biases = self.block_keys("bias") if self.has_bias else set()
        token_map = {self.naming.token_map} if self.has_token_map else set()
        return self.block_keys("weight") | biases | {*self.output_keys()} | token_map


def parse_medusa(source: str, tensors: dict[str, Tensor], hidden_size: int | None) -> MedusaWeights:
    """The checked tensors in their places. `hidden_size` None accepts any."""
    layout = parse_layout(source, tensors)
    name, token_map = layout.naming.token_map, None
    if layout.has_token_map:
        token_map = check_token_map(source, name, tensors[name])
    floats = {key: check_float(source, key, tensor) for key, tensor in tensors.items() if key != name}
    _check_shapes(source, floats, layout, hidden_size)

    def block(head: int, layer: int) -> Linear:
        bias = floats.get(layout.block_key(head, layer, "bias"))
        return Linear(floats[layout.block_key(head, layer, "weight")], bias)

    outputs, token_map = _outputs(source, floats, layout, token_map)
    return MedusaWeights(
        blocks=tuple(
            tuple(block(head, layer) for layer in range(layout.num_layers))
            for head in range(layout.num_heads)
        ),
        outputs=outputs,
        token_map=token_map,
    )


def parse_layout(source: str, tensors: dict[str, Tensor]) -> HeadLayout:
    """Count heads and layers; `CheckpointError` unless exactly the keys they imply are there."""
    naming = _naming(tensors)
    parsed = [match for match in map(naming.pattern.fullmatch, tensors) if match]
    outputs = {int(match["head"]) for match in parsed if match["output"]}
    blocks = [match for match in parsed if not match["output"]]
    if not blocks:
        raise CheckpointError(
            f"{source} holds no Medusa heads (keys like {naming.example}): {some_keys(tensors)}"
        )
    num_heads = 1 + max(int(match["head"]) for match in parsed)
    num_layers = 1 + max(int(match["layer"]) for match in blocks)
    if num_heads * num_layers > len(tensors):  # also keeps a lone "999999999.…" key harmless
        raise CheckpointError(f"{source} has gaps between its heads or layers: {some_keys(tensors)}")
    is_vllm = naming is VLLM
    layout = HeadLayout(
        naming=naming,
        num_heads=num_heads,
        num_layers=num_layers,
        num_outputs=1 if is_vllm and outputs == {0} else num_heads if is_vllm or outputs else 0,
        has_bias=not is_vllm or any(match["part"] == "bias" for match in blocks),
        has_token_map=naming.token_map in tensors,
    )
    complaint = f"{source} does not hold {num_heads} heads of {num_layers} layers ({naming.title})"
    check_keys(complaint, layout.keys(), tensors)
    return layout


def without_optional_prefix(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layout D's keys without the prefix that vLLM removes as well; others as they are."""
    if not any(is_vllm_key(key) for key in tensors):
        return tensors
    for key in tensors:
        if key.startswith(MODELOPT_PREFIX) and key.removeprefix(MODELOPT_PREFIX) in tensors:
            raise CheckpointError(f"{source}: {key} is there with its prefix and without")
    return {key.removeprefix(MODELOPT_PREFIX): tensor for key, tensor in tensors.items()}


def _naming(keys: Iterable[str]) -> Naming:
    if any(is_vllm_key(key) for key in keys):
        return VLLM
    for prefix, naming in ((MODELOPT_PREFIX, MODELOPT), (HEAD_PREFIX, IN_MODEL)):
        if any(key.startswith(prefix) for key in keys):
            return naming
    return PLAIN


def _check_shapes(
    source: str, tensors: dict[str, Tensor], layout: HeadLayout, hidden_size: int | None
) -> None:
    first = tensors[layout.block_key(0, 0, "weight")].shape
    own = int(first[0]) if len(first) == 2 and first[0] == first[1] else None
    if hidden_size is not None and own is not None:
        check_hidden_size(source, own, hidden_size)
    size = hidden_size or own or int(first[0] if first else 0)
    outputs = layout.output_keys()
    for key in sorted(tensors.keys() - set(outputs)):
        check_shape(source, key, tensors[key], (size,) if key.endswith("bias") else (size, size))
    for key in outputs:
        check_shape(source, key, tensors[key], (check_rows(source, key, tensors[outputs[0]]), size))


def _outputs(
    source: str, tensors: dict[str, Tensor], layout: HeadLayout, token_map: Tensor | None
) -> tuple[tuple[Linear, ...], Tensor | None]:
    """The output layers with as many rows as the token map has ids, and the map, if they still need one."""
    keys = layout.output_keys()
    if token_map is None or not keys or len(tensors[keys[0]]) == len(token_map):
        return tuple(Linear(tensors[key]) for key in keys), token_map
    rows = len(tensors[keys[0]])
    if rows < len(token_map) or int(token_map.max()) >= rows:
        raise CheckpointError(
            f"{source}: {layout.naming.token_map} has {len(token_map)} ids up to {int(token_map.max())}, "
            f"{keys[0]} has {rows} rows"
        )
    # Layers of the whole vocabulary, which vLLM shortens by the map too. Heads that just lack the last tokens
    # need no map then; one layer for all does: without one it would pass for the backbone's.
    is_first_ids = torch.equal(token_map, torch.arange(len(token_map)))
    outputs = tuple(Linear(tensors[key][token_map]) for key in keys)
    return outputs, None if is_first_ids and len(keys) == layout.num_heads else token_map
