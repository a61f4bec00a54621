"""Elements and colors that the pictures share."""

from html import escape

SANS = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# Charts follow the reader's color scheme; what does not understand the media query gets the light one.
CHART_STYLE = f"""
text {{ font-family: {SANS}; font-size: 13px; fill: #1f2328; }}
.title {{ font-size: 16px; font-weight: 600; }}
.muted {{ fill: #59636e; font-size: 12px; }}
.value {{ font-weight: 600; }}
.grid {{ stroke: #d1d9e0; stroke-width: 1; }}
.base {{ stroke: #59636e; stroke-width: 1; stroke-dasharray: 3 3; }}
.card {{ fill: #ffffff; stroke: #d1d9e0; }}
.fast {{ fill: #0969da; }}
.plain {{ fill: #8c959f; }}
.other {{ fill: #c4cbd2; }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #f0f6fc; }}
  .muted {{ fill: #9198a1; }}
  .grid {{ stroke: #2f363e; }}
  .base {{ stroke: #9198a1; }}
  .card {{ fill: #0d1117; stroke: #2f363e; }}
  .fast {{ fill: #4493f8; }}
  .plain {{ fill: #6e7681; }}
  .other {{ fill: #424a53; }}
}}
"""


def document(width: int, height: int, style: str, title: str, body: list[str]) -> str:
    """A whole SVG file; `title` is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{style.strip()}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    css = f' class="{css}"' if css else ""
    anchor = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}"{css}{anchor}>{escape(content, quote=False)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str, radius: float = 0) -> str:
    return f'<rect class="{css}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'
