"""`medusa generate`: answers one prompt."""

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa_core.cli.engine_options import ModelOptions, SamplingOptions
from medusa_core.cli.options import with_options
from medusa_core.config import EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.option_field import option
from medusa_core.sampling_params import SamplingParams, SpeculationParams, check_served

if TYPE_CHECKING:
    from medusa_core.engine.answer import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How the prompt is read and the answer printed."""

    system: str | None = option("System message before it.", default=None)
    raw: bool = option("Continue the plain text, without a chat template.", default=False)
    stop: tuple[str, ...] = option("End before this text; may be repeated.", default=())
    as_json: bool = option("Print one JSON object with text and figures.", flag="--json", default=False)

    def __post_init__(self) -> None:
        if self.raw and self.system is not None:
            raise ConfigError("--system needs the chat template, which --raw leaves out")
        check_served(SamplingParams(stop=self.stop))

    def prompt(self, text: str) -> str | list[dict[str, str]]:
        """The text alone, or a conversation that ends with it."""
        if self.raw:
            return text
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": text}]


@with_options
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message; '-' reads standard input.")],
    options: GenerateOptions,
    model: ModelOptions,
    sampling: SamplingOptions,
    speculation: SpeculationParams,
    config: EngineConfig,
) -> None:
    """Answer one prompt and print the text as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    engine = model.load(config)
    params = sampling.params(engine.default_params())
    params = replace(params, stop=options.stop, speculation=speculation)
    with engine.stream(options.prompt(text), params) as stream:
        for piece in stream:
            if not options.as_json:
                typer.echo(piece, nl=False)
    if options.as_json:
        typer.echo(json.dumps(_report(stream.answer), ensure_ascii=False))
    else:
        typer.echo()
        typer.secho(stream.stats.summary(), dim=True, err=True)


def _report(answer: "Answer") -> dict[str, Any]:
    stats = answer.stats
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.tokens,
        "seed": answer.seed,
        "tokens_per_second": stats.tokens_per_second,
        "tokens_per_step": stats.tokens_per_step,
        "origins": stats.origins,
        "estimated_speedup": stats.estimated_speedup,
    }
