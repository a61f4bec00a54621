"""`medusa distill`: has a model answer seed dialogues and writes the result as training rows."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from medusa_core.cli.engine_options import ModelOptions, PlainEngine
from medusa_core.cli.options import OptionGroup, dataclass_options, with_options
from medusa_core.cli.output import say
from medusa_core.config import EngineConfig
from medusa_core.distillation.settings import ENDPOINT_PANEL, DistillSettings, EndpointSettings
from medusa_core.errors import ConfigError, DataError
from medusa_core.option_field import option, option_of
from medusa_core.status_bar import StatusBar

if TYPE_CHECKING:
    from medusa_core.distillation.answers import Answerer
    from medusa_core.distillation.run import DistillReport

    OpenAnswerer = Callable[[], AbstractAsyncContextManager[Answerer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """The server that answers instead of an engine of our own."""

    endpoint: str | None = option(
        "Ask this OpenAI-compatible server (http://127.0.0.1:8000/v1) and load no model.",
        ENDPOINT_PANEL,
        default=None,
    )
    endpoint_model: str | None = option("The model's name there.", ENDPOINT_PANEL, default=None)
    api_key_env: str | None = option(
        "Environment variable that holds the API key.", ENDPOINT_PANEL, default=None, shown="no key is sent"
    )
    concurrency: int = option("Dialogues in progress at once.", ENDPOINT_PANEL, default=8, least=1)

    def settings(self, url: str, retries: dict[str, Any]) -> EndpointSettings:
        """Raises `ConfigError`, also if the variable with the key is not set."""
        variable = self.api_key_env
        key = os.environ.get(variable, "").strip() if variable is not None else None
        if key == "":
            raise ConfigError(
                f"the environment variable {variable}, which should hold the API key, is not set"
            )
        return EndpointSettings(url=url, model=self.endpoint_model or "", api_key=key, **retries)


# The rest of `EndpointSettings`.
Retries = Annotated[dict[str, Any], OptionGroup(dataclass_options(EndpointSettings).parameters, dict)]


@with_options
def distill(
    context: typer.Context,
    settings: DistillSettings,
    endpoint: EndpointOptions,
    retries: Retries,
    model: ModelOptions,
    config: PlainEngine,
) -> None:
    """Make training text from the model itself: the users of seed dialogues, answered by the model."""
    url = endpoint.endpoint
    _refuse(context, (ModelOptions, EngineConfig) if url else (EndpointOptions, EndpointSettings), bool(url))
    logging.getLogger("medusa_core").setLevel(logging.INFO)  # what goes on, where no progress bar shows it
    if url:
        settings = replace(settings, concurrency=endpoint.concurrency)
        report = _ask_endpoint(endpoint.settings(url, retries), settings)
    else:
        report = _ask_engine(model, config, settings)
    say(
        f"{report.total} seed dialogues: {report.finished} finished before, {report.written} written "
        f"({report.shortened} without their tail), {report.dropped} dropped, {report.failed} failed; "
        f"{report.bad} rows skipped. {report.answers} answers, {report.tokens} tokens: {settings.out}"
    )
    if report.failed:
        raise DataError(f"{report.failed} dialogues failed: the same command tries them again")


def _ask_endpoint(server: EndpointSettings, settings: DistillSettings) -> "DistillReport":
    from medusa_core.distillation.endpoint import EndpointAnswerer, open_client

    @asynccontextmanager
    async def connected() -> AsyncIterator[EndpointAnswerer]:
        async with open_client(server, settings.concurrency) as client:
            yield EndpointAnswerer(client, server, settings)

    return _run(settings, {"endpoint": server.url, "model": server.model}, connected)


def _ask_engine(model: ModelOptions, config: EngineConfig, settings: DistillSettings) -> "DistillReport":
    from medusa_core.distillation.answers import EngineAnswerer

    # The heads do not belong to it: whatever they guess, the answers are the model's.
    answered_by = {
        "model": model.model,
        "dtype": config.dtype,
        "max_length": config.max_length,
        "chat_template": config.chat_template,
    }
    return _run(settings, answered_by, lambda: nullcontext(EngineAnswerer(model.load(config), settings)))


def _run(
    settings: DistillSettings, answered_by: dict[str, Any], answerers: "OpenAnswerer"
) -> "DistillReport":
    """What can be wrong with files shows before a model is loaded; one without work is not loaded."""
    # Imported here: transformers takes a second, which `medusa --help` should not.
    from medusa_core.distillation.journal import Journal
    from medusa_core.distillation.run import Distillation, DistillProgress, DistillReport, settings_record
    from medusa_core.distillation.seeds import load_seeds

    seeds = load_seeds(settings.data, limit=settings.limit, strict=settings.strict)
    with Journal(settings.out, settings_record(settings, answered_by)) as journal:
        if all(dialogue.row in journal.done for dialogue in seeds.dialogues):
            total = len(seeds.dialogues)
            return DistillReport(total=total, finished=total, bad=seeds.bad_rows)

        async def go() -> "DistillReport":
            async with answerers() as answerer:
                with StatusBar(Console(stderr=True), "asking") as bar:
                    progress = DistillProgress(bar)
                    return await Distillation(seeds, journal, answerer, settings, progress).run()

        return asyncio.run(go())


def _refuse(context: typer.Context, unused: tuple[type, ...], has_endpoint: bool) -> None:
    """An option that would do nothing is a mistake; a MEDUSA_ variable may be meant for other commands."""
    for name in (spec.name for kind in unused for spec in fields(kind) if option_of(spec)):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            reason = "has no effect with --endpoint" if has_endpoint else "needs --endpoint"
            raise ConfigError(f"--{name.replace('_', '-')} {reason}")
