"""`medusa distill`: seed dialogues and a model in, its own answers as training rows out."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from medusa_core.cli import options
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.distillation.settings import DistillSettings, EndpointSettings
from medusa_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from medusa_core.distillation.answers import Answerer
    from medusa_core.distillation.run import DistillReport

    OpenAnswerer = Callable[[], AbstractAsyncContextManager[Answerer]]

ENDPOINT_PANEL = "Endpoint"
DEFAULT_CONCURRENCY = 8  # of an endpoint; our own engine answers one request after the other
DEFAULTS = DistillSettings(data=(Path("-"),), out=Path("-"))
ENDPOINT_DEFAULTS = EndpointSettings(url="http://-", model="-")
ENGINE_OPTIONS = ("model", "heads", "dtype", "device", "max_length", "chat_template")
ENDPOINT_OPTIONS = ("endpoint_model", "api_key_env", "concurrency", "attempts", "retry_delay", "timeout")


def distill(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Option(
            help="Seed dialogues in any format of `medusa train`: JSONL, JSON, Parquet, a Hub data set. "
            "Their assistant's turns are replaced. Repeatable."
        ),
    ],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="JSONL file for `medusa train`. The same command resumes it.")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many rows.", show_default="all")
    ] = DEFAULTS.limit,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Ask at most so many turns of a dialogue.", show_default="all")
    ] = DEFAULTS.turns,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer; one cut off here ends its dialogue.")
    ] = DEFAULTS.max_tokens,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; the Medusa paper's is 0.3.")
    ] = DEFAULTS.temperature,
    top_p: options.TopPOption = DEFAULTS.top_p,
    seed: Annotated[int, typer.Option(min=0, help="Repeats sampled answers.")] = DEFAULTS.seed,
    strict: Annotated[
        bool, typer.Option("--strict", help="A row that cannot be used ends the run.")
    ] = DEFAULTS.strict,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Ask this OpenAI-compatible server (http://127.0.0.1:8000/v1) and load no model.",
            rich_help_panel=ENDPOINT_PANEL,
        ),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(help="The model's name there.", rich_help_panel=ENDPOINT_PANEL)
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable that holds the API key.",
            show_default="no key is sent",
            rich_help_panel=ENDPOINT_PANEL,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Dialogues in progress at once.", rich_help_panel=ENDPOINT_PANEL)
    ] = DEFAULT_CONCURRENCY,
    attempts: Annotated[
        int, typer.Option(min=1, help="Tries of a request.", rich_help_panel=ENDPOINT_PANEL)
    ] = ENDPOINT_DEFAULTS.attempts,
    retry_delay: Annotated[
        float,
        typer.Option(
            help="Seconds before the first retry; they double with each.", rich_help_panel=ENDPOINT_PANEL
        ),
    ] = ENDPOINT_DEFAULTS.retry_delay,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a byte of an answer.", rich_help_panel=ENDPOINT_PANEL)
    ] = ENDPOINT_DEFAULTS.timeout,
    model: options.ModelOption = str(EMBEDDED_MODEL),
    heads: options.HeadsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    max_length: options.MaxLengthOption = None,
    chat_template: options.ChatTemplateOption = None,
) -> None:
    """Make training text from the model itself: the users of seed dialogues, answered by the model."""
    _refuse(context, ENGINE_OPTIONS if endpoint else ENDPOINT_OPTIONS, bool(endpoint))
    settings = DistillSettings(
        data=tuple(data),
        out=out,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        turns=turns,
        limit=limit,
        seed=seed,
        concurrency=concurrency if endpoint else 1,
        strict=strict,
    )
    logging.getLogger("medusa_core").setLevel(logging.INFO)  # what goes on, where no progress bar shows it
    if endpoint:
        server = EndpointSettings(
            url=endpoint,
            model=endpoint_model or "",
            api_key=_api_key(api_key_env),
            attempts=attempts,
            retry_delay=retry_delay,
            timeout=timeout,
        )
        report = _ask_endpoint(server, settings)
    else:
        config = EngineConfig(dtype=dtype, device=device, max_length=max_length, chat_template=chat_template)
        report = _ask_engine(model, heads, config, settings)
    _show(report, out)
    if report.failed:
        raise DataError(f"{report.failed} dialogues failed: the same command tries them again")


def _ask_endpoint(server: EndpointSettings, settings: DistillSettings) -> "DistillReport":
    from medusa_core.distillation.endpoint import EndpointAnswerer, open_client

    @asynccontextmanager
    async def connected() -> AsyncIterator[EndpointAnswerer]:
        async with open_client(server, settings.concurrency) as client:
            yield EndpointAnswerer(client, server, settings)

    return _run(settings, {"endpoint": server.url, "model": server.model}, connected)


def _ask_engine(
    model: str, heads: str | None, config: EngineConfig, settings: DistillSettings
) -> "DistillReport":
    from medusa_core.distillation.answers import EngineAnswerer

    @asynccontextmanager
    async def loaded() -> AsyncIterator[EngineAnswerer]:
        yield EngineAnswerer(options.load_engine(model, heads, config), settings)

    # The heads do not belong to it: whatever they guess, the answers are the model's.
    answered_by = {
        "model": model,
        "dtype": config.dtype,
        "max_length": config.max_length,
        "chat_template": config.chat_template,
    }
    return _run(settings, answered_by, loaded)


def _run(
    settings: DistillSettings, answered_by: dict[str, Any], answerers: "OpenAnswerer"
) -> "DistillReport":
    """What can be wrong with files shows before a model is loaded; one without work is not loaded."""
    # Imported here: transformers takes a second, which `medusa --help` should not.
    from medusa_core.distillation.journal import Journal
    from medusa_core.distillation.progress import DistillProgress
    from medusa_core.distillation.run import Distillation, DistillReport, settings_record
    from medusa_core.distillation.seeds import load_seeds

    seeds = load_seeds(settings.data, limit=settings.limit, strict=settings.strict)
    with Journal(settings.out, settings_record(settings, answered_by)) as journal:
        if all(dialogue.row in journal.done for dialogue in seeds.dialogues):
            total = len(seeds.dialogues)
            return DistillReport(total=total, finished=total, bad=seeds.bad_rows)

        async def go() -> "DistillReport":
            async with answerers() as answerer:
                with DistillProgress(Console(stderr=True)) as progress:
                    return await Distillation(seeds, journal, answerer, settings, progress.show).run()

        return asyncio.run(go())


def _show(report: "DistillReport", out: Path) -> None:
    Console().print(
        f"{report.total} seed dialogues: {report.finished} finished before, {report.written} written "
        f"({report.shortened} without their tail), {report.dropped} dropped, {report.failed} failed; "
        f"{report.bad} rows skipped. {report.answers} answers, {report.tokens} tokens: {out}",
        highlight=False,
        soft_wrap=True,
    )


def _refuse(context: typer.Context, names: tuple[str, ...], has_endpoint: bool) -> None:
    """An option that would do nothing is a mistake; a MEDUSA_ variable may be meant for other commands."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            reason = "has no effect with --endpoint" if has_endpoint else "needs --endpoint"
            raise ConfigError(f"--{name.replace('_', '-')} {reason}")


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable}, which should hold the API key, is not set")
    return key
