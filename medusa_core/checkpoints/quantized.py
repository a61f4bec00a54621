"""Dequantizes ModelOpt's fp8 weights (layout E): W = scale * W_fp8, one scale per tensor or output row.

Scales of activations (`input_scale`) are dropped; everything else is refused.
"""

import torch
from torch import Tensor

from medusa_core.checkpoints.checks import check_dense, check_float
from medusa_core.errors import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHT_SCALE, INPUT_SCALE = ".weight_scale", ".input_scale"


def dequantize(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without their scales, fp8 weights in the dtype of their scale. Raises `CheckpointError`."""
    plain = {key: t for key, t in tensors.items() if not key.endswith((WEIGHT_SCALE, INPUT_SCALE))}
    for key in tensors.keys() - plain.keys():
        weight_key = key.removesuffix(WEIGHT_SCALE).removesuffix(INPUT_SCALE) + ".weight"
        if weight_key not in plain:
            raise CheckpointError(f"{source}: {key} has no {weight_key}")
        check_float(source, key, tensors[key])
    for key, tensor in plain.items():
        scale = tensors.get(key.removesuffix(".weight") + WEIGHT_SCALE) if key.endswith(".weight") else None
        is_fp8 = isinstance(tensor, Tensor) and tensor.dtype in FP8_DTYPES
        if scale is not None or is_fp8:
            plain[key] = _dequantized(source, key, tensor, scale)
    return plain


def _dequantized(source: str, key: str, tensor: object, scale: Tensor | None) -> Tensor:
    weight = check_dense(source, key, tensor)
    if weight.dtype not in FP8_DTYPES:
        raise CheckpointError(
            f"{source}: {key} is {weight.dtype} with a weight_scale; only fp8 weights can be dequantized"
        )
    if scale is None:
        raise CheckpointError(f"{source}: {key} is {weight.dtype} and lacks its weight_scale")
    if weight.ndim != 2 or tuple(scale.shape) not in ((), (1,), (1, 1), (len(weight),), (len(weight), 1)):
        raise CheckpointError(
            f"{source}: {key} {list(weight.shape)} has a weight_scale of shape {list(scale.shape)}; only one "
            "per tensor or per output row can be dequantized"
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"{source}: the weight_scale of {key} is not positive and finite")
    return weight.to(scale.dtype) * scale.reshape(-1, 1)
