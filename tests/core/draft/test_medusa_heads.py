"""Medusa heads against a head-by-head reference written with nn.Linear."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.heads import TrainingBatch
from medusa_core.draft.medusa import MedusaHeads

HEADS, HIDDEN, VOCAB = 3, 8, 11


def random_heads(num_layers: int, *, shared: bool, dtype: torch.dtype = torch.float32) -> MedusaHeads:
    generator = torch.Generator().manual_seed(7)
    lm_head = torch.randn(VOCAB + 5, HIDDEN, generator=generator, dtype=torch.float32).to(dtype)
    heads = MedusaHeads.new(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_heads=HEADS,
        num_layers=num_layers,
        lm_head_weight=lm_head,
        shared=shared,
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return heads


def reference_logits(heads: MedusaHeads, hidden: Tensor, head: int) -> Tensor:
    """x + SiLU(W x + b) block after block, then the output layer: the reference implementation's own way."""
    for weight, bias in zip(heads.block_weights, heads.block_biases, strict=True):
        linear = nn.Linear(HIDDEN, HIDDEN)
        linear.load_state_dict({"weight": weight[head], "bias": bias[head]})
        hidden = hidden + nn.SiLU()(linear(hidden))
    return functional.linear(hidden, heads.output_weight(head))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_draft_logits_equal_the_reference(num_layers: int, shared: bool, rows: int) -> None:
    heads = random_heads(num_layers, shared=shared)
    hidden_BE = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    logits_BKV = heads.draft_logits(hidden_BE)
    assert logits_BKV.shape == (rows, HEADS, VOCAB)
    for head in range(HEADS):
        expected = reference_logits(heads, hidden_BE, head)
        torch.testing.assert_close(logits_BKV[:, head], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_bfloat16_drafts_are_those_of_float32_rounded(rows: int) -> None:
    heads = random_heads(1, shared=False)
    hidden_BE = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    exact = heads.draft_logits(hidden_BE)
    rounded = heads.to(torch.bfloat16).draft_logits(hidden_BE.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.3)


def features(heads: MedusaHeads, rows_KNE: Tensor) -> Tensor:
    """With rows of its own for every head."""
    heads_by_rows = rows_KNE.shape[:2]
    batch = TrainingBatch(rows_KNE, torch.zeros(heads_by_rows, dtype=torch.long))
    return heads.features(batch, torch.arange(rows_KNE[..., 0].numel()).view(heads_by_rows))


def test_features_of_own_rows_equal_the_reference() -> None:
    heads = random_heads(2, shared=False)
    rows_KNE = torch.randn(HEADS, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    features_KNE = features(heads, rows_KNE)
    for head in range(HEADS):
        logits = features_KNE[head] @ heads.output_weight(head).T
        torch.testing.assert_close(
            logits, reference_logits(heads, rows_KNE[head], head), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("shared", [False, True])
def test_new_heads_guess_what_the_backbone_does(shared: bool) -> None:
    lm_head = torch.randn(VOCAB + 5, HIDDEN)
    heads = MedusaHeads.new(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_heads=HEADS,
        num_layers=2,
        lm_head_weight=lm_head,
        shared=shared,
    )
    hidden_BE = torch.randn(2, HIDDEN)
    expected = (hidden_BE @ lm_head[:VOCAB].T)[:, None].expand(2, HEADS, VOCAB)
    torch.testing.assert_close(heads.draft_logits(hidden_BE), expected)


def test_layers_and_heads_are_distinct() -> None:
    """The published code multiplies a one-element list, so its layers are one module."""
    heads = random_heads(3, shared=False)
    storages = {parameter.data_ptr() for parameter in heads.parameters()}
    assert len(storages) == 3 + 3 + 1
    rows_KNE = torch.randn(HEADS, 5, HIDDEN)
    before = features(heads, rows_KNE).detach()
    with torch.no_grad():
        heads.block_weights[1][0].add_(1.0)
    after = features(heads, rows_KNE).detach()
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_new_blocks_receive_gradients() -> None:
    heads = MedusaHeads.new(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_heads=HEADS,
        num_layers=2,
        lm_head_weight=torch.randn(VOCAB, HIDDEN),
    )
    features(heads, torch.randn(HEADS, 5, HIDDEN)).square().sum().backward()
    for weight in heads.block_weights:
        assert weight.grad is not None
        assert (weight.grad.abs().amax(dim=(1, 2)) > 0).all()


def test_shared_output_is_the_backbones_memory_and_is_not_saved() -> None:
    lm_head = torch.randn(VOCAB + 5, HIDDEN)
    heads = MedusaHeads.new(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_heads=HEADS,
        num_layers=1,
        lm_head_weight=lm_head,
        shared=True,
    )
    assert heads.is_shared
    assert heads.output_weight(2).data_ptr() == lm_head.data_ptr()
    assert set(heads.state_dict()) == {"block_weights.0", "block_biases.0"}


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one head"):
        MedusaHeads(num_heads=0, num_layers=1, hidden_size=HIDDEN, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="lacks 11 rows of 8"):
        MedusaHeads.new(
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            num_heads=1,
            num_layers=1,
            lm_head_weight=torch.randn(4, HIDDEN),
        )
