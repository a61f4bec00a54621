"""Linear layers whose weights oneDNN has laid out once for its own kernels.

A plain bfloat16 product lays them out anew in every call, which at a few rows takes longer than the product.
The unpacked copy is dropped, so that a packed model serves and no longer trains.
"""

import time
from itertools import islice

import torch
from torch import Tensor, nn

TRIAL_LAYERS, TRIAL_ROWS, TRIALS = 8, 16, 7


class PackedLinear(nn.Module):
    """A `Linear` by oneDNN; `weight` [out, in] is packed by `pack`, until then a plain one that works too."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def pack(self) -> None:
        """Replace the weight by its packed form. Once only: a packed one has no rows to look at."""
        if not self.weight.is_mkldnn:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data.contiguous())
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return result


def pack_linears(module: nn.Module, *, pack: bool = True) -> int:
    """Replace every plain `Linear` below a module; returns how many. `pack` False: for its structure only.

    Quantized and otherwise special layers, which are of other types, stay as they are.
    """
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            packed = PackedLinear(child.weight, child.bias)
            setattr(module, name, packed)
            if pack:
                packed.pack()
            count += 1
        else:
            count += pack_linears(child, pack=pack)
    return count


def is_packed(module: nn.Module) -> bool:
    """Whether its linear layers were replaced."""
    return any(isinstance(layer, PackedLinear) for layer in module.modules())


@torch.inference_mode()
def packing_pays(module: nn.Module) -> bool:
    """Whether the largest of a module's first layers is faster packed, on this machine."""
    layers = islice((layer for layer in module.modules() if type(layer) is nn.Linear), TRIAL_LAYERS)
    plain = max(layers, key=lambda layer: layer.weight.numel(), default=None)
    if plain is None or plain.weight.device.type != "cpu":
        return False
    packed = PackedLinear(plain.weight, plain.bias)
    try:
        packed.pack()
    except RuntimeError:  # oneDNN has no kernel for this type on this processor
        return False
    rows = torch.zeros(TRIAL_ROWS, plain.in_features, dtype=plain.weight.dtype)
    seconds: dict[nn.Module, list[float]] = {plain: [], packed: []}
    for _ in range(TRIALS):
        for layer, times in seconds.items():
            start = time.perf_counter()
            layer(rows)
            times.append(time.perf_counter() - start)
    return min(seconds[packed]) < min(seconds[plain])
