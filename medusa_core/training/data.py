"""Turns dialogues into token ids with the assistant's tokens marked as targets.

Assistant tokens are found by rendering prefixes with the chat template, so any template works:
a turn is what the template adds to its own generation prompt, up to and including the end-of-turn token.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from medusa_core.errors import DataError, TokenizerError
from medusa_core.text.rows import BadRows, Messages, read_dialogue, read_rows
from medusa_core.text.tokenizer import ChatTokenizer

NO_TARGET = -100  # transformers counts other labels to average the loss over accumulated batches
ENCODE_BATCH = 1024

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Rendered:
    """Chat text with the character spans of its assistant turns."""

    text: str
    turns: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids [S] (int32) and which are targets [S] (bool): an assistant's, end of turn included."""

    input_ids: Tensor
    is_target: Tensor


def load_examples(
    sources: Sequence[str | Path], chat: ChatTokenizer, *, sequence_length: int, strict: bool = False
) -> list[Example]:
    """All usable dialogues of files and Hub data sets, in order.

    Raises `DataError` if a source cannot be read or no dialogue is usable.
    """
    bad = BadRows(strict)
    examples: list[Example] = []
    rows = _rendered_rows(sources, chat, bad)
    while rendered := list(islice(rows, ENCODE_BATCH)):
        examples += _encode(rendered, chat, sequence_length)
    if bad.count:
        logger.warning("%d rows skipped", bad.count)
    if not examples:
        raise DataError(f"no usable dialogue in {', '.join(map(str, sources))}")
    return examples


def split_examples(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out): at least one is held out unless `fraction` is 0, and one is kept to train on."""
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1) if fraction else 0
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def render_turns(messages: Messages, chat: ChatTokenizer) -> list[Rendered]:
    """The dialogue in the chat template's format, assistant turns marked.

    One text for most templates. A template that rewrites earlier turns (say, drops their reasoning) gives a
    text for each state the dialogue was in when the assistant spoke. Raises `TokenizerError` if the
    template refuses it, `DataError` if it renders turns otherwise than it prompts for them.
    """
    texts: list[Rendered] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:  # opening words answer nothing, and have no prompt
            continue
        prompt = chat.render_text(messages[:index])
        full = chat.render_text(messages[: index + 1], add_generation_prompt=False)
        if not full.startswith(prompt):
            raise DataError("the chat template's generation prompt is not how it renders an assistant turn")
        if not texts or not prompt.startswith(texts[-1].text):
            texts.append(Rendered(full))
        texts[-1].text = full
        texts[-1].turns.append((len(prompt), len(full)))
    return texts


def _rendered_rows(sources: Iterable[str | Path], chat: ChatTokenizer, bad: BadRows) -> Iterator[Rendered]:
    for row in (row for source in sources for row in read_rows(source)):
        try:
            yield from render_turns(read_dialogue(row.content), chat)
        except (DataError, TokenizerError) as error:
            bad.add(row.place, error)


def _encode(texts: Sequence[Rendered], chat: ChatTokenizer, sequence_length: int) -> Iterator[Example]:
    """Examples with a token that a head drafts: two targets in a row, the second at index 2 or later."""
    encodings = chat.tokenizer.backend_tokenizer.encode_batch(
        [rendered.text for rendered in texts], add_special_tokens=False
    )
    for rendered, encoding in zip(texts, encodings, strict=True):
        ids = encoding.ids[:sequence_length]
        starts = [start for start, _ in encoding.offsets[:sequence_length]]
        is_target = torch.zeros(len(ids), dtype=torch.bool)
        for turn in rendered.turns:
            is_target[_turn_tokens(turn, ids, starts, chat.eos_token_ids)] = True
        if (is_target[2:] & is_target[1:-1]).any():
            yield Example(torch.tensor(ids, dtype=torch.int32), is_target)


def _turn_tokens(turn: tuple[int, int], ids: list[int], starts: list[int], eos: frozenset[int]) -> slice:
    """The tokens that begin inside the turn, up to its last end-of-turn token if it has one.

    What a template writes after that (a line break, say) the model never has to generate.
    """
    begin, end = bisect_left(starts, turn[0]), bisect_left(starts, turn[1])
    ends = [index for index in range(begin, end) if ids[index] in eos]
    return slice(begin, ends[-1] + 1 if ends else end)
