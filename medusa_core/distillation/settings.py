"""Settings of `medusa distill`, validated. Their defaults are defined here only."""

from dataclasses import dataclass, field
from pathlib import Path

from medusa_core.config import SAMPLING_PANEL
from medusa_core.errors import ConfigError
from medusa_core.option_field import check_limits, option
from medusa_core.sampling_params import MAX_SEED, MAX_TEMPERATURE

PAPER_TEMPERATURE = 0.3  # Medusa paper §2.3.2 and the reference's generator, as is the length
PAPER_MAX_TOKENS = 2048
LONGEST = 1e6  # seconds
ENDPOINT_PANEL = "Endpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """One run: seed dialogues from `data` (files or Hub data sets), rows appended to `out`.

    `max_tokens`: limit of one answer; a longer one ends its dialogue. `turns`: user turns to ask, None for
    all. `limit`: seed rows to read. `top_p` None uses the model's own. `concurrency`: dialogues in progress
    at once. `strict`: an unusable seed row is an error.
    """

    data: tuple[str | Path, ...] = option(
        "Seed dialogues in any format of `medusa train`: JSONL, JSON, Parquet, a Hub data set. Their "
        "assistant's turns are replaced. Repeatable."
    )
    out: Path = option("JSONL file for `medusa train`. The same command resumes it.", path="file")
    limit: int | None = option("Use the first so many rows.", default=None, shown="all", least=1)
    turns: int | None = option("Ask at most so many turns of a dialogue.", default=None, shown="all", least=1)
    max_tokens: int = option(
        "Most tokens of an answer; one cut off here ends its dialogue.", default=PAPER_MAX_TOKENS, least=1
    )
    temperature: float = option(
        "0 is greedy; the Medusa paper's is 0.3.", default=PAPER_TEMPERATURE, least=0, most=MAX_TEMPERATURE
    )
    top_p: float | None = option(
        "Nucleus sampling; 1 is off.", SAMPLING_PANEL, default=None, shown="the model's", above=0, most=1
    )
    seed: int = option("Repeats sampled answers.", default=0, least=0)
    strict: bool = option("A row that cannot be used ends the run.", default=False)
    concurrency: int = 1

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data needs at least one source")
        check_limits(self)
        if self.seed > MAX_SEED:
            raise ConfigError(f"seed must fit 64 unsigned bits, not {self.seed}")
        if self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, not {self.concurrency}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """An OpenAI-compatible server. `url` is its base, usually ending in /v1.

    A request is tried `attempts` times; before the n-th retry it waits up to `retry_delay` * 2^n seconds, or
    what the server's Retry-After says. `timeout`: seconds without a byte of an answer.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    attempts: int = option("Tries of a request.", ENDPOINT_PANEL, default=6, least=1)
    retry_delay: float = option(
        "Seconds before the first retry; they double with each.",
        ENDPOINT_PANEL,
        default=1.0,
        above=0,
        most=LONGEST,
    )
    timeout: float = option(
        "Seconds without a byte of an answer.", ENDPOINT_PANEL, default=600.0, above=0, most=LONGEST
    )

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint must be an http:// or https:// address, not {self.url!r}")
        if not self.model:
            raise ConfigError("endpoint model must have a name: the one the endpoint serves it by")
        check_limits(self)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key must be printable ASCII, as HTTP headers are")
