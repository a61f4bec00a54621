"""Compiled programs on disk: looked up by what they are made of, with the weights of the module that asks."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from medusa_core.programs.compiler import LIBRARY
from medusa_core.programs.library import FOLDER, ProgramLibrary
from medusa_core.programs.program import Argument, Program, flatten
from medusa_core.programs.skeleton import program_key, skeleton_of
from medusa_core.programs.switch import Switch
from tests.core.compiling import compiled


class Scaled(Program):
    """x @ w * scale, added to what is in a cache."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.layer = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def facts(self) -> object:
        return self.scale

    def example(self) -> tuple[Argument, ...]:
        return torch.zeros(1, 5, 4), [torch.zeros(5, 4), torch.zeros(5, 4)]

    def sizes(self) -> tuple[Any, ...]:
        rows = Dim("rows", min=2, max=100)
        return {1: rows}, [{0: rows}, {0: rows}]

    def forward(self, rows: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        result = self.layer(rows) * self.scale + self.offset
        caches[0].add_(result[0])
        return result, result + caches[1]


def inputs(rows: int) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(1, rows, 4), [torch.zeros(rows, 4), torch.ones(rows, 4)]


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_program_runs_any_allowed_size_with_the_live_weights(tmp_path: Path) -> None:
    program = Scaled(2.0)
    run = compiled(program, tmp_path)
    for rows in (2, 7, 100):
        given = inputs(rows)
        torch.testing.assert_close(run(*given), program(given[0], [torch.zeros(rows, 4), given[1][1]]))
        assert given[1][0].abs().sum() > 0  # it wrote to the cache that it was given
    strided = torch.randn(1, 4, 6).transpose(1, 2)
    torch.testing.assert_close(run(strided, inputs(6)[1])[0], program(strided, inputs(6)[1])[0])
    with pytest.raises(RuntimeError, match="compiled for"):
        run(strided.double(), inputs(6)[1])
    program.layer.weight.mul_(3.0)
    given = inputs(3)
    torch.testing.assert_close(run(*given)[0], program(*given)[0])
    other = Scaled(2.0)  # the same program with other weights
    again = ProgramLibrary(tmp_path).find(other)
    assert again is not None
    torch.testing.assert_close(again(*given)[0], other(*given)[0])


def test_what_a_program_is_made_of_names_it() -> None:
    assert program_key(Scaled(2.0)) == program_key(Scaled(2.0))
    wide = Scaled(2.0)
    wide.layer = nn.Linear(4, 4, bias=False)
    assert len({program_key(p) for p in (Scaled(2.0), Scaled(3.0), wide)}) == 3


def test_a_skeleton_has_the_shapes_and_none_of_the_weights() -> None:
    program = Scaled(2.0)
    skeleton = skeleton_of(program)
    for name, weight in program.state_dict().items():
        bone = skeleton.state_dict()[name]
        assert (bone.shape, bone.dtype) == (weight.shape, weight.dtype)
        assert bone.data_ptr() != weight.data_ptr()
    assert skeleton.offset.data_ptr() != program.offset.data_ptr()
    assert skeleton.scale == 2.0


def test_what_cannot_be_loaded_is_discarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program, library = Scaled(2.0), ProgramLibrary(tmp_path)
    folder = tmp_path / FOLDER / program_key(program)
    folder.mkdir(parents=True)
    (folder / LIBRARY).write_bytes(b"not a program")
    assert library.has(program)
    with caplog.at_level(logging.WARNING):
        assert library.find(program) is None
    assert "a compiled program is discarded" in caplog.text
    assert not library.has(program)


def test_nothing_is_found_where_nothing_is_kept(tmp_path: Path) -> None:
    assert ProgramLibrary(tmp_path).find(Scaled(2.0)) is None


def test_a_folder_that_others_can_write_to_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    library = ProgramLibrary(tmp_path)
    assert "others can write to it" in caplog.text
    assert not library.can_compile()
    with pytest.raises(RuntimeError, match="no folder"):
        library.add(Scaled(2.0))


def test_without_a_compiler_it_is_said_what_is_missing(tmp_path: Path) -> None:
    code = "from medusa_core.programs.compiler import missing_compiler; print(missing_compiler())"
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("no C++ compiler"), result.stderr


def test_a_program_that_fails_compiled_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __call__(self, *arguments: Argument) -> tuple[Tensor, ...]:
            raise RuntimeError("index out of bounds")

    switch = Switch(Scaled(2.0))
    switch.compiled = Broken()  # type: ignore[assignment]
    given = inputs(3)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        torch.testing.assert_close(switch(*given)[0], switch.program(*given)[0])
    assert switch.compiled is None
    assert "Scaled runs uncompiled from now on: index out of bounds" in caplog.text
    switch.program.can_repeat, switch.compiled = False, Broken()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="out of bounds"):
        switch(*given)  # what an interrupted run has changed is not changed again
    assert switch.compiled is None


def test_lists_are_taken_apart_in_order() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(tensor) for tensor in flatten((a, [b, c], a))] == [1, 2, 3, 1]
