"""Token stops inside an accepted run."""

import itertools

import pytest

from medusa_core.engine.outputs import FinishReason
from medusa_core.engine.sequence import CutRun, Sequence, cut_run
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("tokens", "budget", "cut"),
    [
        ([5, 6, 7], 9, CutRun((5, 6, 7))),
        ([5, 6, 7], 3, CutRun((5, 6, 7), FinishReason.LENGTH)),
        ([5, 6, 7], 2, CutRun((5, 6), FinishReason.LENGTH)),
        ([5, 1, 7], 9, CutRun((5,), FinishReason.STOP, 1)),
        ([1, 5, 7], 9, CutRun((), FinishReason.STOP, 1)),
        ([5, 2, 1], 9, CutRun((5,), FinishReason.STOP, 2)),  # the first of two
        ([5, 1], 1, CutRun((5,), FinishReason.LENGTH)),  # the stop is beyond the budget
        ([5, 1], 2, CutRun((5,), FinishReason.STOP, 1)),
        ([], 3, CutRun(())),
    ],
)
def test_cut_run(tokens: list[int], budget: int, cut: CutRun) -> None:
    assert cut_run(tokens, frozenset({1, 2}), budget) == cut


def test_any_split_into_runs_ends_alike() -> None:
    """Runs of any length stop at the same place and for the same reason."""
    for tokens in itertools.product((1, 5, 6), repeat=5):
        for budget in (1, 3, 5):
            one_by_one = cut_run(tokens, frozenset({1}), budget)
            for split in range(1, 5):
                first = cut_run(tokens[:split], frozenset({1}), budget)
                if first.finish_reason is not None:
                    assert first == one_by_one
                    continue
                rest = cut_run(tokens[split:], frozenset({1}), budget - len(first.token_ids))
                joined = CutRun(first.token_ids + rest.token_ids, rest.finish_reason, rest.stop_token_id)
                assert joined == one_by_one


@pytest.mark.parametrize(
    ("max_tokens", "generated", "budget"), [(None, 0, 7), (None, 5, 2), (4, 0, 4), (4, 3, 1), (100, 1, 6)]
)
def test_budget(max_tokens: int | None, generated: int, budget: int) -> None:
    sequence = Sequence(
        request=Request(request_id="a", prompt_ids=[5, 6, 7], params=SamplingParams(max_tokens=max_tokens)),
        slot=0,
        stop_ids=frozenset(),
        max_total=10,
        num_generated=generated,
    )
    assert sequence.num_tokens == 3 + generated
    assert sequence.budget == budget
