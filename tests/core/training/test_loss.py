"""The chunked loss against a slow reference that holds every logit, and its targets against a drawing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medusa_core.training.data import NO_TARGET
from medusa_core.training.loss import Targets, TeacherTargets, find_targets, head_losses

HEADS, TARGETS, HIDDEN, VOCAB = 3, 10, 6, 17


def test_targets_of_a_drawn_batch() -> None:
    """Two rows of six tokens. Row 0 ends in a turn of three. Row 1: a lone target, then a turn of four."""
    x = NO_TARGET
    labels = torch.tensor([[x, x, x, 13, 14, 15], [20, x, 22, 23, 24, 25]])
    targets = find_targets(labels, 3, NO_TARGET)
    # A turn's first token is a root and never drafted: 13, 20 and 22 are missing.
    assert targets.token_N.tolist() == [14, 15, 23, 24, 25]
    # Flat positions: 0..5 is row 0, 6..11 is row 1. The backbone predicts a token from the one before it.
    assert targets.teacher_N.tolist() == [3, 4, 8, 9, 10]
    # Head k drafts k + 2 places ahead, behind a root in the same turn.
    assert targets.weight_KN.tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    sources = [[2, 3, 7, 8, 9], [None, 2, None, 7, 8], [None, None, None, None, 7]]
    for found, expected in zip(targets.source_KN.tolist(), sources, strict=True):
        assert [s for s, e in zip(found, expected, strict=True) if e is not None] == [
            e for e in expected if e is not None
        ]


def test_targets_from_the_row_s_start_have_a_source() -> None:
    targets = find_targets(torch.tensor([[1, 2, 3, 4]]), 3, NO_TARGET)
    assert targets.token_N.tolist() == [3, 4]
    assert targets.weight_KN.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert targets.source_KN.tolist() == [[0, 1], [0, 0], [0, 0]]


def test_find_targets_leaves_labels_alone() -> None:
    labels = torch.tensor([[1, 2, 3]])
    find_targets(labels, 1, NO_TARGET)
    assert labels.tolist() == [[1, 2, 3]]


def inputs(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, TeacherTargets, Tensor, Tensor]:
    """Features [K, N, E], outputs [K, V, E], teacher, token ids [N], weights [K, N]."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    teacher = TeacherTargets(randn(TARGETS, HIDDEN), randn(VOCAB, HIDDEN))
    tokens = torch.randint(VOCAB, (TARGETS,), generator=generator)
    weight_KN = (torch.rand(HEADS, TARGETS, generator=generator) > 0.3).float()
    return randn(HEADS, TARGETS, HIDDEN), randn(HEADS, VOCAB, HIDDEN), teacher, tokens, weight_KN


def slow_losses(
    features: Tensor, output: Tensor, targets: Tensor | TeacherTargets, weight_KN: Tensor
) -> Tensor:
    """One target at a time, by definition."""
    losses = []
    for head in range(HEADS):
        weights = output[head] if output.ndim == 3 else output
        total = torch.zeros(())
        for n in range(TARGETS):
            log_q = torch.log_softmax(weights @ features[head, n], -1)
            if isinstance(targets, TeacherTargets):
                p = torch.softmax(targets.lm_head_VE @ targets.hidden_NE[n], -1)
                loss = sum(-p[v] * log_q[v] for v in range(len(log_q)))
            else:
                loss = -log_q[targets[n]]
            total = total + weight_KN[head, n] * loss
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("chunk_targets", [1, 4, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["teacher", "hard"])
def test_losses_and_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, kind: str, shared: bool, chunk_targets: int
) -> None:
    monkeypatch.setattr("medusa_core.training.loss.CHUNK_ELEMENTS", chunk_targets * VOCAB)
    features, output, teacher, tokens, weight_KN = inputs()
    output = output[0] if shared else output
    targets = teacher if kind == "teacher" else tokens
    scale_K = torch.tensor([1.0, 0.8, 0.64])
    results = []
    for function in (
        lambda f, o: head_losses(f, o, targets, weight_KN),
        lambda f, o: slow_losses(f, o, targets, weight_KN),
    ):
        f, o = features.clone().requires_grad_(), output.clone().requires_grad_()
        losses_K = function(f, o)
        (losses_K * scale_K).sum().backward()
        results.append((losses_K.detach(), f.grad, o.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_frozen_output_layers_get_no_gradient() -> None:
    features, output, teacher, _, weight_KN = inputs()
    features.requires_grad_()
    head_losses(features, output, teacher, weight_KN).sum().backward()
    assert output.grad is None
    assert features.grad is not None


def test_bfloat16_is_close_and_accumulates_in_float32() -> None:
    features, output, teacher, _, weight_KN = inputs()
    exact = head_losses(features, output, teacher, weight_KN)
    rounded = TeacherTargets(teacher.hidden_NE.bfloat16(), teacher.lm_head_VE.bfloat16())
    features_16 = features.bfloat16().requires_grad_()
    output.requires_grad_()  # float32 master weights
    losses_K = head_losses(features_16, output, rounded, weight_KN)
    assert losses_K.dtype == torch.float32
    torch.testing.assert_close(losses_K, exact, rtol=0.02, atol=0.1)
    losses_K.sum().backward()
    assert output.grad is not None
    assert output.grad.dtype == torch.float32
    assert features_16.grad is not None
    assert features_16.grad.dtype == torch.bfloat16


def test_tokens_beyond_the_heads_vocabulary_do_not_count() -> None:
    features, output, _, tokens, _ = inputs()
    tokens[4] = VOCAB + 2
    weight_KN = torch.ones(HEADS, TARGETS)
    features.requires_grad_()
    losses_K = head_losses(features, output, tokens, weight_KN)
    losses_K.sum().backward()
    weight_KN[:, 4] = 0
    expected = torch.stack(
        [
            functional.cross_entropy(features[k] @ output[k].T, tokens.clamp(max=VOCAB - 1), reduction="none")
            @ weight_KN[k]
            for k in range(HEADS)
        ]
    )
    torch.testing.assert_close(losses_K, expected, rtol=1e-4, atol=1e-5)
    assert features.grad is not None
    assert (features.grad[:, 4] == 0).all()
    assert (features.grad[:, 3] != 0).any()


def test_no_targets_no_loss() -> None:
    features, output, teacher, _, weight_KN = inputs()
    nothing = TeacherTargets(teacher.hidden_NE[:0], teacher.lm_head_VE)
    losses_K = head_losses(features[:, :0].requires_grad_(), output, nothing, weight_KN[:, :0])
    assert losses_K.tolist() == [0.0] * HEADS
    losses_K.sum().backward()
    empty = find_targets(torch.full((2, 5), NO_TARGET), HEADS, NO_TARGET)
    assert isinstance(empty, Targets)
    assert empty.token_N.numel() == 0
