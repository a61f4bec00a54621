"""Accept and noise as really compiled programs: the bits of the eager ones, for every size of tree."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim

from medusa_core.engine.noise_program import NoiseProgram
from medusa_core.engine.sampling import noise_keys, noise_of_keys
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.accepting import (
    FILTERED,
    GREEDY,
    UNFILTERED,
    VOCAB,
    Program,
    accept_program,
    as_tensor,
    check_step,
    make_case,
    rows_of,
)

TREE, PLACES, POSITIONS = Dim("T", min=2, max=1024), Dim("D1", min=2, max=65), Dim("P", min=2, max=65)
# As `AcceptProgram.forward` takes them; without the last two if all rows are greedy.
ACCEPT_SHAPES = (
    *[{1: TREE}] * 4,
    {1: TREE, 2: TREE},
    {1: TREE},
    None,
    None,
    {0: PLACES},
    None,
    None,
    {1: POSITIONS},
)

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


def compile_program(program: nn.Module, example: tuple[Tensor, ...], shapes: object, path: Path) -> Program:
    with torch.no_grad():
        exported = torch.export.export(
            program,
            example,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_it_decides_what_the_eager_runner_decides(
    tiny_backbone: Backbone, tmp_path: Path, kind: str, rows: int
) -> None:
    kinds = UNFILTERED + FILTERED

    def params(seed: int) -> list[SamplingParams]:
        if kind == "greedy":
            return [GREEDY] * rows
        # One row at least is sampled: steps of greedy ones only are for the other program.
        return [kinds[seed % len(kinds)], *rows_of(rows - 1, seed)]

    example = make_case(tiny_backbone, 0, params(0)).tensors()
    accept = accept_program(tiny_backbone, sampled=kind == "sampled")
    program = compile_program(accept, example, ACCEPT_SHAPES[: len(example)], tmp_path / "accept.pt2")
    flags = []
    with torch.inference_mode():
        for seed in range(100):
            flags += check_step(program, make_case(tiny_backbone, seed, params(seed)), tiny_backbone)
    assert sum(flags) < 0.05 * len(flags)


def test_it_draws_the_eager_noise(tmp_path: Path) -> None:
    vocabulary = torch.arange(VOCAB)
    example = torch.tensor([noise_keys(1, range(5))])
    program = compile_program(NoiseProgram(vocabulary), (example,), ({1: POSITIONS},), tmp_path / "noise.pt2")
    for count in (2, 5, 65):
        keys = torch.tensor([noise_keys(2**64 - count, range(count))])
        assert torch.equal(as_tensor(program(keys)), noise_of_keys(keys, vocabulary))
