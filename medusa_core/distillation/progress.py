"""Progress of `medusa distill`: a bar on a terminal, log lines elsewhere."""

import logging
import time

from medusa_core.distillation.run import DistillReport
from medusa_core.status_bar import StatusBar

LOG_SECONDS = 30.0
logger = logging.getLogger(__name__)


class DistillProgress:
    """Shows a report as it grows."""

    def __init__(self, bar: StatusBar) -> None:
        self._bar = bar
        self._started = self._logged = time.monotonic()

    def show(self, report: DistillReport) -> None:
        """Update the bar or the log after a seed row."""
        now = time.monotonic()
        rate = report.tokens / max(now - self._started, 1e-9)
        status = f"{report.answers} answers · {rate:.0f} tokens/s · {report.failed} failed"
        self._bar.show(total=report.total, completed=report.handled, status=status)
        if self._bar.disable and (now - self._logged >= LOG_SECONDS or report.handled == report.total):
            self._logged = now
            logger.info("%d of %d dialogues · %s", report.handled, report.total, status)
