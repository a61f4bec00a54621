"""The module that the Trainer optimizes: draft heads on a frozen backbone.

The backbone is no submodule, so checkpoints, optimizer and DDP see the heads only. Shapes: B rows of S
tokens, N targets, K heads, E hidden, V output rows of the heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from medusa_core.draft.head_stack import output_rows
from medusa_core.draft.heads import TrainableHeads, TrainingBatch
from medusa_core.errors import ConfigError
from medusa_core.model.backbone import Backbone
from medusa_core.training.config import LossKind
from medusa_core.training.data import NO_TARGET
from medusa_core.training.loss import Targets, TeacherTargets, find_targets, head_losses


class HeadModule(nn.Module):
    """Heads (float32 master weights) on a frozen backbone; products are taken in the backbone's dtype."""

    # transformers then passes `num_items_in_batch`: targets over accumulated batches.
    accepts_loss_kwargs = True

    def __init__(
        self, backbone: Backbone, heads: TrainableHeads, *, loss: LossKind, decay: float, noise: float = 0.0
    ) -> None:
        super().__init__()
        if not backbone.splits:
            name = type(backbone.model).__name__
            raise ConfigError(
                f"heads cannot be trained on {name}: it caps or scales the logits of its output layer"
            )
        self.backbone = backbone  # no nn.Module, hence not among the parameters
        self.heads = heads
        self._loss_kind, self._noise = loss, noise
        decay_K = torch.tensor([decay**head for head in range(heads.num_heads)])
        self.register_buffer("decay_K", decay_K, persistent=False)
        self.decay_K: Tensor
        self.register_buffer("row_of_token", _row_of_token(heads, backbone.vocab_size), persistent=False)
        self.row_of_token: Tensor | None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`loss`: sum over heads of decay**k times the mean cross-entropy; `head_losses` [K]: those means."""
        hidden_BSE = self.hidden(input_ids, position_ids)
        losses_K = self.head_losses(TrainingBatch(hidden_BSE, input_ids, position_ids), labels)
        losses_K = losses_K / self.count(labels, num_items_in_batch)
        return {"loss": (losses_K * self.decay_K).sum(), "head_losses": losses_K.detach()}

    def head_losses(self, batch: TrainingBatch, labels: Tensor) -> Tensor:
        """Each head's cross-entropy [K], summed over its targets."""
        targets = find_targets(labels, self.heads.num_heads, NO_TARGET)
        features_KNE = self.heads.features(self.with_noise(batch), targets.source_KN)
        wanted: Tensor | TeacherTargets
        if self._loss_kind == LossKind.TEACHER:
            wanted = self.teacher(batch.hidden_BSE.detach().flatten(0, 1), targets)
        else:
            wanted = targets.token_N if self.row_of_token is None else self.row_of_token[targets.token_N]
        return head_losses(features_KNE, self.heads.output, wanted, targets.weight_KN, self.heads.output_bias)

    def count(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The number of targets that sums are divided by, at least 1."""
        if num_items_in_batch is None:
            num_items_in_batch = find_targets(labels, 1, NO_TARGET).token_N.numel()
        return torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, E] after the final norm, of right-padded or packed rows."""
        return self.states(input_ids, position_ids)

    def states(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The same, in whatever grad and autocast mode the caller is."""
        hidden: Tensor = self.backbone.model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return hidden

    def teacher(self, hidden_NE: Tensor, targets: Targets) -> TeacherTargets:
        """The backbone's distributions of the target tokens, over the heads' vocabulary."""
        rows = output_rows(self.backbone.lm_head_weight, self.heads.vocab_size, self.heads.token_map)
        return TeacherTargets(hidden_NE[targets.teacher_N], rows.to(hidden_NE.dtype))

    def head_logits(self, head: int, features_NE: Tensor) -> Tensor:
        """Logits [N, V] of one head."""
        output, bias = self.heads.output, self.heads.output_bias
        weight = (output if output.ndim == 2 else output[head]).to(features_NE.dtype)
        return functional.linear(features_NE, weight, None if bias is None else bias[head].to(weight.dtype))

    def with_noise(self, batch: TrainingBatch) -> TrainingBatch:
        """uniform(-1, 1) * alpha / sqrt(S * E) on the hidden states, in training only (Hydra's option)."""
        if not (self._noise and self.training):
            return batch
        _, length, width = batch.hidden_BSE.shape
        noise = torch.rand_like(batch.hidden_BSE).mul_(2).sub_(1).mul_(self._noise / (length * width) ** 0.5)
        return TrainingBatch(batch.hidden_BSE + noise, batch.tokens_BS, batch.positions_BS)


def _row_of_token(heads: TrainableHeads, vocab_size: int) -> Tensor | None:
    """The output row of each token id [vocab_size]; V, which is none, for those the heads never draft."""
    if heads.token_map is None:
        return None
    rows = torch.full((vocab_size,), heads.vocab_size, device=heads.token_map.device)
    rows[heads.token_map] = torch.arange(heads.vocab_size, device=rows.device)
    return rows
