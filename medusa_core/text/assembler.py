"""Assembles an answer's text from its tokens: detokenizing, stop strings, token counts."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from medusa_core.text.detokenizer import IncrementalDetokenizer, StopMatcher


class TextAssembler:
    """Turns the runs of tokens that steps decide into text, one object per answer.

    Counts the tokens that the reader gets and no others: those after a stop string are dropped. After
    `is_stopped` nothing more comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str] = ()) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopMatcher(stops)
        self._whole_runs = not stops
        self.num_tokens = 0
        self.decode_steps = 0
        self.decode_tokens = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._stops.is_hit

    @property
    def acceptance_length(self) -> float | None:
        """Tokens the reader got per decode step that brought any; None before the first such step."""
        return self.decode_tokens / self.decode_steps if self.decode_steps else None

    def push(self, token_ids: Sequence[int], *, is_prefill: bool = False) -> str:
        """Take in one step's tokens; returns the text that is certain by now."""
        before = self.num_tokens
        text = self._push(token_ids)
        if not is_prefill and self.num_tokens > before:
            self.decode_steps += 1
            self.decode_tokens += self.num_tokens - before
        return text

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

    def _push(self, token_ids: Sequence[int]) -> str:
        if self._whole_runs:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        # One by one, so that neither text nor counts depend on how the tokens were grouped.
        pieces: list[str] = []
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            pieces.append(self._stops.push(self._detokenizer.push((token_id,))))
        return "".join(pieces)
