"""Steps after their verify pass, judged by an accept program and by the eager runner."""

import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree, Origin, stack_rows
from medusa_core.engine.accept_program import AcceptProgram
from medusa_core.engine.batch import Batch, make_batch
from medusa_core.engine.runner import EagerRunner
from medusa_core.engine.sequence import Sequence
from medusa_core.engine.step import RowResult, unpack
from medusa_core.model.backbone import Backbone, BackboneOutput
from medusa_core.model.kv_cache import KVCache
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams

VOCAB = 320
SLOTS, CAPACITY = 4, 100
GREEDY = SamplingParams(temperature=0.0, top_p=0.5)
UNFILTERED = (SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=0.4, seed=4))
FILTERED = (
    SamplingParams(temperature=0.8, seed=5, top_p=0.9),
    SamplingParams(temperature=1.3, seed=6, top_k=20),
    SamplingParams(temperature=1.0, seed=7, min_p=0.05),
    SamplingParams(temperature=1.2, seed=8, top_k=40, min_p=0.02),
    SamplingParams(temperature=0.9, seed=9, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=0.7, seed=1, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.4, seed=2, top_k=40, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=0.9, seed=9, top_p=1.0 - 1e-9),
)
Program = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Rows of a step after their verify pass, and the cache that their keys and values lie in."""

    cache: KVCache
    batch: Batch
    tree: DraftTree
    output: BackboneOutput

    def tensors(self) -> tuple[Tensor, ...]:
        """What the program takes."""
        batch, tree = self.batch, self.tree
        tensors = (
            self.output.logits_BTV,
            tree.tokens_BT,
            tree.depths_BT,
            tree.parents_BT,
            tree.ancestors_BTT,
            tree.origins_BT,
            batch.slots_B,
            batch.lengths_B,
            batch.places_D,
            self.cache.storage_L2BHCD,
        )
        noise_BPV = batch.draft_noise(tree.max_depth)
        if batch.sampling_B4 is None or noise_BPV is None:
            return tensors
        return *tensors, batch.sampling_B4, noise_BPV


def accept_program(backbone: Backbone, *, sampled: bool = True) -> AcceptProgram:
    return AcceptProgram(backbone.verify_facts.cache, VOCAB, torch.float32, sampled=sampled)


def as_tensor(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Compiled programs return tuples."""
    return result if isinstance(result, Tensor) else result[0]


def random_tree(rng: random.Random, size: int, max_depth: int) -> DraftTree:
    """Siblings draft different tokens; one node has the greatest depth."""
    parents, depths = [0], [0]
    for node in range(1, size):
        parent = (
            node - 1 if node <= max_depth else rng.choice([n for n in range(node) if depths[n] < max_depth])
        )
        parents.append(parent)
        depths.append(depths[parent] + 1)
    ancestors = torch.eye(size, dtype=torch.bool)
    for node in range(1, size):
        ancestors[node] |= ancestors[parents[node]]
    tokens = torch.tensor(rng.sample(range(VOCAB), size))
    origins = torch.tensor([Origin.MODEL, *rng.choices([Origin.HEADS, Origin.NGRAM], k=size - 1)])
    rows = (tokens, torch.tensor(depths), torch.tensor(parents), ancestors, origins)
    return DraftTree(*(row[None] for row in rows), max_depth)


def sequence_in(slot: int, length: int, params: SamplingParams) -> Sequence:
    request = Request(request_id="a", prompt_ids=[5] * length, params=params)
    sequence = Sequence(request=request, slot=slot, stop_ids=frozenset(), max_total=200, num_cached=length)
    sequence.token_ids.append(8)
    return sequence


def make_case(
    backbone: Backbone, seed: int, rows: SequenceOf[SamplingParams], dtype: torch.dtype = torch.float32
) -> Case:
    """Random trees, of which the target often finds a draft likely, in slots and lengths of any order."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    depth = rng.randint(1, 5)
    parts = [([row], random_tree(rng, rng.randint(depth + 1, 24), depth)) for row in range(len(rows))]
    tree = stack_rows(parts)
    logits = 2 * torch.randn(len(rows), tree.size, VOCAB, generator=generator)
    for row in range(len(rows)):
        for node in range(1, tree.size):
            logits[row, tree.parents_BT[row, node], tree.tokens_BT[row, node]] += rng.choice([0, 3, 9])
    cache = backbone.new_cache(SLOTS, CAPACITY)
    cache.storage_L2BHCD.copy_(torch.randn(cache.storage_L2BHCD.shape, generator=generator))
    sequences = [
        sequence_in(slot, rng.randint(1, 60), params)
        for slot, params in zip(rng.sample(range(SLOTS), len(rows)), rows, strict=True)
    ]
    batch = make_batch(sequences, [tree.size] * len(rows), depth, torch.arange(VOCAB))
    hidden = torch.zeros(len(rows), tree.size, backbone.hidden_size)
    return Case(cache, batch, tree, BackboneOutput(hidden, logits.to(dtype)))


def read_packed(packed: Tensor, case: Case) -> list[tuple[RowResult, bool]]:
    """What the program's result says of each row, and whether it is undecided."""
    width, results = case.tree.max_depth + 1, []
    for row in packed.tolist():
        *decided, undecided = row
        results.append((unpack(decided, width), bool(undecided)))
    return results


def check_step(program: Program, case: Case, backbone: Backbone) -> list[bool]:
    """Run both on the same keys and values; returns which rows are undecided."""
    storage = case.cache.storage_L2BHCD
    before = storage.clone()
    results = read_packed(as_tensor(program(*case.tensors())), case)
    moved = storage.clone()
    storage.copy_(before)
    runner = EagerRunner(backbone, case.cache)
    width = case.tree.max_depth + 1
    expected = [unpack(row, width) for row in runner.accept(case.batch, case.tree, case.output)]
    undecided = [flag for _, flag in results]
    assert [row for row, flag in results if not flag] == [
        row for row, flag in zip(expected, undecided, strict=True) if not flag
    ]
    assert torch.equal(moved, before if any(undecided) else storage)
    return undecided


def rows_of(size: int, seed: int) -> list[SamplingParams]:
    """Rows of every kind, greedy ones among them."""
    rng = random.Random(seed)
    return [rng.choice([GREEDY, *UNFILTERED, *FILTERED]) for _ in range(size)]
