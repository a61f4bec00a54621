"""Quantizes a frozen backbone's linear layers to 8 or 4 bits with torchao or bitsandbytes.

The output layer keeps its precision: teacher and heads' first rows are read from it.
"""

from collections.abc import Callable
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel

from medusa_core.errors import ConfigError
from medusa_core.training.config import Quantization

# In order of preference.
PACKAGES = {Quantization.INT8: ("torchao", "bitsandbytes"), Quantization.INT4: ("bitsandbytes", "torchao")}


def quantize(model: PreTrainedModel, kind: Quantization) -> None:
    """Quantize every linear layer but the output layer, in place. Raises `ConfigError`."""
    installed = [package for package in PACKAGES[kind] if find_spec(package) is not None]
    if not installed:
        raise ConfigError(
            f"quantize {kind} needs {' or '.join(PACKAGES[kind])}: pip install {PACKAGES[kind][0]}"
        )
    apply = {"torchao": _with_torchao, "bitsandbytes": _with_bitsandbytes}[installed[0]]
    try:
        apply(model, kind)
    except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{installed[0]} cannot quantize this model to {kind}: {reason}") from error


def _with_torchao(model: PreTrainedModel, kind: Quantization) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == Quantization.INT8 else Int4WeightOnlyConfig()
    quantize_(model.base_model, config)


def _with_bitsandbytes(model: PreTrainedModel, kind: Quantization) -> None:
    import bitsandbytes

    def eight(old: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear8bitLt(
            old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False
        )
        new.weight = bitsandbytes.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        return new

    def four(old: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear4bit(
            old.in_features,
            old.out_features,
            old.bias is not None,
            compute_dtype=old.weight.dtype,
            quant_type="nf4",
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        return new

    _replace_linears(model.base_model, eight if kind == Quantization.INT8 else four)


def _replace_linears(root: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, module in list(root.named_modules()):
        if type(module) is not nn.Linear:
            continue
        new, device = make(module), module.weight.device
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.data, requires_grad=False)
        root.get_submodule(name.rpartition(".")[0]).register_module(
            name.rpartition(".")[2], new.to(device).requires_grad_(False)
        )
