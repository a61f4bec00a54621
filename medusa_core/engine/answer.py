"""Answers as text: an engine's steps assembled, and what they cost."""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.errors import RequestError
from medusa_core.request import Request
from medusa_core.text.assembler import TextAssembler

if TYPE_CHECKING:
    from medusa_core.engine.engine import Engine

SECONDS = ("prefill_seconds", "decode_seconds", "baseline_seconds")


@dataclass(slots=True)
class AnswerStats:
    """Tokens and seconds of one or more answers. Prefill, which yields the first token, is kept apart.

    `decode_tokens` and `decode_steps` count what the reader got: no token after a stop, no step that brought
    none. `baseline_seconds` is what the steps' tokens would have taken one by one (0.0 where the engine
    measured nothing). `origins`: how many tokens the model, heads and n-grams guessed.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    baseline_seconds: float = 0.0
    origins: Counter[str] = field(default_factory=Counter)
    finish_reason: FinishReason | None = None

    @property
    def tokens_per_second(self) -> float:
        """While decoding."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """The acceptance length; 1 is ordinary decoding."""
        return self.decode_tokens / self.decode_steps if self.decode_steps else 0.0

    @property
    def estimated_speedup(self) -> float | None:
        """Against the same engine without speculation, from step times measured at start."""
        if not (self.decode_seconds and self.baseline_seconds):
            return None
        return self.baseline_seconds / self.decode_seconds

    def add_step(self, output: StepOutput, assembler: TextAssembler) -> None:
        """Account for a step whose tokens the assembler has taken in."""
        self.tokens, self.decode_tokens = assembler.num_tokens, assembler.decode_tokens
        self.decode_steps = assembler.decode_steps
        self.finish_reason = FinishReason.STOP if assembler.is_stopped else output.finish_reason
        if output.stats is None:
            return
        if output.stats.is_prefill:
            self.prompt_tokens += output.stats.prompt_tokens
            self.prefill_seconds += output.stats.seconds
            return
        self.decode_seconds += output.stats.seconds
        self.baseline_seconds += output.stats.baseline_seconds

    def add(self, other: "AnswerStats") -> None:
        """Add a whole answer."""
        for name in ("prompt_tokens", "tokens", "decode_tokens", "decode_steps", "origins", *SECONDS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.finish_reason = other.finish_reason

    def summary(self) -> str:
        """One line for people."""
        speedup = self.estimated_speedup if self.tokens_per_step > 1.0 else None
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:.0f} tokens/s, "
            f"{self.tokens_per_step:.2f} tokens/step"
            + (f", about {speedup:.1f}x plain decoding" if speedup else "")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. `token_ids`: what `text` is made of, a stop string included; `seed` repeats it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    stats: AnswerStats


class AnswerBuilder:
    """Puts one request's steps together. `push` returns the text that a step makes certain."""

    def __init__(self, engine: "Engine", request: Request) -> None:
        self.request = request
        self.stats = AnswerStats()
        self._assembler = TextAssembler(engine.tokenizer, request.params.stop)
        self._token_ids: list[int] = []
        self._pieces: list[str] = []

    @property
    def is_done(self) -> bool:
        return self.stats.finish_reason is not None

    def push(self, output: StepOutput) -> str:
        """Raises `RequestError` if the engine gave up on the request."""
        if output.finish_reason is FinishReason.ERROR:
            raise RequestError(f"decoding failed: {output.error}")
        before = self._assembler.num_tokens
        is_prefill = output.stats is not None and output.stats.is_prefill
        text = self._assembler.push(output.token_ids, is_prefill=is_prefill)
        if output.finish_reason is not None:
            text += self._assembler.finish()
        self.stats.add_step(output, self._assembler)
        count = self._assembler.num_tokens - before
        self.stats.origins.update(extras.origin for extras in output.extras[:count])
        self._token_ids += output.token_ids[:count]
        self._pieces.append(text)
        return text

    def build(self) -> Answer:
        assert self.stats.finish_reason is not None
        return Answer(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self.stats.finish_reason,
            seed=self.request.seed,
            stats=self.stats,
        )


class AnswerStream(Iterator[str]):
    """Pieces of one answer's text as they become certain; `stats` grows along, `answer` is there at the end.

    Closing it, or leaving its `with` block, ends the request and frees its slot.
    """

    def __init__(self, engine: "Engine", request: Request, steps: Generator[StepOutput, None, None]) -> None:
        self._builder = AnswerBuilder(engine, request)
        self._steps = steps

    @property
    def stats(self) -> AnswerStats:
        return self._builder.stats

    @property
    def seed(self) -> int:
        return self._builder.request.seed

    @property
    def answer(self) -> Answer:
        """The whole answer, once the last piece is out. Raises `RequestError` before."""
        if not self._builder.is_done:
            raise RequestError("the answer is not finished: read the stream to its end first")
        return self._builder.build()

    def __next__(self) -> str:
        while not self._builder.is_done:
            output = next(self._steps, None)
            if output is None:  # closed early
                break
            text = self._builder.push(output)
            if self._builder.is_done:
                self._steps.close()
            if text:
                return text
        raise StopIteration

    def read(self) -> Answer:
        """All that is left, then the answer."""
        with self:
            for _ in self:
                pass
        return self.answer

    def close(self) -> None:
        self._steps.close()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def answer_all(engine: "Engine", requests: Sequence[Request]) -> list[Answer]:
    """Answer requests in order, as many at once as there are slots. Raises what the first that fails says."""
    builders = {request.request_id: AnswerBuilder(engine, request) for request in requests}
    waiting = list(reversed(requests))
    try:
        while waiting or engine.has_work:
            while waiting and engine.num_free_slots:
                engine.add(waiting.pop())
            for output in engine.step():
                builder = builders[output.request_id]
                if not builder.is_done:
                    builder.push(output)
                    if builder.is_done:
                        engine.abort(output.request_id)
    finally:
        for request in requests:
            engine.abort(request.request_id)
    return [builders[request.request_id].build() for request in requests]
