"""Heads into the layouts we write: A (B where the output layer is the backbone's) and F, both safetensors.

The keys are the published ones, so that other servers and the references read them too. A token map, which
those layouts never had, is a key `token_map` of its own.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_core.checkpoints.formats import PLAIN, TOKEN_MAP, HeadLayout
from medusa_core.checkpoints.hydra_format import (
    ARCH_MLP,
    ARCH_PREFIX,
    PREFIX,
    written_layout,
)
from medusa_core.checkpoints.weights import HeadWeights, HydraWeights, Linear, MedusaWeights
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads

HEADS_FILE, HYDRA_FILE = "medusa_lm_head.safetensors", "hydra_lm_head.safetensors"
SHARED_OUTPUT_VERSION = "2"  # how TGI marks format B


def save_heads(heads: MedusaHeads | HydraHeads, directory: str | Path, *, base_model: str) -> None:
    """Write `medusa_lm_head.safetensors` or `hydra_lm_head.safetensors`, and config.json beside it.

    A reader sees the old file or the new one, whole. `base_model` is the backbone's Hub name or path, for
    readers that start from the heads.
    """
    write_weights(weights_of(heads), directory, base_model=base_model, vocab_size=heads.vocab_size)


def write_weights(
    weights: HeadWeights, directory: str | Path, *, base_model: str | None, vocab_size: int | None
) -> Path:
    """Write the weights in our layout for their kind; returns the file. `vocab_size`: output rows."""
    config: dict[str, Any] = {} if base_model is None else {"base_model_name_or_path": base_model}
    if isinstance(weights, HydraWeights):
        name, tensors = HYDRA_FILE, _hydra_tensors(weights)
        config |= {
            "hydra_head_arch": ARCH_MLP if weights.prefix is None else ARCH_PREFIX,
            "hydra_num_heads": weights.num_heads,
            "hydra_num_layers": weights.num_layers,
            "grounded_heads": True,
            "hidden_state_offset": 0,
        }
    else:
        name, tensors = HEADS_FILE, medusa_tensors(weights)
        config |= {"medusa_num_heads": weights.num_heads, "medusa_num_layers": weights.num_layers}
    config["hidden_size"] = weights.hidden_size
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if not weights.outputs:
        config["version"] = SHARED_OUTPUT_VERSION
    write_files(directory, name, tensors, config)
    return Path(directory) / name


def write_files(directory: str | Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A safetensors file and config.json, each of them written beside its target and renamed."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share storage, as those of a stacked parameter or tied ones do.
    own = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    _replace(folder / name, lambda path: save_file(own, path, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Pretty JSON, written beside the target and renamed."""
    text = json.dumps(value, indent=2) + "\n"
    _replace(path, lambda temporary: _write_text(temporary, text))


def weights_of(heads: MedusaHeads | HydraHeads) -> HeadWeights:
    """The heads' parameters as plain tensors, whatever their kind."""
    return hydra_weights(heads) if isinstance(heads, HydraHeads) else medusa_weights(heads)


def medusa_weights(heads: MedusaHeads) -> MedusaWeights:
    """One view a head; no output layers where they are shared."""
    outputs = () if heads.output_KVE is None else tuple(heads.output_KVE)
    return MedusaWeights(_blocks(heads), outputs, heads.token_map)


def medusa_tensors(weights: MedusaWeights, *, prefix: str = "") -> dict[str, Tensor]:
    """The weights under format A's keys."""
    layout = HeadLayout(PLAIN, weights.num_heads, weights.num_layers, len(weights.outputs))
    tensors = {}
    for head, blocks in enumerate(weights.blocks):
        for layer, block in enumerate(blocks):
            tensors[layout.block_key(head, layer, "weight")] = block.weight
            bias = block.weight.new_zeros(len(block.weight)) if block.bias is None else block.bias
            tensors[layout.block_key(head, layer, "bias")] = bias
    tensors |= {layout.output_key(head): output for head, output in enumerate(weights.outputs)}
    if weights.token_map is not None:
        tensors[TOKEN_MAP] = weights.token_map
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _hydra_tensors(weights: HydraWeights) -> dict[str, Tensor]:
    """The weights under format F's keys."""
    layout = written_layout(weights)
    modules: dict[str, Linear] = {}
    for head, blocks in enumerate(weights.blocks):
        modules[layout.block_key(head, 0, "linear")] = weights.linear[head]
        modules[layout.block_key(head, 0, "res_connection")] = weights.residual[head]
        for layer, block in enumerate(blocks, start=1):
            modules[layout.block_key(head, layer, "linear")] = block
        if weights.outputs:
            modules[layout.output_key(head)] = weights.outputs[head]
    tensors = {f"{module}.weight": linear.weight for module, linear in modules.items()}
    tensors |= {
        f"{module}.bias": linear.bias for module, linear in modules.items() if linear.bias is not None
    }
    tensors |= {PREFIX + key: tensor for key, tensor in (weights.prefix or {}).items()}
    if weights.token_map is not None:
        tensors[TOKEN_MAP] = weights.token_map
    return tensors


def hydra_weights(heads: HydraHeads) -> HydraWeights:
    """One view a head; no output layers where they are shared."""
    firsts = list(zip(heads.first_weights, heads.first_biases, strict=True))
    outputs: tuple[Linear, ...] = ()
    if heads.output_KVE is not None and heads.output_bias_KV is not None:
        pairs = zip(heads.output_KVE, heads.output_bias_KV, strict=True)
        outputs = tuple(Linear(weight, bias) for weight, bias in pairs)
    return HydraWeights(
        linear=tuple(Linear(weight[0], bias[0]) for weight, bias in firsts),
        residual=tuple(Linear(weight[1], bias[1]) for weight, bias in firsts),
        blocks=_blocks(heads),
        outputs=outputs,
        prefix=None if heads.prefix is None else dict(heads.prefix.model.state_dict()),
        token_map=heads.token_map,
    )


def _blocks(heads: MedusaHeads | HydraHeads) -> tuple[tuple[Linear, ...], ...]:
    layers = list(zip(heads.block_weights, heads.block_biases, strict=True))
    return tuple(
        tuple(Linear(weight[head], bias[head]) for weight, bias in layers) for head in range(heads.num_heads)
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target, then rename over it."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's 0600 would hide the heads from a server of another user
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
