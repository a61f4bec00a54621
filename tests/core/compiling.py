"""Programs really compiled, as an engine does it: weights are packed and handed over only then."""

import warnings
from pathlib import Path

import pytest

from medusa_core.model.packed import PackedLinear
from medusa_core.programs.compiled import CompiledProgram
from medusa_core.programs.library import ProgramLibrary
from medusa_core.programs.program import Program


def compiled(program: Program, folder: Path) -> CompiledProgram:
    """Skips the test where there is no compiler."""
    library = ProgramLibrary(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter and compiler use what torch deprecates
        if not library.can_compile():
            pytest.skip("needs a C++ compiler")
        library.add(program)
    for layer in program.modules():
        if isinstance(layer, PackedLinear):
            layer.pack()
    found = library.find(program)
    assert found is not None
    return found
