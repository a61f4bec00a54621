"""Draft and read programs really compiled, with packed weights: what they say eagerly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim

from medusa_core.draft.program import DraftProgram
from medusa_core.draft.tree import Tree, make_tree
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.model.packed import PackedLinear
from tests.core.conftest import heads_of_kind, new_hydra_heads, randomize
from tests.core.drafting import draft_inputs

CPU = torch.device("cpu")
NODES = 12
STATIC = make_tree("static", [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 2]])

pytestmark = [
    pytest.mark.slow,
    # torch's own exporter and compiler use what torch deprecates.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler")


def compiled(
    program: nn.Module, example: tuple[Tensor, ...], shapes: object, path: Path
) -> Callable[..., Tensor]:
    """Compiled without weights, which are then packed and given to it, as an engine does."""
    exported = torch.export.export(
        program,
        example,
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    config = {"aot_inductor.package_constants_in_so": False}
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=config)
    loaded = torch._inductor.aoti_load_package(str(path))
    for layer in program.modules():
        if isinstance(layer, PackedLinear):
            layer.pack()
    own = {
        **dict(program.named_parameters(remove_duplicate=False)),
        **dict(program.named_buffers(remove_duplicate=False)),
    }
    weights = {name: own[name] for name in loaded.get_constant_fqns()}
    loaded.load_constants(weights, check_full_update=False, user_managed=True)
    return loaded


@pytest.mark.parametrize(
    ("kind", "shape", "temperature"),
    [("medusa", NODES, 0.0), ("medusa", STATIC, 0.8), ("hydra", NODES, 0.8), ("hydra++", STATIC, 0.0)],
)
@torch.no_grad()
def test_compiled_drafts_are_the_eager_ones(
    tiny_backbone: Backbone, tmp_path: Path, kind: str, shape: Tree | int, temperature: float
) -> None:
    heads = randomize(heads_of_kind(kind, tiny_backbone))
    heads.pack(pack=False)
    program = DraftProgram(heads, shape, CPU)
    example = program.example_inputs(greedy=temperature == 0.0, hidden=torch.zeros(1, 64), vocab_size=320)
    run = compiled(program, example, None, tmp_path / "draft.pt2")
    for seed in range(50):
        given = draft_inputs(seed, temperature)
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
    program = heads.reader.program
    example = program.example_inputs(torch.zeros(1, 5, 64), caches[0].storage_L2BHCD)
    shapes = (None, None, None, None, {0: Dim("W", min=8, max=400)}, None)
    run = compiled(program, example, shapes, tmp_path / "read.pt2")
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        slot, count = step % 3, 1 + step % 5
        hidden = torch.randn(1, count, 64, generator=generator)
        outputs = []
        for cache, way in zip(caches, (run, program), strict=True):
            heads.reader.run = way
            outputs.append(heads.read(hidden, [count], cache.rows((slot,))))
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(caches[0].storage_L2BHCD, caches[1].storage_L2BHCD)
    assert max(caches[0].lengths) > 50
