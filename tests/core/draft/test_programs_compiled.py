"""Draft and read programs really compiled, with packed weights: what they say eagerly."""

from pathlib import Path

import pytest
import torch

from medusa_core.draft.program import DraftProgram
from medusa_core.draft.tree import Tree, make_tree
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from tests.core.compiling import compiled
from tests.core.conftest import heads_of_kind, new_hydra_heads, randomize
from tests.core.drafting import draft_inputs

CPU = torch.device("cpu")
NODES = 12
STATIC = make_tree("static", [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 2]])

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "shape"), [("medusa", STATIC), ("hydra", NODES)])
@torch.no_grad()
def test_compiled_drafts_are_the_eager_ones(
    tiny_backbone: Backbone, tmp_path: Path, kind: str, shape: Tree | int
) -> None:
    heads = randomize(heads_of_kind(kind, tiny_backbone))
    heads.pack(pack=False)
    program = DraftProgram(heads, shape, CPU)
    run = compiled(program, tmp_path)
    for seed in range(50):
        given = draft_inputs(seed, 0.8)
        for got, expected in zip(run(*given), program(*given), strict=True):
            assert torch.equal(got, expected)


@torch.no_grad()
def test_compiled_reads_are_the_eager_ones(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Of what is read, and of the keys and values of all slots."""
    heads = randomize(new_hydra_heads(tiny_backbone, num_layers=1, with_prefix=True))
    heads.pack(pack=False)
    assert heads.reader is not None
    assert heads.cache_shape is not None
    caches = [
        KVCache(heads.cache_shape, slots=3, capacity=400, dtype=torch.float32, device=CPU) for _ in range(2)
    ]
    run = compiled(heads.reader.run.program, tmp_path)
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        slot, count = step % 3, 1 + step % 5
        hidden = torch.randn(1, count, 64, generator=generator)
        outputs = []
        for cache, way in zip(caches, (run, None), strict=True):
            heads.reader.run.compiled = way
            outputs.append(heads.read(hidden, [count], cache.rows((slot,))))
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(caches[0].storage_L2BHCD, caches[1].storage_L2BHCD)
    assert max(caches[0].lengths) > 50
