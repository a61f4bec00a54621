"""Drafts from n-grams of the sequence so far: what followed the last tokens when they stood there before.

Needs no heads. Prompt lookup (Saxena 2023) as a tree: every earlier place with the same last tokens votes for
what comes next, and the likeliest paths are drafted. All of it is host work on committed token ids.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree, Origin, root_tree, stack_rows
from medusa_core.draft.source import Committed, DraftBatch
from medusa_core.errors import TreeError
from medusa_core.sampling_params import SpeculationParams

MAX_PLACES = 16  # earlier occurrences that vote, the latest
MAX_DEPTH = 16
# A match of so many last tokens foretells the next one this often, as long as nothing better is known.
FIRST_RATES = {2: 0.3, 3: 0.45, 4: 0.6, 5: 0.7}
MIN_MATCH, MAX_MATCH = min(FIRST_RATES), max(FIRST_RATES)
PRIOR_WEIGHT = 3.0  # observations that what is known of other sequences counts for
OWN_DECAY, SHARED_DECAY = 0.9, 0.99  # of a rate's observations at each further one
# A wrong draft costs a part of a step, a right one saves a whole one.
LEAST_RATE = 0.45  # of the first draft being right, below which nothing is drafted
LEAST_VALUE = 0.1  # of a path being right, below which it is not worth its row


@dataclass(slots=True)
class HitRate:
    """How often drafts from matches of one length were right, lately."""

    hits: float = 0.0
    trials: float = 0.0

    def add(self, hit: bool, decay: float) -> None:
        self.hits = decay * self.hits + hit
        self.trials = decay * self.trials + 1.0

    def mean(self, prior: float) -> float:
        return (self.hits + PRIOR_WEIGHT * prior) / (self.trials + PRIOR_WEIGHT)


@dataclass(frozen=True, slots=True)
class Match:
    """`length` last tokens stood elsewhere before: `places` come after those, `draft` is their best guess."""

    length: int
    places: list[int]
    draft: int


@dataclass(slots=True)
class SequenceMemory:
    """One sequence: its tokens with the root last, and what followed each n-gram of it."""

    tokens: list[int] = field(default_factory=list)
    has_root: bool = False
    match: Match | None = None
    rates: dict[int, HitRate] = field(default_factory=lambda: defaultdict(HitRate))
    _places: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens; each n-gram in front of one remembers its place."""
        for token in token_ids:
            place = len(self.tokens)
            for length in range(MIN_MATCH, min(MAX_MATCH, place) + 1):
                self._places[tuple(self.tokens[place - length :])].append(place)
            self.tokens.append(token)

    def find(self) -> Match | None:
        """The longest match of the last tokens."""
        for length in range(min(MAX_MATCH, len(self.tokens)), MIN_MATCH - 1, -1):
            places = self._places.get(tuple(self.tokens[-length:]))
            if places:
                places = places[-MAX_PLACES:]
                return Match(length, places, grow(self.tokens, places, 2, 1.0)[0].token)
        return None


@dataclass(frozen=True, slots=True)
class Draft:
    """A node below the root: its parent is an index among all nodes, the root 0."""

    token: int
    parent: int
    depth: int


def grow(tokens: Sequence[int], places: Sequence[int], nodes: int, rate: float) -> list[Draft]:
    """The likeliest drafts of a tree of at most `nodes`, root included; parents before their children.

    `places` in `tokens` vote for the token that stands there, those that agree for the one after it, and so
    on; each level is right at the given rate.
    """
    drafts: list[Draft] = []
    # (-value, serial, draft, places after it): of equal values the one found first.
    heap: list[tuple[float, int, Draft, list[int]]] = []
    serial = count()

    def offer(value: float, parent: int, depth: int, voters: Sequence[int]) -> None:
        votes: dict[int, list[int]] = {}
        for place in sorted(voters, reverse=True):  # of equal votes the latest place first
            if place < len(tokens):
                votes.setdefault(tokens[place], []).append(place + 1)
        for token, after in votes.items():
            share = value * rate * len(after) / len(voters)
            if share >= LEAST_VALUE or not drafts:
                heapq.heappush(heap, (-share, next(serial), Draft(token, parent, depth), after))

    offer(1.0, 0, 1, places)
    while heap and len(drafts) < nodes - 1:
        negative, _, draft, after = heapq.heappop(heap)
        drafts.append(draft)
        if draft.depth < MAX_DEPTH:
            offer(-negative, len(drafts), draft.depth + 1, after)
    return drafts


