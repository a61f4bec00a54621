"""What the keys of Medusa heads mean: layouts A to E told apart, counted and checked strictly."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from medusa_core.checkpoints.weights import (
    Linear,
    MedusaWeights,
    check_float,
    check_shape,
    check_token_map,
)
from medusa_core.errors import CheckpointError

HEAD_PREFIX = "medusa_head."  # format C: heads among a whole model's weights
MODELOPT_PREFIX = "medusa_heads."  # format E, and optionally D
TOKEN_MAP = "token_map"  # noqa: S105  # nosec B105
SHOWN_KEYS = 6


@dataclass(frozen=True, slots=True)
class Naming:
    """How a layout spells its keys; `{layer}` of an output layer is the number of blocks."""

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

    @property
    def parts(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.has_bias else ("weight",)

    def keys(self) -> set[str]:
        """Every key such a file must have, and no other."""
        places = [(head, layer) for head in range(self.num_heads) for layer in range(self.num_layers)]
        keys = {self.block_key(head, layer, part) for head, layer in places for part in self.parts}
        keys |= {self.output_key(head) for head in range(self.num_outputs)}
        return keys | ({self.naming.token_map} if self.has_token_map else set())


def is_vllm_key(key: str) -> bool:
    """Whether only layout D has such a key, with or without its optional prefix."""
    return VLLM_KEY.fullmatch(key) is not None


def parse_layout(source: str, tensors: dict[str, Tensor]) -> HeadLayout:
    """Count heads and layers, and see that exactly the keys they imply are there, else `CheckpointError`."""
    naming = _naming(tensors)
    parsed = [match for match in map(naming.pattern.fullmatch, tensors) if match]
    outputs = {int(match["head"]) for match in parsed if match["output"]}
    blocks = [match for match in parsed if not match["output"]]
    if not blocks:
        raise CheckpointError(f"{source} holds no Medusa heads (keys like {naming.example}): {some(tensors)}")
    num_heads = 1 + max(int(match["head"]) for match in parsed)
    num_layers = 1 + max(int(match["layer"]) for match in blocks)
    if num_heads * num_layers > len(tensors):  # also keeps a lone "999999999.…" key harmless
        raise CheckpointError(f"{source} has gaps between its heads or layers: {some(tensors)}")
    is_vllm = naming is VLLM
    layout = HeadLayout(
        naming=naming,
        num_heads=num_heads,
        num_layers=num_layers,
        num_outputs=1 if is_vllm and outputs == {0} else num_heads if is_vllm or outputs else 0,
        has_bias=not is_vllm or any(match["part"] == "bias" for match in blocks),
        has_token_map=naming.token_map in tensors,
    )
    refuse_differences(
        f"{source} does not hold {num_heads} heads of {num_layers} layers ({naming.title})",
        layout.keys(),
        tensors,
    )
    return layout


def parse_medusa(source: str, tensors: dict[str, Tensor], hidden_size: int | None) -> MedusaWeights:
    """The tensors in their places, after all were checked. `hidden_size` None: whatever the file has."""
    layout = parse_layout(source, tensors)
    token_map = None
    if layout.has_token_map:
        token_map = check_token_map(source, layout.naming.token_map, tensors[layout.naming.token_map])
    floats = {
        key: check_float(source, key, tensor)
        for key, tensor in tensors.items()
        if key != layout.naming.token_map
    }
    _check_shapes(source, floats, layout, hidden_size)
    return MedusaWeights(
        blocks=tuple(
            tuple(
                Linear(
                    floats[layout.block_key(head, layer, "weight")],
                    floats.get(layout.block_key(head, layer, "bias")),
                )
                for layer in range(layout.num_layers)
            )
            for head in range(layout.num_heads)
        ),
        outputs=_mapped_outputs(source, floats, layout, token_map),
        token_map=token_map,
    )


def refuse_differences(complaint: str, expected: set[str], found: Iterable[str]) -> None:
    """Raises `CheckpointError` naming what is missing and what is too much."""
    missing, unexpected = expected - set(found), set(found) - expected
    problems = [
        f"{what} {some(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]
    if problems:
        raise CheckpointError(f"{complaint}: " + "; ".join(problems))


def some(keys: Iterable[str]) -> str:
    """The first few of many keys, in their natural order."""
    ordered = sorted(keys, key=_natural)
    more = f" and {len(ordered) - SHOWN_KEYS} more" if len(ordered) > SHOWN_KEYS else ""
    return (", ".join(ordered[:SHOWN_KEYS]) or "no keys at all") + more


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
    if hidden_size is not None and own is not None and own != hidden_size:
        raise CheckpointError(
            f"{source}: heads are for hidden size {own}, the backbone's hidden size is {hidden_size}"
        )
    size = hidden_size or own or int(first[0] if first else 0)
    rows = 0
    if layout.num_outputs:
        output_shape = tensors[layout.output_key(0)].shape
        rows = int(output_shape[0]) if output_shape else 0
    shapes = {"weight": (size, size), "bias": (size,)}
    for head in range(layout.num_heads):
        for layer in range(layout.num_layers):
            for part in layout.parts:
                key = layout.block_key(head, layer, part)
                check_shape(source, key, tensors[key], shapes[part])
    for head in range(layout.num_outputs):
        key = layout.output_key(head)
        check_shape(source, key, tensors[key], (rows, size))
        if not rows:
            raise CheckpointError(f"{source}: {key} has a vocabulary of 0")


def _mapped_outputs(
    source: str, tensors: dict[str, Tensor], layout: HeadLayout, token_map: Tensor | None
) -> tuple[Tensor, ...]:
    """The output layers with as many rows as the token map has ids."""
    keys = [layout.output_key(head) for head in range(layout.num_outputs)]
    if token_map is None or not keys or len(tensors[keys[0]]) == len(token_map):
        return tuple(tensors[key] for key in keys)
    rows = len(tensors[keys[0]])
    if rows < len(token_map) or int(token_map.max()) >= rows:
        raise CheckpointError(
            f"{source}: {layout.naming.token_map} has {len(token_map)} ids up to {int(token_map.max())}, "
            f"{keys[0]} has {rows} rows"
        )
    return tuple(tensors[key][token_map] for key in keys)  # the whole vocabulary's rows, as vLLM takes too


def _natural(key: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isascii() and part.isdigit() and len(part) < 10 else (-1, part)
        for part in key.split(".")
    ]
