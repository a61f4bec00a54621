"""From a job's tokens to its text and usage."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.text.assembler import TextAssembler
from server.errors import ApiError
from server.observability.metrics import ServerMetrics
from server.schemas.completion import SpeculationUsage, Usage
from server.workers.scheduler import Job, Scheduler


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is final, "" if there is none yet; the last one carries the finish reason."""

    text: str
    finish_reason: FinishReason | None = None


class Generation:
    """Reads one job's tokens to the end. What a reader that lags finds gathered becomes one delta."""

    def __init__(
        self,
        job: Job,
        scheduler: Scheduler,
        assembler: TextAssembler,
        metrics: ServerMetrics,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`on_text` hears of every piece of text that is handed out."""
        self.job = job
        self._scheduler = scheduler
        self._assembler = assembler
        self._metrics = metrics
        self._on_text = on_text

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Ends with the delta that has a finish reason. Raises the job's `ApiError`.

        Leaving early ends the job.
        """
        try:
            while True:
                delta = await self._next()
                self._on_text(delta.text)
                if delta.text or delta.finish_reason is not None:
                    yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._scheduler.cancel(self.job)

    async def collect(self) -> TextDelta:
        """The whole answer at once."""
        pieces: list[str] = []
        reason: FinishReason | None = None
        async for delta in self.deltas():
            pieces.append(delta.text)
            reason = delta.finish_reason
        return TextDelta("".join(pieces), reason)

    def usage(self) -> Usage:
        """Counts so far, of what the client gets."""
        assembler, num_prompt = self._assembler, len(self.job.request.prompt_ids)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=assembler.num_tokens,
            total_tokens=num_prompt + assembler.num_tokens,
            speculation=SpeculationUsage(
                steps=assembler.decode_steps, acceptance_length=assembler.acceptance_length
            ),
        )

    async def _next(self) -> TextDelta:
        outputs, end = await self.job.tokens.take()
        text = "".join([self._push(output) for output in outputs])
        if isinstance(end, FinishReason):
            text += self._assembler.finish()
        if self._assembler.is_stopped:
            self._scheduler.stop(self.job)
            return TextDelta(text, FinishReason.STOP)
        if isinstance(end, ApiError):
            raise end
        return TextDelta(text, end)

    def _push(self, output: StepOutput) -> str:
        before = self._assembler.decode_tokens
        is_prefill = output.stats is not None and output.stats.is_prefill
        text = self._assembler.push(output.token_ids, is_prefill=is_prefill)
        num_tokens = self._assembler.decode_tokens - before
        if num_tokens:
            self._metrics.acceptance_length.observe(num_tokens)
        return text
