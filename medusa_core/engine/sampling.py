"""The noise that makes a seed decide a token, and the draw: pure functions.

The token at absolute position p of a request with seed s is argmax_v(l'[v] + T * g(s, p, v)), with l' the
processed logits, T the temperature and g standard Gumbel noise (the Gumbel-max trick: an exact draw from
softmax(l'/T)). The noise is a hash of (s, p, v), so the draw does not depend on batch, tree, device or
vocabulary padding. Shapes: N rows (tree nodes), P positions, V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 sees them."""
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value


def _splitmix(value: int) -> int:
    """SplitMix64's finalizer (Steele et al. 2014) on Python integers."""
    value = (value ^ (value >> 30)) * _MIX1 & _MASK64
    value = (value ^ (value >> 27)) * _MIX2 & _MASK64
    return value ^ (value >> 31)


def noise_keys(seed: int, positions: Iterable[int]) -> list[int]:
    """The generator's states for positions of one request, as torch's int64 holds them."""
    stream = _splitmix((seed + _GOLDEN) & _MASK64)
    return [_signed(_splitmix(stream + position * _GOLDEN & _MASK64)) for position in positions]


def gumbel_noise(seed: int, positions: Iterable[int], token_ids_V: Tensor) -> Tensor:
    """Standard Gumbel noise [P, V] of float32 for each position and token id (int64)."""
    keys = torch.tensor(noise_keys(seed, positions), device=token_ids_V.device)
    return noise_of_keys(keys, token_ids_V)


def noise_of_keys(keys: Tensor, token_ids_V: Tensor) -> Tensor:
    """Noise [..., V] for keys [...] of `noise_keys`.

    A counter-based generator: SplitMix64 over (hash of seed and position) + token * golden ratio. The top 52
    bits give u in (0, 1); logarithms are taken in float64 so that CPU and CUDA agree to float32 rounding.
    """
    x = keys[..., None] + token_ids_V * _signed(_GOLDEN)
    x ^= (x >> 30) & (2**34 - 1)  # int64 shifts carry the sign: mask it to shift in zeros
    x *= _signed(_MIX1)
    x ^= (x >> 27) & (2**37 - 1)
    x *= _signed(_MIX2)
    x ^= (x >> 31) & (2**33 - 1)
    uniform = ((x >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()


NoiseOfKeys = Callable[[Tensor], Tensor]
"""keys [B, P] of `noise_keys` -> noise [B, P, V]"""


class Noise:
    """The noise of some positions in a row, drawn when it is asked for. `keys_BP`: of `noise_keys`."""

    def __init__(self, keys_BP: Tensor, draw: NoiseOfKeys) -> None:
        self.keys_BP, self._draw = keys_BP, draw
        self._rows_BPV: Tensor | None = None

    def first(self, count: int) -> Tensor:
        """Of the first `count` positions [B, count, V]; what is drawn once is kept."""
        if self._rows_BPV is None:
            self._rows_BPV = self._draw(self.keys_BP[:, : max(2, count)])
        known = self._rows_BPV.shape[1]
        if count > known:
            first = min(known, count - 2)  # two at least, as compiled programs want it
            more = self._draw(self.keys_BP[:, first:count])
            self._rows_BPV = torch.cat([self._rows_BPV[:, :first], more], dim=1)
        return self._rows_BPV[:, :count]


def draw_tokens(processed_NV: Tensor, temperature: float, noise_NV: Tensor | None) -> Tensor:
    """The token [N] each row decides: plain argmax at temperature 0, else with the position's noise."""
    if temperature == 0.0 or noise_NV is None:
        return processed_NV.argmax(dim=-1)
    return (processed_NV + temperature * noise_NV).argmax(dim=-1)
