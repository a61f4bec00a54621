"""`medusa chat`: a conversation at the terminal, or with the lines of a pipe as the user's turns."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from medusa_core.cli.engine_options import ModelOptions, SamplingOptions
from medusa_core.cli.options import with_options
from medusa_core.config import EngineConfig
from medusa_core.errors import MedusaError
from medusa_core.option_field import option
from medusa_core.sampling_params import MAX_SEED, SamplingParams, SpeculationParams

if TYPE_CHECKING:
    from medusa_core.engine.answer import AnswerStats
    from medusa_core.engine.engine import Engine

HELP = "/reset starts over, /stats shows figures, /quit leaves; Ctrl-C ends an answer early."


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How the conversation begins."""

    system: str | None = option("System message the conversation starts with.", default=None)


@with_options
def chat(
    options: ChatOptions,
    model: ModelOptions,
    sampling: SamplingOptions,
    speculation: SpeculationParams,
    config: EngineConfig,
) -> None:
    """Chat with the model in the terminal."""
    engine = model.load(config)
    params = replace(sampling.params(engine.default_params()), speculation=speculation)
    conversation = Conversation(engine, params, options.system)
    if sys.stdin.isatty():
        _talk(conversation)
    else:
        _read_turns(conversation)


class Conversation:
    """The messages so far and what their answers cost. Each turn is sampled with the next seed."""

    def __init__(self, engine: "Engine", params: SamplingParams, system: str | None) -> None:
        from medusa_core.engine.answer import AnswerStats

        self.engine = engine
        self.stats = AnswerStats()
        self._params = params
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._system)

    def reset(self) -> None:
        self.messages = list(self._system)

    def answer(self, text: str, write: Callable[[str], None]) -> "AnswerStats":
        """Answer the user's next message piece by piece through `write`; Ctrl-C cuts the answer short.

        If the request fails, the conversation is what it was before. Raises `MedusaError`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        with _interrupt_noted() as interrupted, self.engine.stream(messages, self._params) as stream:
            for piece in stream:
                pieces.append(piece)
                write(piece)
                if interrupted.is_set():
                    break
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self._params = replace(self._params, seed=(stream.seed + 1) & MAX_SEED)
        self.stats.add(stream.stats)
        return stream.stats


@contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising in the middle of a decode step."""
    event = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        event.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _talk(conversation: Conversation) -> None:
    """A conversation at a terminal; a request that fails does not end it."""
    console = Console(highlight=False)
    console.print(f"{conversation.engine.info.model}. {HELP}", style="dim", markup=False)
    while True:
        try:
            text = console.input("[bold green]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        try:
            if not _handle(conversation, text, console, console):
                return
        except MedusaError as error:
            console.print(f"{error} (/reset starts a new conversation)", style="red", markup=False)


def _read_turns(conversation: Conversation) -> None:
    """Answers on standard output, one after each line of standard input; figures on standard error."""
    screen, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    for line in sys.stdin:
        if not _handle(conversation, line.strip(), screen, notes):
            return


def _handle(conversation: Conversation, text: str, screen: Console, notes: Console) -> bool:
    """One line of the user's, a command or the next message; False ends the conversation."""
    if text in ("/quit", "/exit"):
        return False
    if text == "/reset":
        conversation.reset()
        notes.print("A new conversation.", style="dim")
    elif text == "/stats":
        screen.print(_stats_table(conversation))
    elif text.startswith("/"):
        screen.print(HELP, style="dim", soft_wrap=True)
    elif text:
        stats = conversation.answer(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
        notes.print(stats.summary(), style="dim", soft_wrap=True)
    return True


def _stats_table(conversation: Conversation) -> Table:
    info, stats = conversation.engine.info, conversation.stats
    speedup = stats.estimated_speedup
    rows = {
        "model": f"{info.model}, {info.parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}",
        "heads": f"{info.num_heads} ({info.heads})" if info.heads else "none",
        "tree nodes": str(info.tree_nodes),
        "turns": str(sum(message["role"] == "user" for message in conversation.messages)),
        "tokens": f"{stats.prompt_tokens} read, {stats.tokens} written",
        "tokens/s": f"{stats.tokens_per_second:.1f}",
        "tokens/step": f"{stats.tokens_per_step:.2f}",
        "estimated speedup": f"{speedup:.2f}" if speedup and info.heads else "not measured",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table
