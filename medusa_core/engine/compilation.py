"""Which of an engine's programs run compiled: found on disk, compiled now, or by another process."""

import json
import logging
import os
import subprocess  # to run this package  # nosec B404
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace

import torch

from medusa_core.config import EngineConfig
from medusa_core.programs.library import ProgramLibrary
from medusa_core.programs.switch import Switch

logger = logging.getLogger(__name__)

ENTRY = "medusa_core.engine.precompile"


class Compilation:
    """Finds compiled programs for switches, and compiles what is missing as the config says.

    `compile` "on": at once, before anything runs. "auto": only what is on disk already; the rest is left to
    `start_behind`, and taken by `take_over`. "off": nothing.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._library = ProgramLibrary()
        self._switches: list[Switch] = []
        self._missing: list[Switch] = []
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether programs are being compiled by another process."""
        return self._child is not None

    def __str__(self) -> str:
        names = sorted({type(s.program).__name__ for s in self._switches if s.compiled is not None})
        return f"compiled {', '.join(names)}" if names else "as it is"

    @property
    def num_compiled(self) -> int:
        return sum(switch.compiled is not None for switch in self._switches)

    def compile(self, switches: Iterable[Switch]) -> None:
        """Compile now what is missing on disk; what cannot be compiled is logged and runs as it is."""
        for switch in switches:
            if self._library.has(switch.program):
                continue
            name = type(switch.program).__name__
            try:
                self._library.add(switch.program)
                logger.info("%s is compiled", name)
            except RuntimeError as error:
                logger.warning("the step runs uncompiled: %s", error)
                return

    def add(self, switch: Switch) -> None:
        """Run it compiled as soon as it is there."""
        if self._mode == "off":
            return
        self._switches.append(switch)
        switch.compiled = self._library.find(switch.program)
        if switch.compiled is None:
            self._missing.append(switch)

    def start_behind(self, model: str, heads: str | None, config: EngineConfig) -> None:
        """Compile what is missing in a process of low priority, which loads the same model once more."""
        if self._mode != "auto" or not self._missing or not self._library.can_compile():
            return
        wanted = asdict(replace(config, compile="on", measure=False, slots=1))
        command = [sys.executable, "-m", ENTRY, json.dumps([model, heads, wanted])]
        threads = str(torch.get_num_threads())  # which compiled programs depend on
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        logger.info("the step is being compiled in the background, once for this machine")
        # Our own module, with arguments of our own; in our session, as priorities count within one only.
        self._child = subprocess.Popen(  # noqa: S603  # nosec B603
            command, env=environment, stdin=subprocess.DEVNULL
        )

    def take_over(self) -> bool:
        """Have the switches run what the other process has compiled; whether there was any."""
        if self._child is None or self._child.poll() is None:
            return False
        if self._child.returncode != 0:
            logger.warning("compiling the step failed (exit status %d)", self._child.returncode)
        self._child = None
        before = self.num_compiled
        for switch in self._missing:
            switch.compiled = self._library.find(switch.program)
        self._missing = [switch for switch in self._missing if switch.compiled is None]
        return self.num_compiled > before
