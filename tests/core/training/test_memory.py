"""The paper formula of the peak against the bytes that a training step on the demo model really holds."""

import re
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medusa_core.config import EMBEDDED_MODEL
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.training.config import LossKind
from medusa_core.training.data import NO_TARGET
from medusa_core.training.loss import CHUNK_ELEMENTS
from medusa_core.training.memory import MemoryShape, estimate_memory
from medusa_core.training.module import HeadModule

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "training.md"


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed; those of `known` tensors are there."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step(model: HeadModule, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("dtype", "rows", "num_layers", "shared"),
    [
        (torch.float32, 4, 1, False),
        (torch.float32, 16, 2, False),
        (torch.bfloat16, 8, 1, False),
        (torch.float32, 8, 1, True),
    ],
)
def test_the_formula_on_the_demo_model(dtype: torch.dtype, rows: int, num_layers: int, shared: bool) -> None:
    length = 128
    backbone: Backbone = load_backbone(EMBEDDED_MODEL, dtype=dtype, device=torch.device("cpu"))
    heads = MedusaHeads.new(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=5,
        num_layers=num_layers,
        lm_head_weight=backbone.lm_head_weight.float(),
        shared=shared,
    )
    model = HeadModule(backbone, heads, loss=LossKind.TEACHER, decay=0.8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(5, 4000, (rows, length))
    batch = {"input_ids": ids, "labels": ids.index_fill(1, torch.arange(8), NO_TARGET)}
    step(model, optimizer, batch)
    weights = bytes_of(backbone.model.parameters())
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    with LiveBytes([*backbone.model.parameters(), *model.parameters(), *model.buffers(), *moments]) as live:
        step(model, optimizer, batch)
    estimate = estimate_memory(
        MemoryShape(
            backbone_bytes=weights,
            num_heads=5,
            num_layers=num_layers,
            hidden_size=backbone.hidden_size,
            output_rows=backbone.vocab_size,
            tokens=rows * length,
            itemsize=dtype.itemsize,
            has_output=not shared,
        )
    )
    assert estimate.heads + estimate.backbone == weights + 3 * bytes_of(heads.parameters())
    moving = estimate.activations + estimate.gradients
    assert 0.85 * moving < live.peak <= moving
    output = 0 if shared else 5 * backbone.vocab_size * backbone.hidden_size
    features = 5 * rows * length * backbone.hidden_size
    assert live.largest <= 4 * max(output, features, CHUNK_ELEMENTS)


def test_figures_in_the_documentation() -> None:
    """The table for Vicuna-7B: 6.74 billion parameters, five heads of one layer."""
    rows = re.findall(r"^\| (\d+) \| (\w+) \| ([\d.]+) \|$", DOCUMENTATION.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for tokens, backbone_bits, gib in rows:
        estimate = estimate_memory(
            MemoryShape(
                backbone_bytes=int(6.74e9 * {"bf16": 2, "4bit": 0.5}[backbone_bits]),
                num_heads=5,
                num_layers=1,
                hidden_size=4096,
                output_rows=32000,
                tokens=int(tokens),
                itemsize=2,
            )
        )
        assert float(gib) == round(estimate.peak / 2**30, 1)
