"""Coupled drafting: drafts ranked with the very noise that the target will draw with.

The noise of a position is known before the target runs (see `medusa_core.engine.sampling`), so at temperature
> 0 a draft is the heads' guess of that draw. Only the hit rate depends on it, never the output. The idea is
Daliri et al. 2024 (drafter-invariant speculative decoding by Gumbel coupling), here for trees.

Shapes: B rows, K heads or paths, N paths, J tokens of a path, P positions, V tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from medusa_core.draft.heads import SequentialHeads

# A head does not know the tokens in between, so its distribution is a blend of sharper ones and its logits
# differ less than the target's: at full weight the noise decides too much. The demo heads' first guesses are
# right most often between 0.6 and 0.9 (T = 1, head 4: .181 at 1.0, .192 at 0.8).
NOISE_WEIGHT = 0.8


@dataclass(frozen=True, slots=True)
class DrawNoise:
    """What the target will draw with: `noise_BPV` has a row per depth and a column per token of the backbone.

    `temperatures_B`: of sampling; 0 leaves a row's scores as they are. One row of either may stand for all B.
    """

    temperatures_B: Tensor
    noise_BPV: Tensor

    def at(self, level: int) -> "DrawNoise":
        """Of one level only."""
        return DrawNoise(self.temperatures_B, self.noise_BPV[:, level : level + 1])


def couple(logits_BKV: Tensor, noise: DrawNoise | None, token_map_V: Tensor | None = None) -> Tensor:
    """Scores that guess the target's seeded draw, float32; the logits themselves without noise.

    The noise has a row per head, or one for all K. The heads know the backbone's tokens in `token_map_V`, or
    the first.
    """
    logits = logits_BKV.float()
    if noise is None:
        return logits
    noise_BKV = noise.noise_BPV[:, : logits.shape[1]]
    noise_BKV = noise_BKV[..., : logits.shape[2]] if token_map_V is None else noise_BKV[..., token_map_V]
    return logits + NOISE_WEIGHT * noise.temperatures_B[:, None, None] * noise_BKV


@dataclass(frozen=True, slots=True)
class LevelScores:
    """What heads that see the drafted path say of a level's candidates, coupled like `couple`."""

    heads: SequentialHeads
    hidden_BE: Tensor
    noise: DrawNoise | None

    def score(self, level: int, paths_BNJ: Tensor) -> Tensor:
        """Float32 [B, N, V] of the tokens after each path (ids, the root first, J = level + 1)."""
        logits = self.heads.level_logits(level, self.hidden_BE, paths_BNJ)
        return couple(logits, None if self.noise is None else self.noise.at(level), self.heads.token_map)

    def token_ids(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the logits."""
        token_map = self.heads.token_map
        return rows if token_map is None else token_map[rows]
