"""Draft programs and heads with packed weights, run eagerly."""

from copy import deepcopy

import pytest
import torch

from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.program import DraftProgram
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.model.packed import PackedLinear
from tests.core.conftest import heads_of_kind, new_hydra_heads, randomize
from tests.core.drafting import draft_inputs

CPU = torch.device("cpu")
NODES = 12
AnyHeads = MedusaHeads | HydraHeads


@pytest.fixture(params=["medusa", "hydra", "hydra++"])
def heads(request: pytest.FixtureRequest, tiny_backbone: Backbone) -> AnyHeads:
    return randomize(heads_of_kind(request.param, tiny_backbone))


@torch.inference_mode()
def test_rows_have_temperatures_of_their_own(heads: AnyHeads) -> None:
    """One call for a greedy row and two sampled ones: as each alone."""
    program = DraftProgram(heads, NODES, CPU)
    rows = [draft_inputs(seed, temperature) for seed, temperature in ((1, 0.5), (2, 1.2))]
    greedy = draft_inputs(3, 0.0)
    rows.append((*greedy, torch.tensor([0.0]), rows[0][4]))
    together = program(*map(torch.cat, zip(*rows, strict=True)))
    for row, alone in enumerate([*rows[:2], greedy]):
        for of_all, own in zip(together, program(*alone), strict=True):
            assert torch.equal(of_all[row], own[0])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
@torch.inference_mode()
def test_packed_heads_say_the_same(tiny_backbone: Backbone, kind: str, shared: bool, layers: int) -> None:
    size = {"num_heads": 4, "num_layers": layers, "hidden_size": 64, "vocab_size": 320}
    shared_output = tiny_backbone.lm_head_weight if shared else None
    plain: AnyHeads
    if kind == "medusa":
        plain = randomize(MedusaHeads(**size, shared_output=shared_output))  # type: ignore[arg-type]
    else:
        plain = new_hydra_heads(tiny_backbone, layers, with_prefix=False)
        plain = randomize(HydraHeads(plain.shape, embed=tiny_backbone.embed, shared_output=shared_output))
    packed = deepcopy(plain)
    packed.pack()
    layers_of_it = [layer for layer in packed.modules() if isinstance(layer, PackedLinear)]
    assert all(layer.weight.is_mkldnn for layer in layers_of_it)
    kept = {name.rsplit(".", 1)[0] for name, _ in packed.named_parameters()}
    assert all(isinstance(packed.get_submodule(name), PackedLinear) for name in kept)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    if isinstance(plain, MedusaHeads) and isinstance(packed, MedusaHeads):
        expected = plain.draft_logits(hidden)
        torch.testing.assert_close(packed.draft_logits(hidden), expected, atol=1e-4, rtol=1e-4)
    elif isinstance(plain, HydraHeads) and isinstance(packed, HydraHeads):
        for level in range(4):
            paths = torch.randint(5, 320, (3, 6, level + 1))
            expected = plain.level_logits(level, hidden, paths)
            logits = packed.level_logits(level, hidden, paths)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_backbones_packed_output_layer_is_shared(tiny_backbone: Backbone) -> None:
    weight = tiny_backbone.lm_head_weight
    heads = randomize(
        MedusaHeads(num_heads=4, num_layers=1, hidden_size=64, vocab_size=320, shared_output=weight)
    )
    output = PackedLinear(weight)
    output.pack()
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    expected = heads.draft_logits(hidden)
    heads.pack(shared_output=output)
    assert all(layer is output for name, layer in heads.named_modules() if name.endswith("output"))
    torch.testing.assert_close(heads.draft_logits(hidden), expected)


@torch.inference_mode()
def test_a_packed_prefix_layer_reads_the_same(tiny_backbone: Backbone) -> None:
    heads = randomize(new_hydra_heads(tiny_backbone, num_layers=1, with_prefix=True))
    assert heads.cache_shape is not None
    hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(2))
    expected = heads.contextualize(hidden)
    heads.pack()
    cache = KVCache(heads.cache_shape, slots=2, capacity=40, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(heads.read(hidden[:, :7], [7], cache.rows((1,))), expected[:, 6])
    torch.testing.assert_close(heads.read(hidden[:, 7:], [2], cache.rows((1,))), expected[:, 8])
    torch.testing.assert_close(heads.contextualize(hidden), expected)
