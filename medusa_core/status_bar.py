"""A progress bar with a line of status, for a terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StatusBar(Progress):
    """One task of so many steps. On a console that is no terminal it is disabled and prints nothing."""

    def __init__(self, console: Console, label: str) -> None:
        super().__init__(
            *(TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[status]}"),
            console=console if console.is_terminal else Console(quiet=True),
            disable=not console.is_terminal,
        )
        self._task = self.add_task(label, total=None, status="")

    def show(self, **fields: object) -> None:
        """Change `total`, `completed` or `status`, or `advance` by so many steps."""
        self.update(self._task, **fields)  # type: ignore[arg-type]
