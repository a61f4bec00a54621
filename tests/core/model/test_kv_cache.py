"""The cache after any commit is the cache of a fresh prefill."""

import random
from collections.abc import Callable

import pytest
import torch

from medusa_core.draft.accuracy import default_calibration
from medusa_core.draft.factory import SpeculatorFactory
from medusa_core.draft.heads import DraftHeads
from medusa_core.engine.step import decode_step, first_state, prefill_chunk
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.conftest import speculate


def rows(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    cache = backbone.new_cache(1, len(ids))
    prefill_chunk(backbone, cache.slots[0], ids)
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
    heads = heads_that_know(kind)
    factory = SpeculatorFactory(heads, default_calibration(4), torch.device("cpu"))
    params = SamplingParams(temperature=temperature, seed=3, speculation=speculate(tree=tree))
    token_ids = torch.arange(tiny_backbone.vocab_size)
    lengths = set()
    for prompt in tiny_prompts[:6]:
        cache = tiny_backbone.new_cache(2, 200, follower=heads.cache_shape)
        slot = cache.slots[1]
        output = prefill_chunk(tiny_backbone, slot, prompt)
        state, root = first_state(output, params, len(prompt), token_ids)
        committed, pending = list(prompt), root
        for _ in range(10):
            result = decode_step(
                tiny_backbone, slot, state, params, factory.speculator(params, 20), token_ids
            )
            committed += [pending, *result.token_ids[:-1]]
            pending, state = result.token_ids[-1], result.state
            lengths.add(len(result.token_ids))
            assert slot.length == len(committed)
            kept = cache.storage_L2BHCD[:, :, 1, :, : slot.length]
            torch.testing.assert_close(kept, rows(tiny_backbone, committed), atol=1e-4, rtol=0)
    assert len(lengths) > 1


def test_commit_moves_any_path(tiny_backbone: Backbone) -> None:
    cache = tiny_backbone.new_cache(1, 64)
    rng = random.Random(0)
    for _ in range(50):
        slot = cache.slots[cache.acquire()]
        start = rng.randrange(20)
        slot.append(start)
        before = cache.storage_L2BHCD.normal_().clone()
        path = [0, *sorted(rng.sample(range(1, 30), rng.randrange(6)))]
        slot.commit(path)
        assert slot.length == start + len(path)
        kept = cache.storage_L2BHCD[:, :, 0, :, : slot.length]
        assert torch.equal(kept[:, :, :, :start], before[:, :, 0, :, :start])
        assert torch.equal(kept[:, :, :, start:], before[:, :, 0, :, [start + node for node in path]])
        cache.release(0)


def test_slots_are_taken_and_given_back(tiny_backbone: Backbone) -> None:
    cache = tiny_backbone.new_cache(3, 8)
    taken = [cache.acquire() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    assert cache.num_free == 0
    cache.slots[1].append(5)
    cache.release(1)
    assert cache.acquire() == 1
    assert cache.slots[1].length == 0


def test_truncate(tiny_backbone: Backbone) -> None:
    slot = tiny_backbone.new_cache(1, 8).slots[0]
    slot.append(5)
    slot.truncate(2)
    assert slot.length == 2
    with pytest.raises(ValueError, match="cannot truncate 2 tokens to 3"):
        slot.truncate(3)
