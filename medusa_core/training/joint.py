"""The module of joint training, medusa-2: heads and backbone (Medusa paper §2.2.2, arXiv 2401.10774).

L = L_LM + lambda_0 * L_heads. L_LM is the backbone's cross-entropy on the data's assistant tokens or, with
self-distillation, KL(p_original || p_student) there: with LoRA the original is the same weights with the
adapters off, so that no second copy is in memory. Shapes: B rows of S tokens, N targets, E hidden.
"""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from medusa_core.draft.heads import TrainableHeads, TrainingBatch
from medusa_core.model.backbone import Backbone
from medusa_core.training.config import LossKind
from medusa_core.training.data import NO_TARGET
from medusa_core.training.loss import TeacherTargets, head_losses, teacher_entropy
from medusa_core.training.module import HeadModule


class JointModule(HeadModule):
    """Heads and backbone, both with float32 master weights; products are taken in `dtype`.

    `progress` (0 to 1) is the Trainer's to set: with `ramps` the heads' loss weighs
    heads_weight * sin(pi/2 * progress). `original`, if given, is a context in which the backbone has its
    original weights: the target of self-distillation.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: TrainableHeads,
        *,
        loss: LossKind,
        decay: float,
        heads_weight: float,
        ramps: bool = False,
        original: Callable[[], AbstractContextManager[None]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(backbone, heads, loss=loss, decay=decay)
        self.model = backbone.model  # a submodule here: it learns
        self.progress = 1.0
        self._heads_weight, self._ramps, self._original, self._dtype = heads_weight, ramps, original, dtype

    @property
    def lambda_0(self) -> float:
        """The present weight of the heads' loss."""
        return self._heads_weight * (math.sin(math.pi / 2 * self.progress) if self._ramps else 1.0)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`loss`, and its parts as means over assistant tokens: `lm_loss` (nats), `head_losses` [K]."""
        original_BSE = self._original_hidden(input_ids, position_ids)
        hidden_BSE = self.hidden(input_ids, position_ids)
        count = self.count(labels, num_items_in_batch)
        losses_K = self.head_losses(TrainingBatch(hidden_BSE, input_ids, position_ids), labels) / count
        lm_loss = self.backbone_loss(hidden_BSE, labels, original_BSE) / count
        loss = lm_loss + self.lambda_0 * (losses_K * self.decay_K).sum()
        return {"loss": loss, "lm_loss": lm_loss.detach(), "head_losses": losses_K.detach()}

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, E] after the final norm, differentiable."""
        with self._autocast():
            return self.states(input_ids, position_ids).to(self._dtype)

    def backbone_loss(self, hidden_BSE: Tensor, labels: Tensor, original_BSE: Tensor | None = None) -> Tensor:
        """Cross-entropy with the data, or KL divergence from the original, summed over assistant tokens."""
        token_N, source_N = next_tokens(labels)
        rows_VE, wanted = self.backbone.lm_head_weight, None
        if original_BSE is not None:
            frozen_VE = rows_VE.detach().to(original_BSE.dtype)
            wanted = TeacherTargets(original_BSE.flatten(0, 1)[source_N], frozen_VE)
        features_1NE = hidden_BSE.flatten(0, 1)[source_N][None]
        weight_1N = torch.ones(1, len(token_N), device=labels.device)
        loss = head_losses(features_1NE, rows_VE, token_N if wanted is None else wanted, weight_1N)[0]
        return loss if wanted is None else loss - teacher_entropy(wanted)

    def _original_hidden(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor | None:
        if self._original is None:
            return None
        # Without gradients, and in an autocast region of its own: one region's weights in bfloat16 are kept,
        # and those made here have no gradient.
        with torch.no_grad(), self._original():
            return self.hidden(input_ids, position_ids)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.backbone.device.type, dtype=self._dtype)


def next_tokens(labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [N] of all assistant tokens, and the flat positions [N] whose hidden states predict them."""
    row_N, column_N = (labels_BS[:, 1:] != NO_TARGET).nonzero(as_tuple=True)
    return labels_BS[row_N, column_N + 1], row_N * labels_BS.shape[1] + column_N
