"""A program as it is called: compiled once that is there, until then as it is."""

import copy
import logging
from typing import Any

from torch import Tensor

from medusa_core.programs.compiled import CompiledProgram
from medusa_core.programs.program import Argument, Program

logger = logging.getLogger(__name__)


class Switch:
    """Calls one of the two; compiled programs are for one row, more are run as they are."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.compiled: CompiledProgram | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Switch":
        return Switch(copy.deepcopy(self.program, memo))

    def __call__(self, *arguments: Argument) -> tuple[Tensor, ...]:
        if self.compiled is not None and len(arguments[0]) == 1:
            try:
                return self.compiled(*arguments)
            except RuntimeError as error:
                logger.warning("%s runs uncompiled from now on: %s", type(self.program).__name__, error)
                self.compiled = None
                if not self.program.can_repeat:
                    raise  # the request that it ran for fails alone
        return self.as_it_is(*arguments)

    def as_it_is(self, *arguments: Argument) -> tuple[Tensor, ...]:
        """Operation by operation."""
        result: Tensor | tuple[Tensor, ...] = self.program(*arguments)
        return (result,) if isinstance(result, Tensor) else result
