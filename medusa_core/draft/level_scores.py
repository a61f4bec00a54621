"""What heads that see the drafted path say of a level's candidates.

Shapes: B rows, N paths, J tokens of a path, V rows of the heads' logits, P positions.
"""

from dataclasses import dataclass

from torch import Tensor

from medusa_core.draft.coupling import couple
from medusa_core.draft.heads import SequentialHeads


@dataclass(frozen=True, slots=True)
class LevelScores:
    """The heads' scores for one batch, coupled with the target's noise if there is any."""

    heads: SequentialHeads
    hidden_BE: Tensor
    temperature: float
    noise_BPV: Tensor | None

    def score(self, level: int, paths_BNJ: Tensor) -> Tensor:
        """Float32 [B, N, V] of the tokens after each path (ids, the root first, J = level + 1)."""
        logits = self.heads.level_logits(level, self.hidden_BE, paths_BNJ)
        noise = None if self.noise_BPV is None else self.noise_BPV[:, level : level + 1]
        return couple(logits, self.temperature, noise, self.heads.token_map)

    def token_ids(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the logits."""
        token_map = self.heads.token_map
        return rows if token_map is None else token_map[rows]
