"""Reads the tensors of Medusa heads in layouts A to E: told apart by keys, counted and checked strictly."""

from collections.abc import Iterable

from torch import Tensor

from medusa_core.checkpoints.checks import (
    check_float,
    check_keys,
    check_rows,
    check_shape,
    check_token_map,
    some_keys,
)
from medusa_core.checkpoints.keys import (
    HEAD_PREFIX,
    IN_MODEL,
    MODELOPT,
    MODELOPT_PREFIX,
    PLAIN,
    VLLM,
    HeadLayout,
    Naming,
    is_vllm_key,
)
from medusa_core.checkpoints.weights import Linear, MedusaWeights
from medusa_core.errors import CheckpointError


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

    return MedusaWeights(
        blocks=tuple(
            tuple(block(head, layer) for layer in range(layout.num_layers))
            for head in range(layout.num_heads)
        ),
        outputs=_outputs(source, floats, layout, token_map),
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
    if hidden_size is not None and own is not None and own != hidden_size:
        raise CheckpointError(
            f"{source}: heads are for hidden size {own}, the backbone's hidden size is {hidden_size}"
        )
    size = hidden_size or own or int(first[0] if first else 0)
    outputs = layout.output_keys()
    for key in sorted(tensors.keys() - set(outputs)):
        check_shape(source, key, tensors[key], (size,) if key.endswith("bias") else (size, size))
    for key in outputs:
        check_shape(source, key, tensors[key], (check_rows(source, key, tensors[outputs[0]]), size))


def _outputs(
    source: str, tensors: dict[str, Tensor], layout: HeadLayout, token_map: Tensor | None
) -> tuple[Linear, ...]:
    """The output layers with as many rows as the token map has ids."""
    keys = layout.output_keys()
    if token_map is None or not keys or len(tensors[keys[0]]) == len(token_map):
        return tuple(Linear(tensors[key]) for key in keys)
    rows = len(tensors[keys[0]])
    if rows < len(token_map) or int(token_map.max()) >= rows:
        raise CheckpointError(
            f"{source}: {layout.naming.token_map} has {len(token_map)} ids up to {int(token_map.max())}, "
            f"{keys[0]} has {rows} rows"
        )
    # Layers of the whole vocabulary, which vLLM shortens by the map too.
    return tuple(Linear(tensors[key][token_map]) for key in keys)
