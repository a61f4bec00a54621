"""From logits to the one token a request's seed decides: pure functions.

The token at absolute position p of a request with seed s is argmax_v(l'[v] + T * g(s, p, v)), with l' the
processed logits, T the temperature and g standard Gumbel noise (the Gumbel-max trick: an exact draw from
softmax(l'/T)). The noise is a hash of (s, p, v), so the draw does not depend on batch, tree, device or
vocabulary padding. Shapes: N rows (tree nodes), P positions, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medusa_core.sampling_params import SamplingParams

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROUNDING = 1e-4  # a winner this close to a filter's threshold is judged by the filter itself
NUCLEUS_PREFIX = 128  # candidates looked at before falling back to sorting the whole vocabulary


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 sees them."""
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value


def _splitmix(value: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014) on Python integers."""
    value = (value ^ (value >> 30)) * _MIX1 & _MASK64
    value = (value ^ (value >> 27)) * _MIX2 & _MASK64
    return value ^ (value >> 31)


def _position_key(seed: int, position: int) -> int:
    return _splitmix(_splitmix((seed + _GOLDEN) & _MASK64) + position * _GOLDEN & _MASK64)


def gumbel_noise(seed: int, positions: Sequence[int], token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise [P, V] of float32 for each position and token id [V] (int64).

    A counter-based generator: SplitMix64 over (hash of seed and position) + token * golden ratio. The top 52
    bits give u in (0, 1); logarithms are taken in float64 so that CPU and CUDA agree to float32 rounding.
    """
    keys = torch.tensor([_signed(_position_key(seed, p)) for p in positions], device=token_ids.device)
    x = keys[:, None] + token_ids[None, :] * _signed(_GOLDEN)
    x ^= (x >> 30) & (2**34 - 1)  # int64 shifts carry the sign: mask it to shift in zeros
    x *= _signed(_MIX1)
    x ^= (x >> 27) & (2**37 - 1)
    x *= _signed(_MIX2)
    x ^= (x >> 31) & (2**33 - 1)
    uniform = ((x >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()


def process_logits(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """Logits with the tokens that top-k, top-p and min-p (judged at the temperature) exclude set to -inf.

    Each row stands alone. Ties at a threshold are all kept, so the result does not depend on a sort's order.
    """
    logits = logits_NV.float()
    if params.is_greedy:
        return logits
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1.0:
        logits = _keep_nucleus(logits, params.temperature, params.top_p)
    if params.min_p > 0.0:
        scaled = logits / params.temperature
        floor = scaled.max(dim=-1, keepdim=True).values + math.log(params.min_p)
        logits = logits.masked_fill(scaled < floor, -torch.inf)
    return logits


def _keep_nucleus(logits_NV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Top-p: the fewest likeliest tokens whose probability reaches `top_p` (Holtzman et al. 2020)."""
    scaled = logits_NV / temperature
    log_total = scaled.logsumexp(dim=-1, keepdim=True)
    vocab = scaled.shape[-1]
    count = min(vocab, NUCLEUS_PREFIX)
    best = scaled.topk(count, dim=-1).values
    cumulative = (best - log_total).exp().cumsum(dim=-1)
    if count < vocab and not bool((cumulative[..., -1] >= top_p).all()):
        best = scaled.sort(dim=-1, descending=True).values
        cumulative = (best - log_total).exp().cumsum(dim=-1)
    # The last kept token is the first at which the mass reaches top_p.
    last = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp_(max=best.shape[-1] - 1)
    return logits_NV.masked_fill(scaled < best.gather(-1, last), -torch.inf)


def draw_tokens(processed_NV: Tensor, temperature: float, noise_NV: Tensor | None) -> Tensor:
    """The token [N] each row decides: plain argmax at temperature 0, else with the position's noise."""
    if temperature == 0.0 or noise_NV is None:
        return processed_NV.argmax(dim=-1)
    return (processed_NV + temperature * noise_NV).argmax(dim=-1)


def decide_tokens(logits_NV: Tensor, params: SamplingParams, noise_NV: Tensor | None) -> Tensor:
    """`draw_tokens(process_logits(...))` [N], mostly without processing.

    The winner among all tokens is the winner among the kept ones if it is kept itself. So the draw comes
    first, and only rows whose winner the filters exclude are filtered and drawn again: sorting 16 rows to
    find their nuclei takes longer than everything else in this function.
    """
    logits = logits_NV.float()
    if params.top_k > 0:
        return draw_tokens(process_logits(logits, params), params.temperature, noise_NV)
    winners = draw_tokens(logits, params.temperature, noise_NV)
    if params.is_greedy or noise_NV is None or (params.top_p == 1.0 and params.min_p == 0.0):
        return winners
    doubtful = (~_is_kept(logits, winners, params)).nonzero()[:, 0]
    if len(doubtful):
        processed = process_logits(logits[doubtful], params)
        winners[doubtful] = draw_tokens(processed, params.temperature, noise_NV[doubtful])
    return winners


def _is_kept(logits_NV: Tensor, tokens_N: Tensor, params: SamplingParams) -> Tensor:
    """Whether each row's token certainly passes top-p and min-p (no top-k)."""
    scaled = logits_NV / params.temperature
    own = scaled.gather(-1, tokens_N[:, None])
    mass_above = scaled.softmax(dim=-1).masked_fill_(scaled <= own, 0.0).sum(dim=-1)
    kept = mass_above < params.top_p - ROUNDING
    if params.min_p > 0.0:
        kept &= own[:, 0] > scaled.amax(dim=-1) + math.log(params.min_p) + ROUNDING
    return kept
