"""A progress bar on a terminal, log lines elsewhere."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class ProgressReport(TrainerCallback):
    """Shows steps, loss and time left; logs the loss every `logging_steps` where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._started = (0, 0.0)  # step and time

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._started = (state.global_step, time.monotonic())
        if not (self._console.is_terminal and state.is_world_process_zero):
            return
        self._progress = Progress(
            TextColumn("training heads"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
        )
        self._progress.add_task("train", total=state.max_steps, completed=state.global_step, status="")
        self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        step, since = self._started
        rate = (state.global_step - step) / max(time.monotonic() - since, 1e-9)
        status = f"loss {logs['loss']:.4f} · {rate:.2f} steps/s"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], status=status)
        else:
            logger.info("step %d of %d · %s", state.global_step, state.max_steps, status)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the terminal; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
