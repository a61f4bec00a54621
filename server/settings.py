"""Settings from the environment (`MEDUSA_…`) or flags of `medusa serve`, checked before anything starts."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.sampling_params import DraftSourceName, SpeculationMode

PREFIX = "MEDUSA_"
SHOWN_DEFAULT = "shown_default"  # key of what help says instead of a field's default
EMBEDDED_NAME = "medusa-demo"

Port = Annotated[int, Field(ge=0, le=65535)]
MAX_SECONDS = 1e6
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Everything that can be set: `MEDUSA_<FIELD>` in the environment, `--<field>` as a flag."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    model: str = Field(str(EMBEDDED_MODEL), json_schema_extra={SHOWN_DEFAULT: "the embedded demo model"})
    """Model directory or hub id."""
    heads: str | None = None
    """Medusa heads: a directory or file, or 'none'. Unset: those found beside the model."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on."""
    port: Port = 8000
    """Port to listen on; 0 picks a free one."""
    metrics_port: Port | None = None
    """Operations port: /metrics, /ready and /health apart from the API, without keys."""
    dtype: str = "auto"
    """Weights and arithmetic: auto, float32, bfloat16 or float16."""
    device: str = Field("auto", min_length=1)
    """auto, cpu, cuda or cuda:N; several, comma-separated, start a worker each."""
    workers: int | None = Field(None, ge=1, le=64)
    """Worker processes, one a GPU and all behind one queue; default: one for each device."""
    max_length: int | None = None
    """Tokens of prompt and answer together, at most the model's."""
    slots: int = 1
    """Requests in progress at once in a worker; they take turns."""
    queue_limit: int = Field(64, ge=0, le=100_000)
    """Requests that may wait for a slot before 429."""
    request_timeout: Seconds = 600.0
    """Seconds a request may wait and run."""
    drain_timeout: Seconds = 30.0
    """Seconds that requests have to finish after SIGTERM."""
    stall_timeout: Seconds = 120.0
    """Seconds without a step before a busy worker counts as hung."""
    load_timeout: Seconds = 1800.0
    """Seconds without progress before a loading worker counts as hung."""
    keepalive: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = 10.0
    """Seconds between keep-alive comments in a stream; 0 sends none."""
    send_timeout: Seconds = 60.0
    """Seconds a client may leave a chunk unread before it is cut off."""
    served_name: str | None = Field(None, min_length=1)
    """Model name in the API; default from the model."""
    chat_template: str | None = None
    """Chat template: a file, or the name of an included one."""
    tree_nodes: int | None = None
    """Draft tree nodes, root included; unset: chosen by measuring."""
    static_tree: str | None = None
    """What tree 'static' is: a published name or a JSON file; unset: grown for the heads."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the step on a CPU: auto (in the background, once for a machine), on (before serving) or off."""
    reproducible: bool = True
    """The same text with any tree, and without, in 16-bit types too."""
    measure: bool = True
    """Time steps at start to choose the tree and estimate the speedup."""
    memory_check: bool = True
    """Refuse to load a model that does not fit the device's free memory."""
    cache_dir: Path | None = None
    """Folder that keeps measured step times and the like between starts; default: medusa in ~/.cache."""
    speculation: SpeculationMode = SpeculationMode.EXACT
    """Mode of requests that name none. 'typical' is not lossless."""
    speculation_source: DraftSourceName = DraftSourceName.HEADS
    """Draft source of requests that name none: the heads, n-grams of the text, or both."""
    restart_limit: int = Field(5, ge=0, le=1000)
    """Worker restarts in a row without a completed step."""
    api_keys: SecretStr | None = None
    """Keys, comma-separated, of which a request needs one. Better in a file."""
    api_keys_file: Path | None = None
    """File of such keys, one a line; # begins a comment."""
    cors_origins: str | None = None
    """Origins, comma-separated, whose pages may call the API; '*' for any. Unset: none."""
    max_header_bytes: int = Field(16_384, ge=1024, le=2**20)
    """Largest request line and headers together."""
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    """Largest request body."""
    body_timeout: Seconds = 60.0
    """Seconds a client has to send its headers, and again for its body."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    log_format: Literal["text", "json"] = "text"
    """Log lines as text or as JSON objects."""
    log_prompts: bool = False
    """Log messages and answers, and add them to traces."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector (http://host:4318) for traces; needs medusa-serve[otel]."""

    @field_validator("device")
    @classmethod
    def _check_devices(cls, device: str) -> str:
        if not all(split_list(device)):
            raise ValueError("a device name is missing beside a comma")
        return device

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str | None) -> str | None:
        for origin in split_list(origins or "*"):
            if origin != "*" and not _is_origin(origin):
                raise ValueError("an origin is '*' or scheme://host[:port] and nothing behind it")
        return origins

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and _has_sound_port(parts)
        if not is_web or parts.query or parts.fragment:
            raise ValueError("must be a URL such as http://127.0.0.1:4318")
        return endpoint

    @model_validator(mode="after")
    def _check_engine_config(self) -> Self:
        try:
            self.engine_config(self.devices[0])
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        named = split_list(self.device)
        if self.workers not in (None, len(named)) and (len(named) > 1 or ":" in self.device):
            raise ValueError(
                f"{PREFIX}WORKERS is {self.workers}, but {PREFIX}DEVICE names {len(named)} device(s): "
                "leave one of the two out"
            )
        return self

    @property
    def devices(self) -> tuple[str, ...]:
        """One worker is started for each; `workers` spreads one kind of device over several."""
        named = split_list(self.device)
        if self.workers is None or self.workers == len(named):
            return named
        return tuple(named[0] if named[0] == "cpu" else f"{named[0]}:{i}" for i in range(self.workers))

    @property
    def model_name(self) -> str:
        """The name clients ask for."""
        if self.served_name is not None:
            return self.served_name
        path = Path(self.model)
        if path == EMBEDDED_MODEL:
            return EMBEDDED_NAME
        return path.resolve().name if path.is_dir() else self.model

    def engine_config(self, device: str) -> EngineConfig:
        """What the engine on `device` is built with. Raises `ConfigError`."""
        names = {field.name for field in fields(EngineConfig)} & Settings.model_fields.keys()
        return EngineConfig(**{name: getattr(self, name) for name in names} | {"device": device})


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `flags` (None values are unset), then the environment, then defaults.

    Raises `ConfigError` whose message names every bad setting in one line.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = "; ".join(_explain(item["loc"], item["msg"], given) for item in error.errors())
        raise ConfigError(problems) from None


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of `MEDUSA_…` variables that mean nothing here: most likely typing mistakes."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in environment if name.startswith(PREFIX) and name.upper() not in known)


