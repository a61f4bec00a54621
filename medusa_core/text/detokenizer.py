"""Incremental detokenizer and stop-string matcher, one object per answer. No torch here."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"  # what a decoder puts where bytes are not (yet) UTF-8
MAX_PENDING = 3  # tokens of at least one byte each that an incomplete character can consist of


class IncrementalDetokenizer:
    """Turns runs of token ids into text that is final the moment it is returned.

    All pushes and the flush together are `decode(all ids, skip_special_tokens=True)`, however the ids are
    cut into runs. Bytes that may be the beginning of a character wait for the rest of it; only `flush` gives
    up on them. One exception: a decoder with byte fallback (sentencepiece) replaces a *whole* run of byte
    tokens when any of it is broken; text of such a run that was already returned stays as it was.

    Each push decodes its own ids and those of the push before (for the space between words), so the cost of
    an answer is linear in its length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text was returned

    def push(self, ids: Sequence[int]) -> str:
        """The text `ids` make certain, "" if none yet."""
        self._window += [i for i in ids if self._is_text(i)]
        return self._advance(self._stable_end())

    def flush(self) -> str:
        """What was held back, with replacement characters for bytes that never became a character."""
        return self._advance(len(self._window))

    def _is_text(self, token_id: int) -> bool:
        # Left out here and not by the decoder: a window that starts with a skipped token would make the
        # token after it look like the first of the answer, which loses its leading space.
        return token_id not in self._special and self._backend.id_to_token(token_id) is not None

    def _decode(self, start: int, end: int) -> str:
        return self._backend.decode(self._window[start:end], skip_special_tokens=False)

    def _stable_end(self) -> int:
        """How many tokens of the window have text that no further token can change."""
        count = len(self._window)
        text = self._decode(0, count)
        if not text.endswith(REPLACEMENT):
            return count
        for end in range(count - 1, max(count - MAX_PENDING - 1, self._read), -1):
            if not self._decode(0, end).endswith(REPLACEMENT):
                return end
        # Not one character under way but bytes that are no text at all: let the oldest of them go.
        end = count - MAX_PENDING
        return end if end > self._read and text.startswith(self._decode(0, end)) else self._read

    def _advance(self, end: int) -> str:
        if end == self._read:
            return ""
        before, text = self._decode(0, self._read), self._decode(0, end)
        delta = text[len(before) :] if text.startswith(before) else self._decode(self._read, end)
        del self._window[: self._read]
        self._read = end - self._read
        return delta


class StopMatcher:
    """Cuts a stream of text before the first stop string.

    The match that is complete first wins, and of several that end together the longest, so the outcome does
    not depend on how the text was cut into pieces. Text that may be the beginning of a stop string, at most
    `max(len(stop)) - 1` characters, is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_hit = False  # a stop string followed the text so far: the answer is over

    def push(self, text: str) -> str:
        """The part of the text so far that is certain; after a hit nothing more."""
        if self.is_hit:
            return ""
        buffer = self._held + text
        starts = [(start + len(stop), start) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if starts:
            self.is_hit, self._held = True, ""
            return buffer[: min(starts)[1]]
        keep = max((_overlap(buffer, stop) for stop in self._stops), default=0)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """What was held back: the answer ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
