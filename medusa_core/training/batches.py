"""Dataset and collator: one dialogue a row, or several packed into one.

Dialogues in a packed row do not see each other: their positions start over, from which transformers makes a
block-diagonal causal mask (`builders.check_packs` checks that the model at hand does).
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from medusa_core.training.data import NO_TARGET, Example

PADDING = {"input_ids": 0, "labels": NO_TARGET, "position_ids": 0}


class ExampleDataset(Dataset[dict[str, Tensor]]):
    """Rows: `input_ids` [S], `labels` [S] (`NO_TARGET` off the targets); if packed, `position_ids` [S] too.

    With `pack_to` (tokens) a row holds as many dialogues as fit. The packs are the same in every epoch; only
    their order changes.
    """

    def __init__(self, examples: Sequence[Example], *, pack_to: int | None = None) -> None:
        self._examples, self._is_packed = examples, pack_to is not None
        sizes = [len(example.input_ids) for example in examples]
        self._packs = [[i] for i in range(len(sizes))] if pack_to is None else pack(sizes, pack_to)
        self.lengths = [sum(sizes[i] for i in members) for members in self._packs]

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = [_row(self._examples[i], with_positions=self._is_packed) for i in self._packs[index]]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in groups whose sizes add up to at most `capacity`: best fit, largest first."""
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of a group, and which; sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect_left(rooms, (sizes[index], -1))
        if place == len(rooms):
            groups.append([])
            rooms.append((capacity, len(groups) - 1))
        room, group = rooms.pop(place)
        groups[group].append(index)
        insort(rooms, (room - sizes[index], group))
    return groups


@dataclass(slots=True)
class Collator:
    """Makes right-padded batches [B, S] and counts their tokens, padding apart.

    No attention mask: under a causal one no token sees the padding after it.
    """

    tokens: int = 0

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        self.tokens += sum(len(item["input_ids"]) for item in items)
        return {
            name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=PADDING[name])
            for name in items[0]
        }


def _row(example: Example, *, with_positions: bool) -> dict[str, Tensor]:
    ids = example.input_ids.long()
    labels = ids.masked_fill(~example.is_target, NO_TARGET)
    if not with_positions:
        return {"input_ids": ids, "labels": labels}
    # A dialogue's first token is never predicted; as a target it would join the turn before it.
    labels[0] = NO_TARGET
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}