def split_list(text: str) -> tuple[str, ...]:
    """The parts between commas."""
    return tuple(part.strip() for part in text.split(","))


def _is_origin(text: str) -> bool:
    parts = urlsplit(text)
    # Browsers send it in lower case, without a path; Starlette compares text.
    is_bare = text == f"{parts.scheme}://{parts.netloc.lower()}" and "@" not in text
    return bool(parts.hostname) and is_bare and _has_sound_port(parts)


def _has_sound_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:  # no number, or none of a port
        return False


def _explain(location: tuple[int | str, ...], message: str, flags: Mapping[str, Any]) -> str:
    text = message.removeprefix("Value error, ")
    if location:
        name = str(location[0])
        text = f"{text[:1].lower()}{text[1:]}{_shown(name, flags)}"
    else:
        # What the engine's own settings refuse begins with their name and says the value.
        name, _, rest = text.partition(" ")
        if name not in Settings.model_fields:
            return text
        text = rest
    return f"{PREFIX}{name.upper()} (--{name.replace('_', '-')}): {text}"


def _shown(name: str, flags: Mapping[str, Any]) -> str:
    field = Settings.model_fields.get(name)
    if field is not None and SecretStr in get_args(field.annotation):
        return ""
    given = flags.get(name, os.environ.get(PREFIX + name.upper()))
    return f", got {str(given)[:100]!r}"
