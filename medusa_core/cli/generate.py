"""`medusa generate`: one prompt in, one answer out."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa_core.cli import options
from medusa_core.cli.options import SamplingOptions, load_engine
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.errors import ConfigError
from medusa_core.sampling_params import SamplingParams, SpeculationMode

if TYPE_CHECKING:
    from medusa_core.engine.answer import DecodeTotals


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message; '-' reads standard input.")],
    system: Annotated[str | None, typer.Option(help="System message before it.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the plain text, without a chat template.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text and figures.")
    ] = False,
    model: options.ModelOption = str(EMBEDDED_MODEL),
    heads: options.HeadsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    max_length: options.MaxLengthOption = None,
    chat_template: options.ChatTemplateOption = None,
    max_tokens: options.MaxTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    min_p: options.MinPOption = None,
    seed: options.SeedOption = None,
    mode: options.ModeOption = SpeculationMode.EXACT,
    tree: options.TreeOption = "dynamic",
    tree_nodes: options.TreeNodesOption = None,
    static_tree: options.StaticTreeOption = None,
) -> None:
    """Answer one prompt and print the text as it comes."""
    if raw and system is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out")
    config = EngineConfig(
        dtype=dtype,
        device=device,
        max_length=max_length,
        tree_nodes=tree_nodes,
        static_tree=static_tree,
        chat_template=chat_template,
    )
    sampling = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        mode=mode,
        tree=tree,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.engine.answer import DecodeTotals, stream_answer

    engine = load_engine(model, heads, config)
    params = sampling.resolve(engine.default_params())
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    totals = DecodeTotals()
    pieces = []
    for piece in stream_answer(engine, text if raw else messages, params, totals, stop or ()):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    if as_json:
        typer.echo(json.dumps(_report("".join(pieces), params, totals), ensure_ascii=False))
    else:
        typer.echo()
        typer.secho(totals.summary(), dim=True, err=True)


def _report(text: str, params: SamplingParams, totals: "DecodeTotals") -> dict[str, Any]:
    return {
        "text": text,
        "finish_reason": totals.finish_reason,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.tokens,
        "seed": params.seed,
        "tokens_per_second": totals.tokens_per_second,
        "tokens_per_step": totals.tokens_per_step,
        "estimated_speedup": totals.estimated_speedup,
    }
