"""Compiles a program ahead of time, for any weights of the same shapes: they are given when it is loaded.

torch.export traces it, AOTInductor makes C++ of it, and a C++ compiler a library. Takes tens of seconds.
"""

import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medusa_core.programs.program import Program, constants_of

LIBRARY, LITERALS = "program.so", "literals.safetensors"
WORKPLACE = "TORCHINDUCTOR_CACHE_DIR"  # where torch puts what it makes on the way, and loads it from
OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "size_asserts": False,  # packed weights have no strides to assert
    "always_keep_tensor_constants": True,  # else short ones are compiled in, and these have no content yet
    "compile_threads": 1,
}


def missing_compiler() -> str | None:
    """Why nothing can be compiled here; None if a C++ compiler is found."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # imports much of the compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        return f"no C++ compiler ({str(error).splitlines()[0]})"
    return None


def compile_program(program: Program, folder: Path) -> None:
    """Write the compiled program into `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        temporary = Path(name) / "program"
        temporary.mkdir()
        os.environ.setdefault(WORKPLACE, str(folder.parent / "inductor"))  # not in /tmp, if that is noexec
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its own parts
            _compile(program, temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            if not (folder / LIBRARY).exists():
                raise


def _compile(program: Program, folder: Path) -> None:
    traced = torch.export.export(
        program,
        program.example(),
        dynamic_shapes=program.sizes(),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    package = folder / "program.pt2"
    torch._inductor.aoti_compile_and_package(traced, package_path=str(package), inductor_configs=OPTIONS)
    _take_library(package, folder / LIBRARY)
    known = constants_of(program)
    literals = {name: value.detach().clone() for name, value in traced.constants.items() if name not in known}
    save_file(literals, str(folder / LITERALS))


def _take_library(package: Path, library: Path) -> None:
    """All of the package that is needed, so that nothing has to be unpacked at each start."""
    with zipfile.ZipFile(package) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".so")]
        library.write_bytes(archive.read(name))
    package.unlink()
