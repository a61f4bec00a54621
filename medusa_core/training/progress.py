"""A progress bar on a terminal, log lines elsewhere."""

import logging
import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from medusa_core.status_bar import StatusBar

logger = logging.getLogger(__name__)


class ProgressReport(TrainerCallback):
    """Shows steps, loss and time left; logs the loss every `logging_steps` where there is no terminal."""

    def __init__(self, bar: StatusBar) -> None:
        self._bar = bar
        self._started = (0, 0.0)  # step and time

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._started = (state.global_step, time.monotonic())
        self._bar.show(total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar.show(completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" not in logs or not state.is_world_process_zero:
            return
        step, since = self._started
        rate = (state.global_step - step) / max(time.monotonic() - since, 1e-9)
        status = f"loss {logs['loss']:.4f} · {rate:.2f} steps/s"
        self._bar.show(status=status)
        if self._bar.disable:
            logger.info("step %d of %d · %s", state.global_step, state.max_steps, status)
