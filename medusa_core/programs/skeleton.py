"""A module's structure without its weights: what is traced, so that the live one is left alone."""

import copy
import hashlib
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from medusa_core.disk_cache import key_of
from medusa_core.machine import machine_facts
from medusa_core.programs.program import Program, constants_of

AnyProgram = TypeVar("AnyProgram", bound=Program)
PACKAGE = Path(__file__).parents[1]
SOURCES = (
    *("programs/compiler.py", "programs/program.py"),
    *("model/kv_cache.py", "model/packed.py", "model/static_rows.py", "model/tree_attention.py"),
    *("model/verify_program.py", "draft/*.py", "engine/*_program.py"),
    *("engine/acceptance.py", "engine/logits_processors.py", "engine/sampling.py"),
)


def skeleton_of(program: AnyProgram) -> AnyProgram:
    """A copy whose weights have shape and dtype, but no content: memory that nobody touches costs nothing."""
    memo = {id(tensor): _empty(tensor) for tensor in _tensors(program)}
    return copy.deepcopy(program, memo)


def program_key(program: Program) -> str:
    """A name for everything that decides what the compiler makes of it."""
    shapes = {name: (tuple(t.shape), str(t.dtype)) for name, t in constants_of(program).items()}
    return key_of(
        program=repr(program),
        shapes=shapes,
        facts=program.facts(),
        example=repr([_shape(argument) for argument in program.example()]),
        machine=machine_facts(torch.device("cpu")),
        source=_source_hash(),
    )


def _tensors(program: Program) -> list[Tensor]:
    return [*program.parameters(), *program.buffers()]


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(empty, requires_grad=False)
    return empty


def _shape(argument: object) -> object:
    if isinstance(argument, Tensor):
        return (tuple(argument.shape), str(argument.dtype))
    return [_shape(part) for part in argument]  # type: ignore[attr-defined]


@cache
def _source_hash() -> str:
    """Of the code that programs are made of: a compiled one is as old as what it was compiled from."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
