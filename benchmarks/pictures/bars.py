"""Horizontal bar charts."""

from collections.abc import Sequence
from dataclasses import dataclass

from pictures.svg import CHART_STYLE, document, line, rect, text

WIDTH = 820
LABELS = 250  # pixels left of the bars
RIGHT = 190  # pixels right of them, for values
BAR, ROW, GROUP = 20, 28, 34  # heights: a bar, its row, a group's heading


@dataclass(frozen=True, slots=True)
class Bar:
    """`css`: one of the fills of the charts' style; `note` stands behind the value."""

    label: str
    value: float
    shown: str
    note: str = ""
    css: str = "fast"


@dataclass(frozen=True, slots=True)
class Group:
    heading: str
    bars: Sequence[Bar]


def draw(title: str, groups: Sequence[Group], footnotes: Sequence[str], *, baseline: float | None) -> str:
    """All groups on one scale from zero; a dashed line marks `baseline`."""
    scale = (WIDTH - LABELS - RIGHT) / max(bar.value for group in groups for bar in group.bars)
    body = [text(20, 32, title, "title")]
    y = top = 48.0
    for group in groups:
        if group.heading:
            body.append(text(20, y + 20, group.heading, "muted"))
            y += GROUP
        for bar in group.bars:
            body += _bar(bar, y, scale, baseline or 0.0)
            y += ROW
        y += 6
    if baseline is not None:
        x = LABELS + baseline * scale
        body.append(line(x, top + 6, x, y, "base"))
    for note in footnotes:
        y += 18
        body.append(text(20, y, note, "muted"))
    height = int(y) + 20
    card = rect(0.5, 0.5, WIDTH - 1, height - 1, "card", 6)
    return document(WIDTH, height, CHART_STYLE, title, [card, *body])


def _bar(bar: Bar, y: float, scale: float, baseline: float) -> list[str]:
    end = LABELS + max(bar.value, baseline) * scale  # no value is written over the baseline
    parts = [
        text(LABELS - 12, y + 15, bar.label, anchor="end"),
        rect(LABELS, y, bar.value * scale, BAR, bar.css, 2),
        text(end + 8, y + 15, bar.shown, "value"),
    ]
    if bar.note:
        parts.append(text(end + 8 + 9 * len(bar.shown), y + 15, bar.note, "muted"))
    return parts