def as_tree(found: Sequence[Sequence[Draft]], roots_B: Tensor) -> DraftTree:
    """The drafts of each row below its root."""
    return stack_rows([([row], _row(drafts, roots_B[row : row + 1])) for row, drafts in enumerate(found)])


def _row(drafts: Sequence[Draft], roots_B: Tensor) -> DraftTree:
    if not drafts:
        return root_tree(roots_B)
    size, device = len(drafts) + 1, roots_B.device
    ancestors = [[True, *[False] * (size - 1)]]
    for node, draft in enumerate(drafts, start=1):
        row = list(ancestors[draft.parent])
        row[node] = True
        ancestors.append(row)
    columns = [
        [0, 0, 0, int(Origin.MODEL)],
        *([d.token, d.depth, d.parent, int(Origin.NGRAM)] for d in drafts),
    ]
    tokens_1T, depths_1T, parents_1T, origins_1T = torch.tensor(columns, device=device).T[:, None]
    return DraftTree(
        torch.cat([roots_B[:, None], tokens_1T[:, 1:]], dim=1),
        depths_1T,
        parents_1T,
        torch.tensor(ancestors, device=device)[None],
        origins_1T,
        max(draft.depth for draft in drafts),
    )


class NgramSource:
    """Remembers every sequence's tokens, and how well their repetitions foretold what came.

    A forecast is judged whether or not it was drafted: where a sequence does not repeat itself nothing is
    drafted, at the price of a look-up, and where it begins to, drafts follow within a few tokens.
    """

    def __init__(self) -> None:
        self._memories: dict[int, SequenceMemory] = {}
        self._rates: dict[int, HitRate] = defaultdict(HitRate)  # of all sequences, by length of the match

    def check(self, speculation: SpeculationParams) -> None:
        if speculation.tree != "dynamic":
            raise TreeError(
                f"draft tree {speculation.tree!r} is filled by heads alone: with source "
                f"'{speculation.source}' leave the tree at 'dynamic'"
            )

    def is_adaptive(self, speculation: SpeculationParams) -> bool:
        return True

    def max_depth(self, speculation: SpeculationParams, nodes: int) -> int:
        return min(MAX_DEPTH, nodes - 1)

    def start(self, slot: int) -> None:
        self._memories[slot] = SequenceMemory()

    def observe(self, committed: Committed) -> None:
        memory = self._memories[committed.slot]
        new = list(committed.token_ids)
        if memory.has_root:
            del new[0]  # the root of the step before
        if committed.root is not None:
            new.append(committed.root)
            memory.has_root = True
        if memory.match is not None:
            hit = memory.match.draft == new[0]
            memory.rates[memory.match.length].add(hit, OWN_DECAY)
            self._rates[memory.match.length].add(hit, SHARED_DECAY)
        memory.extend(new)
        memory.match = memory.find() if memory.has_root else None

    def drafts(self, slot: int, nodes: int) -> list[Draft]:
        """What is worth drafting for a sequence, of at most `nodes` with the root."""
        memory = self._memories[slot]
        if memory.match is None or nodes <= 1:
            return []
        length = memory.match.length
        rate = memory.rates[length].mean(self._rates[length].mean(FIRST_RATES[length]))
        return [] if rate < LEAST_RATE else grow(memory.tokens, memory.match.places, nodes, rate)

    def propose(self, batch: DraftBatch) -> DraftTree:
        found = [self.drafts(slot, nodes) for slot, nodes in zip(batch.slots, batch.nodes, strict=True)]
        return as_tree(found, batch.roots_B)
