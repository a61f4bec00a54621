"""Panels as Grafana's JSON, so that boards say only what differs between two of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
# What every query of ours selects by. Metrics of the process carry the label `model` too.
SELECTED = 'model=~"$model",instance=~"$instance"'
NO_TRAFFIC = "No traffic"
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
Steps = Sequence[tuple[float | None, str]]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One expression. `instant` asks for now only: an hour-old last value would be shown as if it held."""

    expr: str
    legend: str = "__auto"
    instant: bool = False
    heatmap: bool = False


@dataclass(frozen=True, kw_only=True)
class Look:
    """How values are written and colored."""

    unit: str
    decimals: int | None = None
    low: float | None = 0
    high: float | None = None
    steps: Steps = ((None, GREEN),)
    empty: str = NO_TRAFFIC


def rate(metric: str, labels: str = "", by: str = "", window: str = "$__rate_interval") -> str:
    """Sum of the rates of the selected series of a counter."""
    selector = f"{SELECTED},{labels}" if labels else SELECTED
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{{{selector}}}[{window}]))"


def ratio(above: str, below: str) -> str:
    """A quotient that has no value, instead of NaN, while nothing is counted below."""
    return f"{above} / ({below} > 0)"


def share(parts: str, whole: str) -> str:
    """Each of several series over one whole, without a value while that is 0."""
    return f"{parts} / on () group_left () ({whole} > 0)"


def quantile(rank: float, histogram: str, window: str = "$__rate_interval") -> str:
    """A quantile of a histogram's recent observations; `>= 0` drops the NaN of a time without any."""
    return f"histogram_quantile({rank}, {rate(f'{histogram}_bucket', by='le', window=window)}) >= 0"


def quantiles(histogram: str) -> list[Query]:
    """The three that every latency is shown with."""
    return [Query(expr=quantile(rank, histogram), legend=f"p{rank * 100:.0f}") for rank in (0.5, 0.9, 0.99)]


def stat(title: str, description: str, queries: Sequence[Query], look: Look, **changes: Any) -> Json:
    """A number. `changes` are options of Grafana's stat panel."""
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }
    return _panel("stat", title, description, queries, look) | {"options": options | changes}


def bars(title: str, description: str, queries: Sequence[Query], look: Look) -> Json:
    """A horizontal bar for each series."""
    options = {
        "displayMode": "gradient",
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": False},
        "maxVizHeight": 300,
        "minVizHeight": 16,
        "minVizWidth": 8,
        "namePlacement": "auto",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
        "sizing": "auto",
        "valueMode": "color",
    }
    return _panel("bargauge", title, description, queries, look) | {"options": options}


def series(
    title: str,
    description: str,
    queries: Sequence[Query],
    look: Look,
    *,
    stack: str = "none",
    limit: bool = False,
) -> Json:
    """Lines over time, stacked if `stack` is "normal" or "percent"; with `limit` thresholds are drawn."""
    panel = _panel("timeseries", title, description, queries, look)
    panel["fieldConfig"]["defaults"]["color"] = {"mode": "palette-classic"}
    panel["fieldConfig"]["defaults"]["custom"] = {
        "drawStyle": "line",
        "fillOpacity": 10 if stack == "none" else 40,
        "gradientMode": "none",
        "lineInterpolation": "linear",
        "lineWidth": 2 if stack == "none" else 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": stack},
        "thresholdsStyle": {"mode": "dashed+area" if limit else "off"},
    }
    options = {
        "legend": {
            "calcs": ["lastNotNull", "mean", "max"],
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel | {"options": options}


def heatmap(title: str, description: str, histogram: str, unit: str) -> Json:
    """Observations of a histogram over time, by bucket."""
    expr = f"sum by (le) (increase({histogram}_bucket{{{SELECTED}}}[$__rate_interval]))"
    query = Query(expr=expr, legend="{{le}}", heatmap=True)
    panel = _panel("heatmap", title, description, [query], Look(unit="short"))
    panel["fieldConfig"]["defaults"].pop("thresholds")
    options = {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"decimals": 1, "unit": "short"},
        "color": {"exponent": 0.5, "fill": "dark-orange", "mode": "scheme", "reverse": False}
        | {"scale": "exponential", "scheme": "Viridis", "steps": 64},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    # Cells wide enough to be told apart.
    return panel | {"options": options, "maxDataPoints": 120}


def alerts(title: str, description: str) -> Json:
    """Grafana's list of the alerts that Prometheus evaluates."""
    options = {
        "alertInstanceLabelFilter": "",
        "alertName": "Medusa",
        "datasource": "Prometheus",
        "dashboardAlerts": False,
        "groupBy": [],
        "groupMode": "default",
        "maxItems": 30,
        "showInstances": False,
        "sortOrder": 3,
        "stateFilter": {"error": True, "firing": True, "noData": False, "normal": False, "pending": True},
        "viewMode": "list",
    }
    return {"type": "alertlist", "title": title, "description": description, "options": options}


def mapped(panel: Json, texts: dict[str, tuple[str, str]]) -> Json:
    """Values of the panel shown as words: value to text and color."""
    options = {
        value: {"color": color, "index": index, "text": text}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    panel["fieldConfig"]["defaults"]["mappings"].append({"type": "value", "options": options})
    return panel


def colored(panel: Json, colors: dict[str, str]) -> Json:
    """Series of these names always in these colors."""
    panel["fieldConfig"]["overrides"] += [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"fixedColor": color, "mode": "fixed"}}],
        }
        for name, color in colors.items()
    ]
    return panel


def _panel(kind: str, title: str, description: str, queries: Sequence[Query], look: Look) -> Json:
    defaults: Json = {
        "color": {"mode": "thresholds"},
        "mappings": [
            {
                "type": "special",
                "options": {"match": "null+nan", "result": {"index": 9, "text": look.empty}},
            }
        ],
        "noValue": look.empty,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"color": color, "value": value} for value, color in look.steps],
        },
        "unit": look.unit,
    }
    optional = {"decimals": look.decimals, "min": look.low, "max": look.high}
    defaults |= {name: value for name, value in optional.items() if value is not None}
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": [_target(chr(ord("A") + index), query) for index, query in enumerate(queries)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }


def _target(letter: str, query: Query) -> Json:
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "format": "heatmap" if query.heatmap else "time_series",
        "instant": query.instant,
        "legendFormat": query.legend,
        "range": not query.instant,
    }
