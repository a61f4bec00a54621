"""A recorded dialogue as two terminals side by side, played in a loop by CSS alone.

A renderer without animations, and a reader who prefers reduced motion, shows the end of it.
"""

import textwrap
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pictures.svg import MONO, SANS, document, rect, text

COLUMNS = 46
PANE, GAP, MARGIN, LINE = 402, 16, 14, 20  # pixels; a column takes 7.8 of them at 13 px
TOP = 58  # of the first line of text in a pane
SECONDS, HOLD = 9.0, 3.0  # of the slower side in the picture, and of its end
TITLES = {"off": "without speculation", "exact": "with speculation"}

STYLE = f"""
text {{ font-family: {MONO}; font-size: 13px; fill: #e6edf3; }}
.frame {{ fill: #0d1117; stroke: #3d444d; }}
.bar {{ fill: #161b22; }}
.title {{ fill: #9198a1; font-size: 12px; }}
.ask {{ fill: #d2a8ff; }}
.even {{ fill: #e6edf3; }}
.odd {{ fill: #56d364; }}
.track {{ fill: #21262d; }}
.done {{ fill: #56d364; }}
.note {{ font-family: {SANS}; fill: #59636e; font-size: 12px; }}
@media (prefers-color-scheme: dark) {{ .note {{ fill: #9198a1; }} }}
"""


@dataclass
class Film:
    """Elements and the keyframes that make them appear; `scale` turns recorded seconds into shown ones."""

    total: float
    scale: float
    keyframes: list[str] = field(default_factory=list)

    def appear(self, seconds: float) -> str:
        """A class of what is invisible up to `seconds` of the recording."""
        name = f"t{len(self.keyframes)}"
        percent = 100 * seconds * self.scale / self.total
        self.keyframes.append(
            f"@keyframes {name}{{0%{{opacity:0}}{percent:.2f}%{{opacity:1}}}}"
            f".{name}{{animation:{name} {self.total:g}s step-end infinite}}"
        )
        return name

    def grow(self, seconds: float) -> str:
        """A class of a bar that is full after `seconds` of the recording."""
        name = f"t{len(self.keyframes)}"
        percent = 100 * seconds * self.scale / self.total
        self.keyframes.append(
            f"@keyframes {name}{{0%{{transform:scaleX(0)}}{percent:.2f}%,100%{{transform:scaleX(1)}}}}"
            f".{name}{{animation:{name} {self.total:g}s linear infinite;transform-box:fill-box}}"
        )
        return name

    @property
    def style(self) -> str:
        moving = "\n".join(self.keyframes)
        return f"{STYLE}@media (prefers-reduced-motion: no-preference) {{\n{moving}\n}}"


def draw(recording: dict[str, Any]) -> str:
    """The picture of what `record_demo.py` stored."""
    sides = recording["sides"]
    slowest = max(sum(turn["seconds"] for turn in turns) for turns in sides.values())
    slowdown = max(1, round(SECONDS / slowest))
    film = Film(total=slowest * slowdown + HOLD, scale=slowdown)
    lines = sum(2 + len(_wrap(turn["text"])) for turn in sides["off"])
    height = TOP + lines * LINE + 24
    body: list[str] = []
    for number, (side, turns) in enumerate(sides.items()):
        body.append(f'<g xml:space="preserve" transform="translate({number * (PANE + GAP)} 0)">')
        body += _pane(film, TITLES[side], turns, height)
        body.append("</g>")
    body.append(text(2, height + 20, _caption(recording, slowdown), "note"))
    title = "One dialogue decoded without and with speculation: the same text, sooner"
    return document(2 * PANE + GAP, height + 30, film.style, title, body)


def _pane(film: Film, title: str, turns: list[dict[str, Any]], height: int) -> list[str]:
    parts = [
        rect(0.5, 0.5, PANE - 1, height - 1, "frame", 8),
        f'<path class="bar" d="M1 30V9a8 8 0 0 1 8-8h{PANE - 18}a8 8 0 0 1 8 8v21z"/>',
        *(f'<circle cx="{16 + 16 * i}" cy="15.5" r="5" fill="{c}"/>' for i, c in enumerate(_LIGHTS)),
        text(PANE / 2, 20, title, "title", "middle"),
    ]
    y, start = TOP, 0.0
    for turn in turns:
        parts.append(text(MARGIN, y, f"> {turn['question']}", f"ask {film.appear(start)}"))
        y += LINE
        for spans in _answer(film, turn, start):
            parts.append(f'<text x="{MARGIN}" y="{y}">{spans}</text>')
            y += LINE
        y += LINE
        start += turn["seconds"]
    y = height - 20
    parts.append(rect(MARGIN, y + 6, PANE - 2 * MARGIN, 4, "track", 2))
    parts.append(rect(MARGIN, y + 6, PANE - 2 * MARGIN, 4, f"done {film.grow(start)}", 2))
    parts.append(text(MARGIN, y - 4, _total(turns, start), film.appear(start)))
    return parts


_LIGHTS = ("#ff5f57", "#febc2e", "#28c840")


def _total(turns: list[dict[str, Any]], seconds: float) -> str:
    tokens, steps = (sum(turn[name] for turn in turns) for name in ("decode_tokens", "decode_steps"))
    return f"{seconds:.2f} s   {steps} steps   {tokens / steps:.1f} tokens a step"


def _answer(film: Film, turn: dict[str, Any], start: float) -> list[str]:
    """The lines of an answer as spans, one a piece; pieces alternate in color."""
    lines = _wrap(turn["text"])
    spans: list[list[str]] = [[] for _ in lines]
    ends = [sum(len(line) for line in lines[: i + 1]) for i in range(len(lines))]
    position = 0
    for number, (seconds, piece) in enumerate(turn["pieces"]):
        css = f"{'odd' if number % 2 else 'even'} {film.appear(start + seconds)}"
        for i, end in enumerate(ends):
            part = turn["text"][max(position, end - len(lines[i])) : min(position + len(piece), end)]
            if part:
                spans[i].append(f'<tspan class="{css}">{escape(part, quote=False)}</tspan>')
        position += len(piece)
    return ["".join(line) for line in spans]


def _wrap(content: str) -> list[str]:
    """Lines that together are the text: the space at a break stays at the end of its line."""
    lines = textwrap.wrap(content, COLUMNS, break_long_words=True, drop_whitespace=False)
    while any(line.startswith(" ") for line in lines[1:]):
        for i in range(1, len(lines)):
            if lines[i].startswith(" "):
                lines[i - 1], lines[i] = lines[i - 1] + " ", lines[i][1:]
    return lines


def _caption(recording: dict[str, Any], slowdown: int) -> str:
    model, machine = recording["model"], recording["machine"]
    size = model["parameters"]
    shown = f"{size / 1e9:.1f} B" if size > 1e9 else f"{size / 1e6:.0f} M"
    pace = "real time" if slowdown == 1 else f"slowed down {slowdown} times"
    return (
        f"Demo model ({shown} parameters, {model['dtype']}), greedy, {machine['threads']} cores of an "
        f"{machine['machine']}, {pace}. Each change of color is a decode step."
    )
