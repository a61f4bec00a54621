"""Where compiled programs come from: a folder, where they are looked up by what they are made of."""

import logging
import os
import shutil
import stat
from pathlib import Path

from medusa_core.disk_cache import cache_folder
from medusa_core.programs.compiled import CompiledProgram
from medusa_core.programs.compiler import compile_program, missing_compiler
from medusa_core.programs.program import Program
from medusa_core.programs.skeleton import program_key, skeleton_of

logger = logging.getLogger(__name__)

FOLDER = "programs"


class ProgramLibrary:
    """Compiled programs of this machine, in a folder that nobody else can write to: they are code."""

    def __init__(self, folder: Path | None = None) -> None:
        base = folder or cache_folder()
        self._folder = None if base is None or not _is_ours(base) else base / FOLDER
        self._keys: dict[Program, str] = {}

    def find(self, program: Program) -> CompiledProgram | None:
        """The compiled program, with the weights that the module has now; None if there is none that fits."""
        folder = self._place(program)
        if folder is None or not folder.exists():
            return None
        try:
            return CompiledProgram(folder, program)
        except (RuntimeError, OSError, ValueError) as error:
            logger.warning("a compiled program is discarded: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def can_compile(self) -> bool:
        """Whether there is a compiler, and a folder for what it makes; else the log says what is missing."""
        reason = missing_compiler() if self._folder else "there is no folder to keep it in"
        if reason is not None:
            logger.info("the step is not compiled: %s", reason)
        return reason is None

    def has(self, program: Program) -> bool:
        """Whether it was compiled, by this process or another."""
        folder = self._place(program)
        return folder is not None and folder.exists()

    def add(self, program: Program) -> None:
        """Compile it, unless it is there. Raises `RuntimeError` where that cannot be done, and says why."""
        folder = self._place(program)
        if folder is None:
            raise RuntimeError("there is no folder that can be written: MEDUSA_CACHE_DIR can name one")
        if folder.exists():
            return
        reason = missing_compiler()
        if reason is not None:
            raise RuntimeError(reason)
        try:
            compile_program(skeleton_of(program), folder)
        except Exception as error:  # the compiler's failures are of any type
            raise RuntimeError(f"{type(program).__name__}: {type(error).__name__}: {error}") from error

    def _place(self, program: Program) -> Path | None:
        if self._folder is None:
            return None
        if program not in self._keys:
            self._keys[program] = program_key(program)
        return self._folder / self._keys[program]


def _is_ours(folder: Path) -> bool:
    """Whether only this user, or root, can put programs there."""
    try:
        status = folder.stat()
    except OSError:
        return False
    is_ours = status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_ours:
        logger.warning("no compiled programs are kept in %s: others can write to it", folder)
    return is_ours
