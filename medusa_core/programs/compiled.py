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
        # Kept, as the library only points at them.
        self._constants = {internal: constants[name] for internal, name in names.items()}
        self._runner.update_constant_buffer(self._constants, False, False, user_managed=True)

    def __call__(self, *arguments: Argument) -> tuple[Tensor, ...]:
        return tuple(self._runner.run(flatten(arguments)))
