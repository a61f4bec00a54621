"""The accept program against the eager runner: the same rows decided, the same keys and values moved."""

import pytest
import torch

from medusa_core.engine.accept_program import AcceptProgram
from medusa_core.engine.logits_processors import LogitsChain, surely_kept, without_excluded
from medusa_core.engine.noise_program import NoiseProgram
from medusa_core.engine.sampling import draw_tokens, gumbel_noise, noise_keys
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.accepting import (
    FILTERED,
    GREEDY,
    UNFILTERED,
    VOCAB,
    accept_program,
    check_step,
    make_case,
    read_packed,
    rows_of,
)
from tests.core.conftest import speculate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_decides_what_the_eager_runner_decides(
    tiny_backbone: Backbone, rows: int, dtype: torch.dtype
) -> None:
    program, flags = accept_program(tiny_backbone), []
    with torch.inference_mode():
        for seed in range(120):
            case = make_case(tiny_backbone, seed, rows_of(rows, seed), dtype)
            flags += check_step(program, case, tiny_backbone)
    assert 0 < sum(flags) < 0.05 * len(flags)


@pytest.mark.parametrize("params", [GREEDY, *UNFILTERED], ids=str)
@torch.inference_mode()
def test_without_filters_it_always_decides(tiny_backbone: Backbone, params: SamplingParams) -> None:
    for seed in range(20):
        case = make_case(tiny_backbone, seed, [params] * 2)
        assert check_step(accept_program(tiny_backbone), case, tiny_backbone) == [False, False]


@torch.inference_mode()
def test_the_first_of_equally_likely_tokens_is_greedy(tiny_backbone: Backbone) -> None:
    case = make_case(tiny_backbone, 1, [GREEDY])
    case.output.logits_BTV.round_()
    case.output.logits_BTV[..., [50, 70]] = 30.0
    assert check_step(accept_program(tiny_backbone), case, tiny_backbone) == [False]
    [(result, _)] = read_packed(accept_program(tiny_backbone)(*case.tensors()), case)
    assert result.token_ids[-1] == 50


@torch.inference_mode()
def test_one_undecided_row_keeps_every_row_in_its_place(tiny_backbone: Backbone) -> None:
    """So the whole step can be run again."""
    strict = SamplingParams(temperature=1.5, seed=1, top_p=1e-3)
    seen = set()
    for seed in range(10):
        case = make_case(tiny_backbone, seed, [GREEDY, strict, UNFILTERED[0]])
        undecided = check_step(accept_program(tiny_backbone), case, tiny_backbone)
        assert (undecided[0], undecided[2]) == (False, False)
        seen.add(undecided[1])
    assert True in seen


@torch.inference_mode()
def test_no_value_is_looked_at(tiny_backbone: Backbone) -> None:
    case = make_case(tiny_backbone, 1, [GREEDY, *FILTERED[:2]])
    packed = accept_program(tiny_backbone)(*(tensor.to("meta") for tensor in case.tensors()))
    assert packed.shape == (3, 3 * (case.tree.max_depth + 1) + 2 + case.tree.size + 1)


def test_what_it_can_take() -> None:
    typical = speculate("typical")
    for params in (GREEDY, *UNFILTERED, *FILTERED, SamplingParams(temperature=0.0, speculation=typical)):
        assert AcceptProgram.can_take(params)
    assert not AcceptProgram.can_take(SamplingParams(speculation=typical))


@pytest.mark.parametrize("params", FILTERED, ids=str)
def test_tokens_that_are_surely_kept_are_what_the_filters_keep(
    tiny_backbone: Backbone, params: SamplingParams
) -> None:
    """Of tokens drawn at a higher temperature, none that a filter excludes; nearly all of those it keeps."""
    logits = 3 * torch.randn(300, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[:50] = logits[:50].round()  # ties
    batch = make_case(tiny_backbone, 1, [params]).batch
    assert batch.sampling_B4 is not None
    tokens = draw_tokens(logits, 2 * params.temperature, gumbel_noise(4, range(300), torch.arange(VOCAB)))
    sure = surely_kept(logits[None], tokens[None], batch.sampling_B4)[0]
    kept = logits
    for logits_filter in LogitsChain.of(params).filters:
        kept = logits_filter.process(kept, None)  # type: ignore[arg-type]
    kept_N = kept.gather(1, tokens[:, None])[:, 0] > -torch.inf
    assert not (sure & ~kept_N).any()
    assert (kept_N & ~sure).sum() < 15
    assert sure.sum() > 50
    left = without_excluded(logits[None], batch.sampling_B4)[0]
    assert torch.equal(torch.maximum(left, kept), left)
    assert torch.equal(left[left > -torch.inf], logits[left > -torch.inf])
    assert (left > -torch.inf).sum() < 1.3 * (kept > -torch.inf).sum()


def test_noise_program() -> None:
    keys = torch.tensor([noise_keys(2**64 - 1, range(5, 9)), noise_keys(3, range(4))])
    vocabulary = torch.arange(VOCAB)
    noise = NoiseProgram(vocabulary)(keys)
    assert noise.shape == (2, 4, VOCAB)
    assert torch.equal(noise[0], gumbel_noise(2**64 - 1, range(5, 9), vocabulary))
