"""What a compiled part of a step is made from: a module of tensors in and tensors out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

Argument = Tensor | Sequence[Tensor]


# Products of fewer rows are computed another way, which rounds differently (MKL's of float32).
MIN_NODES, MAX_NODES = 4, 1024
MAX_WIDTH, MAX_SLOTS = 1 << 24, 4096


class Program(nn.Module, ABC):
    """A module whose `forward` takes tensors, or lists of them, and decides nothing on the host.

    Weights are its parameters and buffers; what it changes in place are arguments, caches for instance.
    `can_repeat`: whether it may run again on arguments that an interrupted run has changed.
    """

    can_repeat = True

    def facts(self) -> object:
        """What besides weights, arguments and code decides what it computes; its `repr` must tell."""
        return None

    @abstractmethod
    def example(self) -> tuple[Argument, ...]:
        """Arguments of allowed sizes to trace with."""

    def sizes(self) -> tuple[Any, ...]:
        """For each argument its sizes that vary, {dimension: torch.export.Dim} or None; a list for a list."""
        return tuple(
            None if isinstance(argument, Tensor) else [None] * len(argument) for argument in self.example()
        )


def flatten(arguments: Sequence[Argument]) -> list[Tensor]:
    """Lists taken apart, in order: how a compiled program is called."""
    flat: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            flat.append(argument)
        else:
            flat += argument
    return flat


def constants_of(program: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its full name; what has several names is under each of them."""
    named = (program.named_parameters, program.named_buffers)
    return {name: tensor.detach() for each in named for name, tensor in each(remove_duplicate=False)}


def node_sizes() -> Any:
    """Sizes of a tree, root and padding included."""
    return Dim("nodes", min=MIN_NODES, max=MAX_NODES)


def width_sizes() -> Any:
    """Columns that are attended over."""
    return Dim("width", min=MIN_NODES, max=MAX_WIDTH)


def cache_sizes() -> tuple[Any, Any]:
    """Numbers of slots, and of columns in each."""
    return Dim("slots", min=1, max=MAX_SLOTS), Dim("capacity", min=MIN_NODES + 1, max=MAX_WIDTH + 1)
