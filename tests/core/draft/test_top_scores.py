"""The best of many scores, against a plain selection."""

import math

import pytest
import torch
from torch import Tensor

from medusa_core.draft.top_scores import IMPOSSIBLE, bounded, top_scores

COUNTS = (1, 3, 15, 63)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("total", [63, 64, 100, 4096, 4100, 7 * 4096])
def test_they_are_the_greatest_in_order(total: int, count: int) -> None:
    generator = torch.Generator().manual_seed(total + count)
    scores = torch.randn(2, 3, total, generator=generator)
    values, places = top_scores(scores, count)
    assert torch.equal(values, scores.topk(count, dim=-1).values)
    assert torch.equal(scores.gather(-1, places), values)


@pytest.mark.parametrize("count", COUNTS)
def test_of_equal_scores_each_is_taken_once(count: int) -> None:
    scores = torch.randint(0, 3, (4, 5000), generator=torch.Generator().manual_seed(count)).float()
    values, places = top_scores(scores, count)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(scores.gather(-1, places), values)
    assert all(len(set(row)) == count for row in places.tolist())


@pytest.mark.parametrize("total", [100, 5000])
def test_padding_is_never_among_them(total: int) -> None:
    _, places = top_scores(torch.full((2, total), -math.inf), 20)
    assert int(places.max()) < total


def test_nan_is_worse_than_any_likely_score() -> None:
    scores: Tensor = torch.zeros(1, 5000)
    scores[0, :4992:64] = math.nan  # in every group but the last
    scores[0, 4993:] = torch.arange(7.0) + 1
    values, places = top_scores(scores, 7)
    assert values.tolist() == [[7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    assert places.tolist() == [[4999, 4998, 4997, 4996, 4995, 4994, 4993]]


def test_log_probabilities_are_bounded() -> None:
    wild = torch.tensor([math.nan, math.inf, -math.inf, 1e-7, -2.0])
    assert bounded(wild).tolist() == [IMPOSSIBLE, 0.0, IMPOSSIBLE, 0.0, -2.0]
