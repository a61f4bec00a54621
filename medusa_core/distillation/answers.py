"""The protocol of what answers a conversation, and its implementation with our own engine."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from medusa_core.distillation.settings import DistillSettings
from medusa_core.engine.outputs import FinishReason
from medusa_core.errors import CapacityError, MedusaError, RequestError, TokenizerError

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """`cut`: why the model did not end the answer itself ("length", say); None if it did."""

    text: str
    cut: str | None = None
    tokens: int = 0


class RowError(MedusaError):
    """This dialogue got no answer, after all retries; others may."""


class Answerer(Protocol):
    """Answers one conversation. Raises `RowError`, or another `MedusaError` if no other would fare better."""

    async def answer(self, messages: Messages, seed: int) -> Reply: ...


class EngineAnswerer:
    """Our own engine, one answer at a time, with speculation where there are heads (the same text, sooner).

    Sampling is the settings', and where they say nothing the model's `generation_config.json`: just what
    `medusa serve` does with a request that leaves it out.
    """

    def __init__(self, engine: "Engine", settings: DistillSettings) -> None:
        self._engine = engine
        defaults = engine.default_params()
        self._params = replace(
            defaults,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            top_p=defaults.top_p if settings.top_p is None else settings.top_p,
        )

    async def answer(self, messages: Messages, seed: int) -> Reply:
        return await asyncio.to_thread(self._answer, messages, seed)

    def _answer(self, messages: Messages, seed: int) -> Reply:
        try:
            prompt = self._engine.chat_tokenizer.render(messages)
            if len(prompt) >= self._engine.context_length:
                return Reply("", cut=f"{len(prompt)} tokens of conversation outgrow the context")
            answer = self._engine.stream(prompt, replace(self._params, seed=seed)).read()
        except CapacityError:
            raise
        except (RequestError, TokenizerError) as error:
            raise RowError(str(error)) from error
        cut = None if answer.finish_reason is FinishReason.STOP else str(answer.finish_reason)
        return Reply(answer.text, cut, answer.stats.tokens)
