"""What commands print on standard output: plain lines and tables of figures."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table


def say(text: str) -> None:
    """A line as it is: no colors, and no wrapping of paths."""
    Console().print(text, highlight=False, soft_wrap=True)


def figures(title: str, columns: Iterable[str]) -> Table:
    """A table without rows yet, its columns right-justified."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right")
    return table
