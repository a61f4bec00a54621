"""The keyed draw follows the target distribution; filters keep exactly what they promise."""

import pytest
import torch
from scipy import stats

from medusa_core.draft.draft_tree import root_tree
from medusa_core.engine.logits_processors import LogitsChain, NodePaths
from medusa_core.engine.sampling import draw_tokens, gumbel_noise
from medusa_core.sampling_params import SamplingParams

VOCAB = 12
NO_PATHS = NodePaths((), root_tree(torch.tensor([0])), 0)  # filters do not look at them


def process_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return LogitsChain.of(params).process(logits, NO_PATHS)


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 0.2, 1.2, -2.0, 0.7, 0.1])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=0.9, min_p=0.15, top_p=0.95),
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_target_distribution(params: SamplingParams, vary: str) -> None:
    """Chi-square over 20,000 draws; the draws are fixed by their seeds, so this cannot flicker."""
    draws, ids = 20_000, torch.arange(VOCAB)
    processed = process_logits(LOGITS[None], params)
    if vary == "position":
        noise = gumbel_noise(123, range(draws), ids)
    else:
        noise = torch.cat([gumbel_noise(seed, [7], ids) for seed in range(draws)])
    tokens = draw_tokens(processed.expand(draws, -1), params.temperature, noise)
    observed = torch.bincount(tokens, minlength=VOCAB).double()
    expected = (processed[0].double() / params.temperature).softmax(0) * draws
    kept = expected > 0
    assert observed[~kept].sum() == 0
    p_value = stats.chisquare(
        observed[kept].numpy(), expected[kept].numpy() * (observed.sum() / expected.sum()).item()
    ).pvalue
    assert p_value > 1e-3


def test_noise_depends_on_nothing_but_seed_position_and_token() -> None:
    whole = gumbel_noise(2**64 - 1, range(50, 60), torch.arange(5000))
    subset = torch.tensor([4999, 0, 17])
    assert torch.equal(gumbel_noise(2**64 - 1, [53], subset)[0], whole[3, subset])
    assert not torch.equal(gumbel_noise(2**64 - 2, [53], subset)[0], whole[3, subset])
    assert torch.isfinite(whole).all()


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    noise = gumbel_noise(1, range(400), torch.arange(500)).double()
    assert stats.kstest(noise.flatten()[:20_000].numpy(), "gumbel_r").pvalue > 1e-3
    assert abs(noise.mean().item() - 0.5772) < 0.01
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 0.01


def naive_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> set[int]:
    probs = (logits / temperature).softmax(0)
    kept, mass = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t].item()):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probs[token].item()
    return kept


@pytest.mark.parametrize("vocab", [12, 128, 129, 900])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999])
def test_top_p_equals_a_naive_reference(vocab: int, top_p: float) -> None:
    """Sizes on both sides of the prefix that is looked at before sorting everything."""
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    params = SamplingParams(temperature=0.9, top_p=top_p)
    processed = process_logits(logits, params)
    for row, out in zip(logits, processed, strict=True):
        assert set(torch.nonzero(out > -torch.inf).flatten().tolist()) == naive_top_p(row, 0.9, top_p)


def test_filters_judge_at_the_temperature_and_keep_ties() -> None:
    tied = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert (process_logits(tied, SamplingParams(top_k=2)) > -torch.inf).sum() == 3
    spread = torch.tensor([[2.0, 0.0]])
    cold = process_logits(spread, SamplingParams(temperature=0.5, min_p=0.1))
    hot = process_logits(spread, SamplingParams(temperature=2.0, min_p=0.1))
    assert (cold > -torch.inf).sum() == 1
    assert (hot > -torch.inf).sum() == 2


def test_greedy_ignores_filters_and_seed() -> None:
    params = SamplingParams(temperature=0.0, top_p=0.1, top_k=1, seed=5)
    assert draw_tokens(process_logits(LOGITS[None], params), 0.0, None).tolist() == [0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, top_p=0.6),
        SamplingParams(temperature=1.5, top_p=0.95, min_p=0.05),
        SamplingParams(temperature=0.5, min_p=0.3),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=1.0, top_k=7, top_p=0.7),
        SamplingParams(temperature=1.2, top_k=40, min_p=0.05),
        SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_deciding_first_equals_filtering_first(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(400, 200, generator=generator)
    logits[:50] = logits[:50].round()  # ties
    noise = gumbel_noise(8, range(400), torch.arange(200))
    slow = draw_tokens(process_logits(logits, params), params.temperature, noise)
    assert torch.equal(LogitsChain.of(params).decide(logits, NO_PATHS, noise), slow)
    assert params.is_greedy or (slow != draw_tokens(logits, params.temperature, noise)).any()
