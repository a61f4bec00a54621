"""Chat rows into token ids with assistant tokens marked, and batches of them.

A row is a JSON object with `messages` (role, content) or ShareGPT's `conversations` (from, value). What
counts as an assistant token is read off the chat template by rendering prefixes, so any template works: a
turn is what the template adds to its own generation prompt, up to and including the end-of-turn token.
"""

import gzip
import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medusa_core.errors import DataError
from medusa_core.tokenizer import TEMPLATE_FAILURES, ChatTokenizer

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
NO_TARGET = -100  # transformers counts other labels to average the loss over accumulated batches
REPORTED_ROWS = 20
ENCODE_BATCH = 1024

Messages = list[dict[str, str]]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class BadRows:
    """Counts rows that cannot be used; logs the first of them, or raises with `strict`."""

    strict: bool
    count: int = 0

    def add(self, place: str, reason: str) -> None:
        if self.strict:
            raise DataError(f"{place}: {reason}")
        self.count += 1
        if self.count <= REPORTED_ROWS:
            log.warning("%s skipped: %s", place, reason)


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


class ExampleDataset(Dataset[dict[str, Tensor]]):
    """Examples as the Trainer wants them: `input_ids` [S] and `labels` [S], `NO_TARGET` off the targets."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.input_ids) for example in self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self._examples[index]
        ids = example.input_ids.long()
        return {"input_ids": ids, "labels": ids.masked_fill(~example.is_target, NO_TARGET)}


@dataclass(slots=True)
class Collator:
    """Makes right-padded batches [B, S] and counts their tokens, padding apart.

    No attention mask: under a causal one no token sees the padding behind it.
    """

    tokens: int = 0

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        self.tokens += sum(len(item["input_ids"]) for item in items)
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([item["input_ids"] for item in items], batch_first=True, padding_value=0),
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=NO_TARGET),
        }


def load_examples(
    paths: Iterable[Path], chat: ChatTokenizer, *, sequence_length: int, strict: bool = False
) -> list[Example]:
    """All usable dialogues of the files, in order; `DataError` if a file cannot be read or none is usable."""
    bad = BadRows(strict)
    examples: list[Example] = []
    rows = _rendered_rows(paths, chat, bad)
    while rendered := list(islice(rows, ENCODE_BATCH)):
        examples += _encode(rendered, chat, sequence_length)
    if bad.count:
        log.warning("%d rows skipped", bad.count)
    if not examples:
        raise DataError(f"no usable dialogue in {', '.join(map(str, paths))}")
    return examples


def split_examples(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out): at least one is held out unless `fraction` is 0, and one is kept to train on."""
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1) if fraction else 0
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def parse_row(line: str) -> Messages:
    """Messages of one JSONL line. Raises `DataError` with what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    if "messages" in row:
        messages = _read_messages(row["messages"], "role", "content", None)
    elif "conversations" in row:
        messages = _read_messages(row["conversations"], "from", "value", SHAREGPT_ROLES)
    else:
        raise DataError("neither messages nor conversations")
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise DataError("no assistant message that answers another")
    return messages


def render_turns(messages: Messages, chat: ChatTokenizer) -> list[Rendered]:
    """The dialogue in the chat template's format, assistant turns marked.

    One text for most templates. A template that rewrites earlier turns (say, drops their reasoning) gives a
    text for each state the dialogue was in when the assistant spoke. Raises `DataError` if the template
    refuses it.
    """
    texts: list[Rendered] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:  # opening words answer nothing, and have no prompt
            continue
        prompt = _apply_template(chat, messages[:index], add_generation_prompt=True)
        full = _apply_template(chat, messages[: index + 1], add_generation_prompt=False)
        if not full.startswith(prompt):
            raise DataError("the chat template's generation prompt is not how it renders an assistant turn")
        if not texts or not prompt.startswith(texts[-1].text):
            texts.append(Rendered(full))
        texts[-1].text = full
        texts[-1].turns.append((len(prompt), len(full)))
    return texts


def _apply_template(chat: ChatTokenizer, messages: Messages, *, add_generation_prompt: bool) -> str:
    try:
        text = chat.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TEMPLATE_FAILURES as error:
        raise DataError(f"the chat template refuses it: {error}") from error
    return str(text)


def _read_messages(value: Any, role_key: str, text_key: str, roles: Mapping[str, str] | None) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError("messages are no list, or an empty one")
    messages = []
    for number, item in enumerate(value, start=1):
        role = item.get(role_key) if isinstance(item, dict) else None
        text = item.get(text_key) if isinstance(item, dict) else None
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataError(f"message {number} lacks a string {role_key} or {text_key}")
        if roles is not None and role not in roles:
            raise DataError(f"message {number} is from {role!r}, not one of {', '.join(roles)}")
        messages.append({"role": roles[role] if roles else role, "content": text})
    return messages


def _rendered_rows(paths: Iterable[Path], chat: ChatTokenizer, bad: BadRows) -> Iterator[Rendered]:
    for place, line in _lines(paths):
        try:
            texts = render_turns(parse_row(line), chat)
            for rendered in texts:
                rendered.text.encode()
        except (DataError, UnicodeEncodeError) as error:
            bad.add(place, str(error))
        else:
            yield from texts


def _lines(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(file:line, text) of every line that is not blank."""
    for path in paths:
        try:
            with _open_text(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", line
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


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
