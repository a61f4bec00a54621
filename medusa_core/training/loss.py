"""Cross-entropy of K heads on many target tokens, without ever holding all their logits.

For each chunk of targets the losses *and* their gradients are computed at once; only the gradients, which
are as small as the inputs, outlive the chunk. Head logits are computed once, where checkpointing would do
it twice.

Shapes: B rows of S tokens, N target tokens in the batch, C of them in a chunk, K heads, E hidden, V output
rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Float32 logits of one head and chunk: 8 MiB, which caches hold; fastest of 2^20 to 2^23.
CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True)
class Targets:
    """The target tokens of a batch. For a target at index j of its row: flat indices into [B * S].

    `token_N` its id; `teacher_N` index j-1, whose hidden state the backbone predicts it from; `source_KN`
    index j-2-k, which head k predicts it from, and `weight_KN` 1.0, or 0.0 where decoding never does that.
    """

    token_N: Tensor
    teacher_N: Tensor
    source_KN: Tensor
    weight_KN: Tensor


def find_targets(labels_BS: Tensor, num_heads: int, ignore: int) -> Targets:
    """Every token that head 0 at least drafts while decoding: it and the one before are targets.

    Head k at t drafts t+2+k after the root t+1, with everything in between decided by the model. So all of
    t+1..t+2+k must be targets: a root outside the assistant's turn never occurs.
    """
    is_target = labels_BS != ignore
    column_BS = torch.arange(labels_BS.shape[1], device=labels_BS.device).expand_as(labels_BS)
    gap_BS = torch.where(is_target, -1, column_BS).cummax(dim=1).values
    run_BS = column_BS - gap_BS  # consecutive targets up to here
    row_N, column_N = ((run_BS >= 2) & (column_BS >= 2)).nonzero(as_tuple=True)
    flat_N = row_N * labels_BS.shape[1] + column_N
    reach_K1 = 2 + torch.arange(num_heads, device=labels_BS.device)[:, None]
    has_source_KN = (run_BS[row_N, column_N] >= reach_K1) & (column_N >= reach_K1)
    return Targets(
        token_N=labels_BS[row_N, column_N],
        teacher_N=flat_N - 1,
        source_KN=torch.where(has_source_KN, flat_N - reach_K1, 0),
        weight_KN=has_source_KN.float(),
    )


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """What the heads should say: the backbone's own distribution, softmax(hidden_NE @ lm_head_VE)."""

    hidden_NE: Tensor
    lm_head_VE: Tensor

    def probabilities(self, chunk: slice) -> Tensor:
        """Float32 [C, V]."""
        return (self.hidden_NE[chunk] @ self.lm_head_VE.T).float().softmax(-1)


@torch.no_grad()
def teacher_entropy(teacher: TeacherTargets) -> Tensor:
    """Entropy in nats, summed over N: what cross-entropy with the teacher exceeds the KL divergence by."""
    total = torch.zeros((), device=teacher.hidden_NE.device)
    size = max(1, CHUNK_ELEMENTS // len(teacher.lm_head_VE))
    for start in range(0, len(teacher.hidden_NE), size):
        total += torch.special.entr(teacher.probabilities(slice(start, start + size))).sum()
    return total


def head_losses(
    features_KNE: Tensor,
    output: Tensor,
    targets: Tensor | TeacherTargets,
    weight_KN: Tensor,
    bias_KV: Tensor | None = None,
) -> Tensor:
    """Weighted sum over N of each head's cross-entropy in nats: float32 [K], differentiable.

    `features_KNE` are multiplied, in their dtype, by the output layers `output` [K, V, E] or the shared [V,
    E], whose biases `bias_KV` are. `targets`: token ids [N] (below V, else the target is not counted) or a
    teacher.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(features_KNE, output, bias_KV, targets, weight_KN)
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See `head_losses`. Gradients are made in `forward` and only scaled in `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        features_KNE: Tensor,
        output: Tensor,
        bias_KV: Tensor | None,
        targets: Tensor | TeacherTargets,
        weight_KN: Tensor,
    ) -> Tensor:
        num_heads, num_targets, _ = features_KNE.shape
        weights = output.to(features_KNE.dtype).expand(num_heads, *output.shape[-2:])  # [K, V, E]
        losses_K = features_KNE.new_zeros(num_heads, dtype=torch.float32)
        features_grad = torch.zeros_like(features_KNE)
        # Float32, so that the sum over chunks does not lose what a bfloat16 product keeps.
        output_grad = torch.zeros(weights.shape, device=output.device) if ctx.needs_input_grad[1] else None
        bias_grad = None if bias_KV is None else torch.zeros(bias_KV.shape, device=output.device)
        size = max(1, CHUNK_ELEMENTS // output.shape[-2])
        for start in range(0, num_targets, size):
            chunk = slice(start, start + size)
            wanted = _Wanted.of(targets, chunk, output.shape[-2])
            for head in range(num_heads):
                features_CE = features_KNE[head, chunk]
                logits_CV = features_CE @ weights[head].T
                if bias_KV is not None:
                    logits_CV += bias_KV[head].to(logits_CV.dtype)
                loss, logits_grad_CV = wanted.loss(logits_CV, weight_KN[head, chunk])
                losses_K[head] += loss
                if bias_grad is not None:
                    bias_grad[head] += logits_grad_CV.sum(0)
                logits_grad_CV = logits_grad_CV.to(features_CE.dtype)
                features_grad[head, chunk] = logits_grad_CV @ weights[head]
                if output_grad is not None:
                    output_grad[head] += logits_grad_CV.T @ features_CE
        ctx.save_for_backward(features_grad, output_grad, bias_grad)
        ctx.is_shared = output.ndim == 2
        return losses_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses_grad_K: Tensor) -> tuple[Tensor | None, ...]:
        features_grad, output_grad, bias_grad = ctx.saved_tensors
        scale_K11 = losses_grad_K[:, None, None]
        features_grad = features_grad * scale_K11.to(features_grad.dtype)
        if output_grad is not None:
            output_grad = output_grad * scale_K11
            output_grad = output_grad.sum(0) if ctx.is_shared else output_grad
        bias_grad = None if bias_grad is None else bias_grad * losses_grad_K[:, None]
        return features_grad, output_grad, bias_grad, None, None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One chunk's targets: probabilities [C, V], or ids [C] clamped below V with what is counted [C]."""

    probabilities_CV: Tensor | None
    token_C1: Tensor | None
    counted_C: Tensor | None

    @classmethod
    def of(cls, targets: Tensor | TeacherTargets, chunk: slice, vocab_size: int) -> "_Wanted":
        if isinstance(targets, TeacherTargets):
            return cls(targets.probabilities(chunk), None, None)
        token_C = targets[chunk]
        return cls(None, token_C.clamp(max=vocab_size - 1)[:, None], (token_C < vocab_size).float())

    def loss(self, logits_CV: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy, summed, and its gradient for the logits [C, V], float32."""
        log_q_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
        if self.probabilities_CV is not None:
            loss_C = -torch.linalg.vecdot(log_q_CV, self.probabilities_CV)
            gradient_CV = log_q_CV.exp_().sub_(self.probabilities_CV)
        else:
            assert self.token_C1 is not None
            assert self.counted_C is not None
            weight_C = weight_C * self.counted_C
            loss_C = -log_q_CV.gather(1, self.token_C1)[:, 0]
            gradient_CV = log_q_CV.exp_()
            gradient_CV.scatter_add_(1, self.token_C1, gradient_CV.new_full(self.token_C1.shape, -1.0))
        return (loss_C * weight_C).sum(), gradient_CV.mul_(weight_C[:, None])
