"""Phase times of a step: wall clock on a CPU; events on CUDA, so that nothing waits for the device."""

import time
from typing import Protocol

import torch


class PhaseTimer(Protocol):
    """`mark()` at each phase boundary; `seconds()` gives the spans between marks."""

    def mark(self) -> None: ...

    def seconds(self) -> list[float]: ...


class WallTimer:
    """For devices where an operation has run when its call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


class CudaTimer:
    """Events in the device's stream; reading them waits for the last one only."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)  # not the current device's: work may run on another
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append(event)

    def seconds(self) -> list[float]:
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1000.0 for a, b in zip(self._marks, self._marks[1:], strict=False)]


def phase_timer(device: torch.device) -> PhaseTimer:
    return CudaTimer(device) if device.type == "cuda" else WallTimer()
