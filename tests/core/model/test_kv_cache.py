"""The cache after any commit is the cache of a fresh prefill; rows of a batch keep to themselves."""

import random
from collections.abc import Callable

import pytest
import torch

from medusa_core.draft.heads import DraftHeads
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.conftest import speculate
from tests.core.stepping import Stepper, head_source

CPU = torch.device("cpu")


def fresh(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    cache = backbone.new_cache(1, len(ids))
    backbone.prefill(ids, cache.rows((0,)))
    return cache.storage_L2BHCD[:, :, 0]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
@pytest.mark.parametrize("tree", ["dynamic", "static", "mc_sim_7b_63"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_commit_equals_a_fresh_prefill(
    tiny_backbone: Backbone,
    heads_that_know: Callable[[str], DraftHeads],
    tiny_prompts: list[list[int]],
    kind: str,
    tree: str,
    temperature: float,
) -> None:
    source = head_source(heads_that_know(kind), slots=2, capacity=200)
    params = SamplingParams(temperature=temperature, seed=3, speculation=speculate(tree=tree))
    lengths = set()
    for prompt in tiny_prompts[:6]:
        cache = tiny_backbone.new_cache(2, 200)
        stepper = Stepper(tiny_backbone, cache, source)
        sequence = stepper.start(prompt, params, slot=1)
        for _ in range(10):
            result = stepper.step([sequence], [20])
            lengths.add(len(result.rows[0].token_ids))
            committed = sequence.token_ids[:-1]
            assert cache.lengths == [0, len(committed)]
            kept = cache.storage_L2BHCD[:, :, 1, :, : len(committed)]
            torch.testing.assert_close(kept, fresh(tiny_backbone, committed), atol=1e-4, rtol=0)
    assert len(lengths) > 1


def test_any_paths_of_any_rows_are_kept(tiny_backbone: Backbone) -> None:
    """Rows of different lengths at once, in any order of slots; other slots stay as they are."""
    cache = tiny_backbone.new_cache(3, 64)
    rng = random.Random(0)
    for _ in range(50):
        slots = rng.sample(range(3), 2)
        depth = rng.randrange(1, 7)
        paths = [[0, *sorted(rng.sample(range(1, 30), depth))] for _ in slots]
        starts = [rng.randrange(20) for _ in slots]
        before = cache.storage_L2BHCD.normal_().clone()
        cache.keep(torch.tensor(slots), torch.tensor(starts), torch.tensor(paths))
        for slot, start, path in zip(slots, starts, paths, strict=True):
            kept = cache.storage_L2BHCD[:, :, slot]
            assert torch.equal(kept[:, :, :, :start], before[:, :, slot, :, :start])
            moved = before[:, :, slot, :, [start + node for node in path]]
            assert torch.equal(kept[:, :, :, start : start + len(path)], moved)
            behind = start + len(path)
            assert torch.equal(kept[:, :, :, behind:], before[:, :, slot, :, behind:])
        [other] = {0, 1, 2} - set(slots)
        assert torch.equal(cache.storage_L2BHCD[:, :, other], before[:, :, other])


def test_slots_are_taken_and_given_back(tiny_backbone: Backbone) -> None:
    cache = tiny_backbone.new_cache(3, 8)
    taken = [cache.acquire([5, 6]) for _ in range(3)]
    assert sorted(taken) == [(0, 0), (1, 0), (2, 0)]  # nothing of a prompt is cached yet
    assert cache.num_free == 0
    cache.advance(1, 5)
    cache.release(1)
    assert cache.acquire([5, 6]) == (1, 0)
    assert cache.lengths[1] == 0


def test_truncate(tiny_backbone: Backbone) -> None:
    cache = tiny_backbone.new_cache(1, 8)
    cache.advance(0, 5)
    cache.truncate(0, 2)
    assert cache.lengths == [2]
    with pytest.raises(ValueError, match="cannot truncate 2 tokens to 3"):
        cache.truncate(0, 3)
