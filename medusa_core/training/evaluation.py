"""Held-out evaluation: accuracy and loss of each head, and the backbone's own loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.draft.heads import TrainingBatch
from medusa_core.training.batches import Collator, ExampleDataset
from medusa_core.training.data import NO_TARGET, Example
from medusa_core.training.joint import JointModule, next_tokens
from medusa_core.training.loss import CHUNK_ELEMENTS, Targets, find_targets
from medusa_core.training.module import HeadModule


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadEvaluation:
    """Figures of each head on `targets` held-out tokens (slightly fewer for later heads).

    `accuracy`: share where its best guess is the backbone's greedy token; `loss`: cross-entropy against the
    backbone's distribution in nats (over the tokens that the heads draft).
    """

    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    targets: int


@torch.inference_mode()
def evaluate_heads(model: HeadModule, examples: Sequence[Example], batch_size: int) -> HeadEvaluation | None:
    """Evaluate the heads on every target token; None without examples."""
    if not examples:
        return None
    model.eval()  # no dropout
    num_heads = model.heads.num_heads
    hits_K, loss_K, count_K = torch.zeros(3, num_heads, dtype=torch.float64, device=model.backbone.device)
    for batch in _batches(model, examples, batch_size):
        targets = find_targets(batch["labels"], num_heads, NO_TARGET)
        seen = TrainingBatch(model.hidden(batch["input_ids"]), batch["input_ids"])
        batch_hits_K, batch_loss_K = _judge(model, seen, targets)
        hits_K += batch_hits_K
        loss_K += batch_loss_K
        count_K += targets.weight_KN.sum(-1)
    seen_K = count_K.clamp(min=1)
    return HeadEvaluation(
        accuracy=tuple((hits_K / seen_K).tolist()),
        loss=tuple((loss_K / seen_K).tolist()),
        targets=int(count_K[0]),
    )


@torch.inference_mode()
def evaluate_backbone(model: JointModule, examples: Sequence[Example], batch_size: int) -> float | None:
    """The backbone's cross-entropy with the data, nats per assistant token; None without examples."""
    if not examples:
        return None
    model.eval()
    loss, count = 0.0, 0
    for batch in _batches(model, examples, batch_size):
        loss += float(model.backbone_loss(model.hidden(batch["input_ids"]), batch["labels"]))
        count += len(next_tokens(batch["labels"])[0])
    return loss / max(1, count)


def _batches(model: HeadModule, examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of dialogues of similar length, on the model's device."""
    collate = Collator()
    dataset = ExampleDataset(sorted(examples, key=lambda example: len(example.input_ids)))
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        yield {name: tensor.to(model.backbone.device) for name, tensor in collate(rows).items()}


def _judge(model: HeadModule, batch: TrainingBatch, targets: Targets) -> tuple[Tensor, Tensor]:
    """Hits and summed cross-entropy of each head [K] on one batch, chunk by chunk."""
    heads, hidden_NE = model.heads, batch.hidden_BSE.flatten(0, 1)
    teacher = model.teacher(hidden_NE, targets)
    lm_head_EV = model.backbone.lm_head_weight.to(hidden_NE.dtype).T
    features_KNE = heads.features(batch, targets.source_KN)
    hits_K, loss_K = torch.zeros(2, heads.num_heads, dtype=torch.float64, device=features_KNE.device)
    size = max(1, CHUNK_ELEMENTS // lm_head_EV.shape[1])
    for start in range(0, targets.token_N.numel(), size):
        chunk = slice(start, start + size)
        probabilities_CV = teacher.probabilities(chunk)
        greedy_C = (hidden_NE[targets.teacher_N[chunk]] @ lm_head_EV).argmax(-1)  # of all tokens
        for head in range(heads.num_heads):
            weight_C = targets.weight_KN[head, chunk]
            logits_CV = model.head_logits(head, features_KNE[head, chunk])
            log_q_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
            guess_C = log_q_CV.argmax(-1)
            guess_C = guess_C if heads.token_map is None else heads.token_map[guess_C]
            hits_K[head] += ((guess_C == greedy_C) * weight_C).sum()
            loss_K[head] -= (torch.linalg.vecdot(log_q_CV, probabilities_CV) * weight_C).sum()
    return hits_K, loss_K
