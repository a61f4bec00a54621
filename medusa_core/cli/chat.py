"""`medusa chat`: a conversation in the terminal. Lines from a pipe are the user's turns one after another."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from medusa_core.cli import options
from medusa_core.cli.options import SamplingOptions, load_engine
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.errors import MedusaError
from medusa_core.sampling_params import MAX_SEED, SamplingParams, SpeculationMode

if TYPE_CHECKING:
    from medusa_core.engine.answer import DecodeTotals
    from medusa_core.engine.engine import Engine

HELP = "/reset starts over, /stats shows figures, /quit leaves; Ctrl-C ends an answer early."


def chat(
    system: Annotated[str | None, typer.Option(help="System message the conversation starts with.")] = None,
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
    """Chat with the model in the terminal."""
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
    engine = load_engine(model, heads, config)
    conversation = Conversation(engine, sampling.resolve(engine.default_params()), system)
    if sys.stdin.isatty():
        _talk(conversation)
    else:
        _read_turns(conversation)


class Conversation:
    """The messages so far and what their answers cost. Each turn is sampled with the next seed."""

    def __init__(self, engine: "Engine", params: SamplingParams, system: str | None) -> None:
        from medusa_core.engine.answer import DecodeTotals

        self.engine = engine
        self.totals: DecodeTotals = DecodeTotals()
        self._params = params
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._system)

    def reset(self) -> None:
        self.messages = list(self._system)

    def answer(self, text: str, write: Callable[[str], None]) -> "DecodeTotals":
        """Answer the user's next message piece by piece through `write`; Ctrl-C cuts the answer short.

        If the request fails, the conversation is what it was before. Raises MedusaError.
        """
        from medusa_core.engine.answer import DecodeTotals, stream_answer

        totals = DecodeTotals()
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        stream = stream_answer(self.engine, messages, self._params, totals)
        with _interrupt_noted() as interrupted, closing(stream):
            for piece in stream:
                pieces.append(piece)
                write(piece)
                if interrupted.is_set():
                    break
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self._params = replace(self._params, seed=(self._params.seed + 1) & MAX_SEED)
        self.totals.add(totals)
        return totals


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
    console = Console(highlight=False)
    console.print(f"{conversation.engine.info.model}. {HELP}", style="dim", markup=False)
    while True:
        try:
            text = console.input("[bold green]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text in ("/quit", "/exit"):
            return
        try:
            _handle(conversation, text, console)
        except MedusaError as error:
            console.print(f"{error} (/reset starts a new conversation)", style="red", markup=False)


def _handle(conversation: Conversation, text: str, console: Console) -> None:
    """One line of the user's: a command or the next message."""
    if text == "/reset":
        conversation.reset()
        console.print("A new conversation.", style="dim")
    elif text == "/stats":
        console.print(_stats_table(conversation))
    elif text.startswith("/"):
        console.print(HELP, style="dim")
    elif text:
        totals = conversation.answer(text, lambda piece: typer.echo(piece, nl=False))
        console.print(f"\n{totals.summary()}", style="dim")


def _read_turns(conversation: Conversation) -> None:
    """Answers on standard output, one after each line of standard input; figures on standard error."""
    console = Console(highlight=False)
    for line in sys.stdin:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            conversation.reset()
        elif text == "/stats":
            console.print(_stats_table(conversation))
        elif text:
            totals = conversation.answer(text, lambda piece: typer.echo(piece, nl=False))
            typer.echo()
            typer.secho(totals.summary(), dim=True, err=True)


def _stats_table(conversation: Conversation) -> Table:
    info, totals = conversation.engine.info, conversation.totals
    speedup = totals.estimated_speedup
    rows = {
        "model": f"{info.model}, {info.parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}",
        "heads": f"{info.num_heads} ({info.heads})" if info.heads else "none",
        "tree nodes": str(info.tree_nodes),
        "turns": str(sum(message["role"] == "user" for message in conversation.messages)),
        "tokens": f"{totals.prompt_tokens} read, {totals.tokens} written",
        "tokens/s": f"{totals.tokens_per_second:.1f}",
        "tokens/step": f"{totals.tokens_per_step:.2f}",
        "estimated speedup": f"{speedup:.2f}" if speedup and info.heads else "not measured",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table
