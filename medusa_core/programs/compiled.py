"""A compiled program, loaded: called like the module that it was made from."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from medusa_core.programs.compiler import LIBRARY, LITERALS
from medusa_core.programs.program import Argument, Program, constants_of, flatten


class CompiledProgram:
    """Runs a library with the weights of a live module, which stay where they are."""

    def __init__(self, folder: Path, program: Program) -> None:
        """Raises `RuntimeError` if the library does not fit the module or cannot be loaded."""
        constants = constants_of(program) | load_file(str(folder / LITERALS))
        self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / LIBRARY), 1)
        names = self._runner.get_constant_names_to_original_fqns()
        unknown = sorted(name for name in names.values() if name not in constants)
        if unknown:
            raise RuntimeError(f"the compiled program wants {', '.join(unknown[:3])}, which the module lacks")
        self._dtypes = [tensor.dtype for tensor in flatten(program.example())]
        # Kept, as the library only points at them.
        self._constants = {internal: constants[name] for internal, name in names.items()}
        self._runner.update_constant_buffer(self._constants, False, False, user_managed=True)

    def __call__(self, *arguments: Argument) -> tuple[Tensor, ...]:
        """Raises `RuntimeError` for arguments of other types than it was compiled for."""
        given = flatten(arguments)
        if [tensor.dtype for tensor in given] != self._dtypes:
            raise RuntimeError(f"compiled for {self._dtypes}, not for {[tensor.dtype for tensor in given]}")
        # The library knows no strides. What it changes in place, caches, is contiguous.
        return tuple(self._runner.run([tensor.contiguous() for tensor in given]))
