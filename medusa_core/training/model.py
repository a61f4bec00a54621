"""The module the Trainer optimises: draft heads, with the frozen backbone beside them rather than inside.

So checkpoints, optimizer and DDP see the heads only. Shapes: B rows of S tokens, N targets, K heads, E
hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.backbone import Backbone
from medusa_core.errors import ConfigError
from medusa_core.heads.base import TrainableHeads, TrainingBatch
from medusa_core.training.config import LossKind
from medusa_core.training.data import NO_TARGET
from medusa_core.training.loss import Targets, TeacherTargets, find_targets, head_losses


class HeadTrainer(nn.Module):
    """Heads (float32 master weights) on a frozen backbone; products are taken in the backbone's dtype."""

    accepts_loss_kwargs = (
        True  # transformers then passes `num_items_in_batch`, targets over accumulated batches
    )

    def __init__(self, backbone: Backbone, heads: TrainableHeads, *, loss: LossKind, decay: float) -> None:
        super().__init__()
        if not backbone.splits:
            name = type(backbone.model).__name__
            raise ConfigError(
                f"heads cannot be trained on {name}: it caps or scales the logits of its output layer"
            )
        self.backbone = backbone  # no nn.Module, hence not among the parameters
        self.heads = heads
        self._loss_kind = loss
        decay_K = torch.tensor([decay**head for head in range(heads.num_heads)])
        self.register_buffer("decay_K", decay_K, persistent=False)
        self.decay_K: Tensor

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """`loss`: sum over heads of decay**k times the mean cross-entropy; `head_losses` [K]: those means."""
        targets = find_targets(labels, self.heads.num_heads, NO_TARGET)
        hidden_BSE = self.hidden(input_ids)
        features_KNE = self.heads.features(TrainingBatch(hidden_BSE, input_ids), targets.source_KN)
        is_taught = self._loss_kind == LossKind.TEACHER
        wanted = self.teacher(hidden_BSE.flatten(0, 1), targets) if is_taught else targets.token_N
        losses_K = head_losses(
            features_KNE, self.heads.output, wanted, targets.weight_KN, self.heads.output_bias
        )
        count = targets.token_N.numel() if num_items_in_batch is None else num_items_in_batch
        losses_K = losses_K / torch.as_tensor(count, device=losses_K.device).clamp(min=1)
        return {"loss": (losses_K * self.decay_K).sum(), "head_losses": losses_K.detach()}

    @torch.no_grad()
    def hidden(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, S, E] after the final norm, of right-padded rows."""
        hidden: Tensor = self.backbone.model.base_model(
            input_ids=input_ids, use_cache=False
        ).last_hidden_state
        return hidden

    def teacher(self, hidden_NE: Tensor, targets: Targets) -> TeacherTargets:
        """The backbone's distributions of the target tokens, over the heads' vocabulary."""
        rows = self.backbone.lm_head_weight[: self.heads.vocab_size]
        return TeacherTargets(hidden_NE[targets.teacher_N], rows)

    def head_logits(self, head: int, features_NE: Tensor) -> Tensor:
        """Logits [N, V] of one head."""
        output, bias = self.heads.output, self.heads.output_bias
        weight = (output if output.ndim == 2 else output[head]).to(features_NE.dtype)
        return functional.linear(features_NE, weight, None if bias is None else bias[head].to(weight.dtype))
