"""Several sequences in one step: each decides what it decides alone, whatever stands beside it."""

import random
from collections.abc import Callable

import pytest
import torch

from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.sources import build_sources
from medusa_core.engine.batch import make_batch
from medusa_core.engine.sampling import gumbel_noise
from medusa_core.engine.sequence import Sequence
from medusa_core.model.backbone import Backbone
from medusa_core.request import Request
from medusa_core.sampling_params import DraftSourceName, SamplingParams
from tests.core.conftest import speculate
from tests.core.stepping import Stepper, head_source

CPU = torch.device("cpu")
# Greedy, sampled, filtered, typical, of another tree, without drafts: row by row in one batch.
ROWS = (
    (SamplingParams(temperature=0.0), 12),
    (SamplingParams(temperature=0.8, seed=5), 12),
    (SamplingParams(temperature=1.1, seed=6, top_p=0.8, top_k=30), 7),
    (SamplingParams(temperature=0.9, seed=7, speculation=speculate("typical")), 12),
    (SamplingParams(temperature=0.0, speculation=speculate(tree="mc_sim_7b_63")), 64),
    (SamplingParams(temperature=0.7, seed=8), 1),
)


def sources_of(heads: DraftHeads, slots: int) -> dict[DraftSourceName, object]:
    source = head_source(heads, slots=slots, capacity=300)
    return dict(build_sources(source))


@pytest.mark.parametrize("source", list(DraftSourceName))
@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_rows_decide_what_they_decide_alone(
    tiny_backbone: Backbone,
    heads_that_know: Callable[[str], DraftHeads],
    tiny_prompts: list[list[int]],
    kind: str,
    source: DraftSourceName,
) -> None:
    """Token for token, with random company in every step and slots in any order."""
    rows = [row for row in ROWS if source is DraftSourceName.HEADS or row[0].speculation.tree == "dynamic"]
    # Prompts that repeat themselves, so that n-grams find something.
    prompts = [prompt + prompt for prompt in tiny_prompts[: len(rows)]]
    heads, expected = heads_that_know(kind), []
    for prompt, (params, nodes) in zip(prompts, rows, strict=True):
        alone = Stepper(tiny_backbone, tiny_backbone.new_cache(1, 300), sources_of(heads, 1)[source])  # type: ignore[arg-type]
        sequence = alone.start(prompt, params)
        while len(sequence.token_ids) < len(prompt) + 30:
            alone.step([sequence], [nodes])
        expected.append(sequence.token_ids[: len(prompt) + 30])
    together = Stepper(
        tiny_backbone,
        tiny_backbone.new_cache(len(rows), 300),
        sources_of(heads, len(rows))[source],  # type: ignore[arg-type]
    )
    rng = random.Random(1)
    slots = rng.sample(range(len(rows)), len(rows))
    running = [
        (together.start(prompt, params, slot), nodes)
        for prompt, (params, nodes), slot in zip(prompts, rows, slots, strict=True)
    ]
    left = list(running)
    while left:
        company = rng.sample(left, rng.randint(1, len(left)))
        together.step([sequence for sequence, _ in company], [nodes for _, nodes in company])
        left = [(s, n) for s, n in left if len(s.token_ids) < len(s.request.prompt_ids) + 30]
    got = [s.token_ids[: len(s.request.prompt_ids) + 30] for s, _ in running]
    assert got == expected


def sequence_of(params: SamplingParams, tokens: list[int], slot: int) -> Sequence:
    request = Request(request_id="a", prompt_ids=tokens[:-1], params=params)
    sequence = Sequence(request=request, slot=slot, stop_ids=frozenset(), max_total=100)
    sequence.token_ids.append(tokens[-1])
    sequence.num_cached = len(tokens) - 1
    return sequence


def test_a_batch_holds_each_rows_own() -> None:
    vocabulary = torch.arange(50)
    warm, greedy = SamplingParams(temperature=0.5, seed=9), SamplingParams(temperature=0.0, seed=9)
    rows = [sequence_of(warm, [5, 6, 7], 4), sequence_of(greedy, [8, 9], 2)]
    batch = make_batch(rows, [12, 1], 3, vocabulary)
    assert (batch.slots, batch.nodes, batch.params) == ((4, 2), (12, 1), (warm, greedy))
    assert batch.slots_B.tolist() == [4, 2]
    assert batch.lengths_B.tolist() == [2, 1]
    assert batch.roots_B.tolist() == [7, 9]
    assert batch.places_D.tolist() == [0, 1, 2, 3]
    assert batch.sampling_B4 is not None
    assert batch.sampling_B4.tolist() == [[0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    # The root stands at position 2; what comes next at 3. Drawn as far as it is asked for.
    for depth in (1, 3, 0):
        noise = batch.draft_noise(depth)
        assert noise is not None
        assert noise.shape == (2, depth + 1, 50)
        assert torch.equal(noise[0], gumbel_noise(9, range(3, 4 + depth), vocabulary))
    without = make_batch(rows[1:], [1], 3, vocabulary)
    assert without.draft_noise(3) is None
    assert without.sampling_B4 is None
    assert batch.with_nodes((2, 3)).nodes == (2, 3)


def test_a_batch_holds_each_rows_filters() -> None:
    """As float32, in which a top_p of nearly 1 must not become 1: that is off."""
    params = [
        SamplingParams(temperature=0.5, seed=1, top_k=40, min_p=0.25),
        SamplingParams(temperature=2.0, seed=1, top_p=0.5),
        SamplingParams(temperature=2.0, seed=1, top_p=1 - 1e-12),
        SamplingParams(temperature=0.0, top_k=40, top_p=0.5, min_p=0.25),
    ]
    rows = [sequence_of(row, [5, 6], slot) for slot, row in enumerate(params)]
    batch = make_batch(rows, [1] * 4, 2, torch.arange(50))
    assert batch.sampling_B4 is not None
    first, second, third, greedy = batch.sampling_B4.tolist()
    assert (first, second) == ([0.5, 40.0, 1.0, 0.25], [2.0, 0.0, 0.5, 0.0])
    assert 0.999 < third[2] < 1.0
    assert greedy == [0.0, 0.0, 1.0, 0.0]
