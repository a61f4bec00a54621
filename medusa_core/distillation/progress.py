"""Progress of `medusa distill`: a bar on a terminal, log lines elsewhere."""

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medusa_core.distillation.run import DistillReport

LOG_SECONDS = 30.0
logger = logging.getLogger(__name__)


class DistillProgress:
    """Shows a report as it grows; a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = (
            Progress(
                TextColumn("asking"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.add_task("dialogues", total=None, status="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, report: DistillReport) -> None:
        """Update the bar or the log after a seed row."""
        now = time.monotonic()
        rate = report.tokens / max(now - self._started, 1e-9)
        status = f"{report.answers} answers · {rate:.0f} tokens/s · {report.failed} failed"
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], total=report.total, completed=report.handled, status=status
            )
        elif now - self._logged >= LOG_SECONDS or report.handled == report.total:
            self._logged = now
            logger.info("%d of %d dialogues · %s", report.handled, report.total, status)
