"""From a valid request body to the `Request` that scheduler and engine work on.

Everything a request is checked for before it is admitted. Templates and tokenization run in a thread, off the
event loop.
"""

import asyncio
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

from medusa_core.errors import TokenizerError
from medusa_core.model_info import ModelInfo
from medusa_core.request import Request
from medusa_core.sampling_params import (
    MAX_SEED,
    DraftSourceName,
    SamplingParams,
    SpeculationParams,
)
from medusa_core.text.tokenizer import ChatTokenizer
from server import errors
from server.schemas.chat import ChatMessage, ChatRequest, Speculation
from server.settings import Settings

ADAPTIVE_TREE = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBuilder:
    """Prepares requests for one loaded model."""

    chat: ChatTokenizer
    info: ModelInfo
    settings: Settings
    executor: Executor

    async def prepare(self, body: ChatRequest, request_id: str, client_id: str = "") -> Request:
        """Raises a 400 `ApiError` naming the parameter, or a 503 when time is up."""
        check_combinations(body)
        params = self._params(body)
        loop = asyncio.get_running_loop()
        try:
            # A template is somebody's code and may loop.
            async with asyncio.timeout(self.settings.request_timeout):
                prompt_ids = await loop.run_in_executor(
                    self.executor, self.chat.render, _template_messages(body.messages)
                )
        except TimeoutError:
            raise errors.unavailable("The prompt could not be prepared in time.", "prompt_timeout") from None
        except TokenizerError as error:
            raise errors.invalid(str(error), param="messages") from error
        self._check_length(len(prompt_ids))
        return Request(request_id=request_id, prompt_ids=prompt_ids, params=params, client_id=client_id)

    def _params(self, body: ChatRequest) -> SamplingParams:
        defaults = self.info.defaults
        return SamplingParams(
            max_tokens=self._max_tokens(body),
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=defaults.top_k if body.top_k is None else body.top_k,
            min_p=defaults.min_p if body.min_p is None else body.min_p,
            # A negative seed is the unsigned one of the same bits.
            seed=None if body.seed is None else body.seed & MAX_SEED,
            stop=tuple(dict.fromkeys(body.stop or ())),
            speculation=self._speculation(body.speculation or Speculation()),
        )

    def _speculation(self, given: Speculation) -> SpeculationParams:
        mode = given.mode or self.settings.speculation
        source = given.source or self.settings.speculation_source
        self._check_tree(given.tree, source)
        self._check_source(source, is_asked_for=given.source is not None)
        return SpeculationParams(
            mode=mode, source=source, tree=given.tree, epsilon=given.epsilon, delta=given.delta
        )

    def _check_source(self, source: DraftSourceName, *, is_asked_for: bool) -> None:
        # As a default "heads" fits every model: one without heads then drafts nothing.
        if source not in self.info.sources and (is_asked_for or source is not DraftSourceName.HEADS):
            raise errors.invalid(
                f'This model has no draft source "{source}"; choose one of {_quoted(self.info.sources)}.',
                param="speculation.source",
            )

    def _check_tree(self, tree: str, source: DraftSourceName) -> None:
        if source is not DraftSourceName.HEADS and tree != ADAPTIVE_TREE:
            raise errors.invalid(
                f'Draft source "{source}" makes trees of its own; leave out speculation.tree.',
                param="speculation.tree",
            )
        if self.info.trees and tree not in self.info.trees:
            raise errors.invalid(
                f"There is no draft tree of this name; choose one of {_quoted(self.info.trees)}.",
                param="speculation.tree",
            )

    def _max_tokens(self, body: ChatRequest) -> int | None:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        value = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if value is not None and value > self.info.context_length:
            limit = self.info.context_length
            raise errors.invalid(
                f"{name} is too large: {value}. The context length is {limit} tokens.", param=name
            )
        return value

    def _check_length(self, num_tokens: int) -> None:
        limit = self.info.context_length
        if num_tokens >= limit:
            raise errors.invalid(
                f"This model's maximum context length is {limit} tokens, answer included, but your messages "
                f"have {num_tokens}. Please shorten them.",
                param="messages",
                code="context_length_exceeded",
            )


def check_combinations(body: ChatRequest) -> None:
    """Refuse parameters that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise errors.invalid("stream_options is only allowed with stream: true.", param="stream_options")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise errors.invalid(
            "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens"
        )


def _template_messages(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """What templates know: OpenAI's developer role is its newer name for system."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
