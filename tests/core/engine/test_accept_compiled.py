"""Accept and noise as really compiled programs: the bits of the eager ones, for every size of tree."""

from pathlib import Path

import pytest
import torch

from medusa_core.engine.noise_program import NoiseProgram
from medusa_core.engine.sampling import noise_keys, noise_of_keys
from medusa_core.model.backbone import Backbone
from tests.core.accepting import (
    FILTERED,
    GREEDY,
    UNFILTERED,
    VOCAB,
    accept_program,
    check_step,
    make_case,
)
from tests.core.compiling import compiled

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_it_decides_what_the_eager_runner_decides(tiny_backbone: Backbone, tmp_path: Path, kind: str) -> None:
    program, flags = compiled(accept_program(tiny_backbone, sampled=kind == "sampled"), tmp_path), []
    kinds = [GREEDY] if kind == "greedy" else UNFILTERED + FILTERED
    with torch.inference_mode():
        for seed in range(100):
            case = make_case(tiny_backbone, seed, [kinds[seed % len(kinds)]])
            flags += check_step(program, case, tiny_backbone)
    assert sum(flags) < 0.05 * len(flags)


def test_it_draws_the_eager_noise(tmp_path: Path) -> None:
    vocabulary = torch.arange(VOCAB)
    program = compiled(NoiseProgram(vocabulary), tmp_path)
    for count in (2, 5, 65):
        keys = torch.tensor([noise_keys(2**64 - count, range(count))])
        [noise] = program(keys)
        assert torch.equal(noise, noise_of_keys(keys, vocabulary))
