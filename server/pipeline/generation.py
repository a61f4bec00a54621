"""From a job's tokens to its text: incremental detokenisation, stop strings, usage."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from medusa_core.engine.outputs import FinishReason
from medusa_core.text.detokenizer import IncrementalDetokenizer, StopMatcher
from medusa_core.text.tokenizer import ChatTokenizer
from server.schemas.chat import SpeculationUsage, Usage
from server.workers.scheduler import Job, Scheduler
from server.workers.token_queue import Failed


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is final, "" if there is none yet; the last one carries the finish reason."""

    text: str
    finish_reason: FinishReason | None = None


class Generation:
    """Reads one job's mailbox to the end. What a reader that lags finds gathered becomes one delta."""

    def __init__(
        self,
        job: Job,
        scheduler: Scheduler,
        chat: ChatTokenizer,
        stops: Sequence[str],
        *,
        keep_chars: int = 0,
    ) -> None:
        """The first `keep_chars` characters of the text are kept as `transcript`."""
        self.job = job
        self._scheduler = scheduler
        self._detokenizer = IncrementalDetokenizer(chat.tokenizer)
        self._stops = StopMatcher(stops) if stops else None
        self._num_tokens = 0
        self._room = keep_chars
        self._kept: list[str] = []

    @property
    def transcript(self) -> str:
        """What was handed out so far, up to the limit, for the log."""
        return "".join(self._kept)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Ends with the delta that has a finish reason. Raises the job's `ApiError`.

        Leaving early ends the job.
        """
        try:
            while True:
                delta = await self._next()
                self._keep(delta.text)
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
        """Counts so far; tokens behind a stop string are not counted."""
        job = self.job
        steps = job.timeline.decode_steps
        length = job.timeline.decode_tokens / steps if steps else None
        return Usage(
            prompt_tokens=len(job.prompt_ids),
            completion_tokens=self._num_tokens,
            total_tokens=len(job.prompt_ids) + self._num_tokens,
            speculation=SpeculationUsage(steps=steps, acceptance_length=length),
        )

    async def _next(self) -> TextDelta:
        token_ids, end = await self.job.mailbox.take()
        text, hit = self._push(token_ids)
        if hit:
            self._scheduler.stop(self.job)
            return TextDelta(text, FinishReason.STOP)
        if isinstance(end, Failed):
            raise end.error
        if end is None:
            return TextDelta(text)
        rest, hit = self._flush()
        return TextDelta(text + rest, FinishReason.STOP if hit else end.reason)

    def _keep(self, text: str) -> None:
        if self._room > 0 and text:
            self._kept.append(text[: self._room])
            self._room -= len(text)

    def _push(self, token_ids: list[int]) -> tuple[str, bool]:
        if self._stops is None:
            self._num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids), False
        # One by one, so that neither text nor usage depends on how the tokens were grouped.
        pieces: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            result = self._stops.push(self._detokenizer.push((token_id,)))
            pieces.append(result.text)
            if result.hit:
                return "".join(pieces), True
        return "".join(pieces), False

    def _flush(self) -> tuple[str, bool]:
        text = self._detokenizer.flush()
        if self._stops is None:
            return text, False
        result = self._stops.push(text)
        return result.text + self._stops.flush(), result.hit
