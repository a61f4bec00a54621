"""Which dtype multiplies a model's weights fastest on this CPU: the products of its layers, timed once.

Only a few layers are built, and large ones in part, so that it takes well under a second. Weights that fit no
cache are needed to see what a step sees, which reads all of them.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from medusa_core.disk_cache import key_of, load_json, store_json
from medusa_core.machine import machine_facts
from medusa_core.model.backbone import LOADING_FAILURES, quiet_transformers
from medusa_core.model.packed import PackedLinear

logger = logging.getLogger(__name__)

TREE_ROWS = 16  # of a step that verifies a tree; without speculation it is 1
ROWS = (1, TREE_ROWS)
MAX_WEIGHTS = 16 * 2**20  # in all: 64 MiB in float32
MEASURE_SECONDS = 0.4
MIN_REPEATS, MAX_REPEATS = 4, 25

Shape = tuple[int, int]  # rows of a weight, and their length
Times = dict[str, dict[int, float]]  # kind of weight -> rows multiplied -> seconds


@dataclass(frozen=True, slots=True)
class Product:
    """Multiplies rows of a dtype by a weight of its own."""

    dtype: torch.dtype
    multiply: Callable[[Tensor], Tensor]


def fastest_cpu_dtype(model: str | Path, rows: int) -> torch.dtype | None:
    """float32 or bfloat16 for products of `rows`; None if the config does not say how large they are.

    The times are kept on disk.
    """
    shapes = weight_shapes(model)
    if shapes is None:
        return None
    name = f"cpu-dtype-{key_of(shapes=shapes, machine=machine_facts())}"
    times = _from_json(load_json(name))
    if times is None:
        times = measure_products(shapes)
        store_json(name, dict(times))
    chosen, text = choose(times, rows)
    logger.info("%s", text)
    return chosen


def choose(times: Times, rows: int) -> tuple[torch.dtype, str]:
    """The faster dtype at so many rows, and why, in figures. bfloat16 is served with packed weights."""
    single = times["float32"]
    half = min((row for kind, row in times.items() if kind != "float32"), key=lambda row: row[rows])
    chosen = torch.float32 if single[rows] < half[rows] else torch.bfloat16
    figures = ", ".join(
        f"{kind} {' / '.join(f'{1e3 * row[count]:.2f}' for count in ROWS)}" for kind, row in times.items()
    )
    name = str(chosen).removeprefix("torch.")
    return chosen, f"{name} is fastest here at {rows} rows (ms for {ROWS[0]} / {ROWS[1]} rows: {figures})"


@torch.inference_mode()
def measure_products(shapes: list[Shape]) -> Times:
    """Seconds to multiply by weights of all shapes, each at its fastest of several interleaved rounds.

    The fastest, as whatever else runs on the machine only ever adds to a time.
    """
    products = {
        "float32": [_plain(shape, torch.float32) for shape in shapes],
        "bfloat16": [_plain(shape, torch.bfloat16) for shape in shapes],
    }
    if torch.backends.mkldnn.is_available():
        products["packed bfloat16"] = [_packed(shape) for shape in shapes]
    fastest = {(kind, rows): [math.inf] * len(shapes) for kind in products for rows in ROWS}
    started = time.perf_counter()
    for done in range(MAX_REPEATS):
        if done >= MIN_REPEATS and time.perf_counter() - started > MEASURE_SECONDS:
            break
        for (kind, rows), best in fastest.items():
            best[:] = map(min, best, _seconds(products[kind], shapes, rows))
    return {kind: {rows: sum(fastest[kind, rows]) for rows in ROWS} for kind in products}


def _seconds(products: list[Product], shapes: list[Shape], rows: int) -> Iterator[float]:
    """Of each product once, in the order of a model."""
    for product, (_, length) in zip(products, shapes, strict=True):
        inputs = torch.full((rows, length), 0.5, dtype=product.dtype)
        started = time.perf_counter()
        product.multiply(inputs)
        yield time.perf_counter() - started


def _plain(shape: Shape, dtype: torch.dtype) -> Product:
    weight = torch.full(shape, 0.01, dtype=dtype)
    return Product(dtype, lambda rows: torch.nn.functional.linear(rows, weight))


def _packed(shape: Shape) -> Product:
    layer = PackedLinear(torch.full(shape, 0.01, dtype=torch.bfloat16))
    layer.pack()
    return Product(torch.bfloat16, layer)


def weight_shapes(model: str | Path) -> list[Shape] | None:
    """As many layers as `MAX_WEIGHTS` allows and the output layer; all with fewer rows if one is too many.

    None if the config does not say, or weights are quantized.
    """
    try:
        with quiet_transformers():
            whole = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
        config = whole.get_text_config()
        layer, output = _layer_shapes(config), (int(config.vocab_size), int(config.hidden_size))
        layers = int(config.num_hidden_layers)
    except LOADING_FAILURES:
        return None  # loading the model reports what is wrong
    if getattr(whole, "quantization_config", None) is not None:
        return None
    size, rest = _size(layer), _size([output])
    copies = max(1, min(layers, (MAX_WEIGHTS - rest) // max(1, size)))
    share = min(1.0, MAX_WEIGHTS / (copies * size + rest))
    return [(max(16, int(rows * share) // 16 * 16), length) for rows, length in (*layer * copies, output)]


def _layer_shapes(config: PretrainedConfig) -> list[Shape]:
    """The weights of one decoder layer: queries, keys, values, output, and a gated MLP."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    attention = [(heads * width, hidden), *[(shared * width, hidden)] * 2, (hidden, heads * width)]
    return [*attention, *[(inner, hidden)] * 2, (hidden, inner)]


def _size(shapes: Iterable[Shape]) -> int:
    return sum(rows * length for rows, length in shapes)


def _from_json(data: dict[str, Any] | None) -> Times | None:
    """None if it is not what was stored."""
    try:
        times = {kind: {rows: float(row[str(rows)]) for rows in ROWS} for kind, row in (data or {}).items()}
    except (LookupError, TypeError, ValueError):
        return None
    return times if {"float32", "bfloat16"} <= times.keys() else None
