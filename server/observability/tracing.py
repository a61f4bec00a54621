"""The interface of tracing, and its implementation if a collector is named."""

from typing import Protocol

from medusa_core.errors import ConfigError
from server.observability.request_context import RequestContext
from server.settings import Settings


class Tracing(Protocol):
    """Turns finished requests into spans, and sends them from a thread of its own."""

    def export(self, context: RequestContext) -> str | None:
        """The id of the trace; None for requests that are not traced. Never waits."""

    def stop(self) -> None:
        """Send what is left, within a few seconds."""


def build_tracing(settings: Settings, model: str) -> Tracing | None:
    """None without `MEDUSA_OTLP_ENDPOINT`. Raises `ConfigError` if the libraries are not there."""
    if settings.otlp_endpoint is None:
        return None
    try:
        # Only here: they are an extra, and cost nothing where there is no collector.
        from server.observability.spans import SpanTracing
    except ImportError as error:
        raise ConfigError(
            f"MEDUSA_OTLP_ENDPOINT is set, but OpenTelemetry is not installed ({error.name}): "
            "pip install 'medusa-serve[otel]'"
        ) from error
    return SpanTracing(settings.otlp_endpoint, model)
