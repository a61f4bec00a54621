"""One answer as text: the engine's steps detokenised, cut at stop strings, their cost added up."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from medusa_core.engine import Engine, Prompt
from medusa_core.errors import RequestError
from medusa_core.request import FinishReason, SamplingParams, StepOutput
from medusa_core.text import IncrementalDetokenizer, StopMatcher


@dataclass(slots=True)
class DecodeTotals:
    """Tokens and seconds of one or more answers. Prefill, which yields the first token, is kept apart.

    `decode_tokens` counts every token a decode step decided, the one that ended the answer included.
    `baseline_seconds` is what they would have taken one by one (0.0 where the engine measured nothing).
    """

    prompt_tokens: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    baseline_seconds: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def tokens_per_second(self) -> float:
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

    def add_step(self, output: StepOutput) -> None:
        self.tokens += len(output.token_ids)
        self.finish_reason = output.finish_reason
        if output.stats is None:
            return
        if output.stats.is_prefill:
            self.prompt_tokens += output.stats.prompt_tokens
            self.prefill_seconds += output.stats.seconds
            return
        self.decode_tokens += len(output.token_ids) + (output.stop_token_id is not None)
        self.decode_steps += 1
        self.decode_seconds += output.stats.seconds
        self.baseline_seconds += output.stats.baseline_seconds

    def add(self, other: "DecodeTotals") -> None:
        """Add a whole answer."""
        for name in ("prompt_tokens", "tokens", "decode_tokens", "decode_steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prefill_seconds", "decode_seconds", "baseline_seconds"):
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


def stream_answer(
    engine: Engine, prompt: Prompt, params: SamplingParams, totals: DecodeTotals, stops: Sequence[str] = ()
) -> Generator[str, None, None]:
    """Text as it becomes certain; `totals` grows along. Raises RequestError if decoding fails."""
    detokenizer, matcher = IncrementalDetokenizer(engine.tokenizer), StopMatcher(stops)
    steps = engine.generate(prompt, params)
    assert isinstance(steps, Generator)  # closed when the reader stops early, which frees the slot
    with closing(steps) as outputs:
        for output in outputs:
            totals.add_step(output)
            if output.finish_reason is FinishReason.ERROR:
                raise RequestError(f"decoding failed: {output.error}")
            result = matcher.push(detokenizer.push(output.token_ids))
            if result.text:
                yield result.text
            if result.hit:
                totals.finish_reason = FinishReason.STOP
                return
    last = matcher.push(detokenizer.flush())
    if rest := last.text + matcher.flush():
        yield rest
