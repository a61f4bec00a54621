"""A board from rows of lines of panels: places, numbers, variables, links."""

from collections.abc import Sequence
from dataclasses import dataclass

from boards.panels import DATASOURCE, Json

COLUMNS = 24
SCHEMA_VERSION = 41  # of Grafana 12; newer ones migrate it when they load it
TAG = "medusa"


@dataclass(frozen=True)
class Line:
    """Panels side by side: each with its width in columns, 24 together."""

    height: int
    panels: Sequence[tuple[int, Json]]

    def __post_init__(self) -> None:
        width = sum(width for width, _ in self.panels)
        if width != COLUMNS:
            titles = [panel["title"] for _, panel in self.panels]
            raise ValueError(f"the line {titles} is {width} columns wide instead of {COLUMNS}")


@dataclass(frozen=True)
class Row:
    """Lines under a heading that folds them; without a title, just lines."""

    title: str
    lines: Sequence[Line]


def dashboard(uid: str, title: str, description: str, rows: Sequence[Row]) -> Json:
    """The whole board as Grafana reads it from a file."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "10s", "30s", "1m", "5m", "15m"]},
        "timezone": "browser",
        "links": [_links()],
        "annotations": {"list": [_firing_alerts()]},
        "templating": {"list": _variables()},
        "panels": _placed(rows),
    }


def _placed(rows: Sequence[Row]) -> list[Json]:
    panels: list[Json] = []
    y = 0
    for row in rows:
        if row.title:
            place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
            panels.append(
                {"type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": place}
            )
            y += 1
        for line in row.lines:
            x = 0
            for width, panel in line.panels:
                panels.append(panel | {"gridPos": {"h": line.height, "w": width, "x": x, "y": y}})
                x += width
            y += line.height
    return [{"id": number} | panel for number, panel in enumerate(panels, start=1)]


def _links() -> Json:
    """All boards with our tag; time and selection go along."""
    return {
        "title": "Medusa",
        "type": "dashboards",
        "tags": [TAG],
        "asDropdown": False,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "tooltip": "The other boards, with the same time and selection",
        "url": "",
    }


def _firing_alerts() -> Json:
    return {
        "name": "Alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing",alertname=~"Medusa.+",model=~"$model|"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}}",
        "tagKeys": "severity",
        "step": "15s",
    }


def _variables() -> list[Json]:
    datasource = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "multi": False,
        "includeAll": False,
        "options": [],
        "current": {"selected": True, "text": "Prometheus", "value": "medusa-prometheus"},
    }
    # medusa_ready is there from the first scrape of a server on, whatever its state.
    return [
        datasource,
        _label_variable("model", "Model", "label_values(medusa_ready, model)"),
        _label_variable("instance", "Instance", 'label_values(medusa_ready{model=~"$model"}, instance)'),
    ]


def _label_variable(name: str, label: str, query: str) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,  # when the time range changes
        "regex": "",
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "options": [],
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }
