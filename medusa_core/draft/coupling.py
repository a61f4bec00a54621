"""Coupled drafting: drafts ranked with the very noise that the target will draw with.

The noise of a position is known before the target runs (see `medusa_core.engine.sampling`), so at temperature
> 0 a draft is the heads' guess of that draw. Only the hit rate depends on it, never the output. The idea is
Daliri et al. 2024 (drafter-invariant speculative decoding by Gumbel coupling), here for trees.

Shapes: B rows, K heads or paths, P positions, V tokens.
"""

from torch import Tensor

# A head does not know the tokens in between, so its distribution is a blend of sharper ones and its logits
# differ less than the target's: at full weight the noise decides too much. The demo heads' first guesses are
# right most often between 0.6 and 0.9 (T = 1, head 4: .181 at 1.0, .192 at 0.8).
NOISE_WEIGHT = 0.8


def couple(
    logits_BKV: Tensor, temperature: float, noise_BPV: Tensor | None, token_map_V: Tensor | None = None
) -> Tensor:
    """Scores that guess the target's seeded draw; the logits themselves at temperature 0.

    The noise has a row per depth, or one for all K, and a column per token of the backbone's vocabulary, of
    which the heads know those in `token_map_V`, or the first.
    """
    logits = logits_BKV.float()
    if temperature == 0.0 or noise_BPV is None:
        return logits
    noise = noise_BPV[:, : logits.shape[1]]
    noise = noise[..., : logits.shape[2]] if token_map_V is None else noise[..., token_map_V]
    return logits + NOISE_WEIGHT * temperature * noise
