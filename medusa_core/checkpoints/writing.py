"""Writes draft heads as safetensors: Medusa in layout A (B if they share the output layer), Hydra in F, whole
models with Medusa heads inside in C.

Keys are the published ones, so other servers and the references read them too. Those layouts have no token
map; ours is one more key, `token_map`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_core.checkpoints.hydra_format import ARCH_MLP, ARCH_PREFIX, PREFIX, written_layout
from medusa_core.checkpoints.medusa_format import IN_MODEL, PLAIN, TOKEN_MAP, HeadLayout, Naming
from medusa_core.checkpoints.modules import medusa_weights, weights_of
from medusa_core.checkpoints.weight_files import INDEX_SUFFIX, MODEL_FILES
from medusa_core.checkpoints.weights import HeadWeights, HydraWeights, Linear, MedusaWeights
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.files import read_json, replace_file, write_json

HEADS_FILE, HYDRA_FILE = "medusa_lm_head.safetensors", "hydra_lm_head.safetensors"
SHARED_OUTPUT_VERSION = "2"  # how TGI marks format B


def save_heads(heads: MedusaHeads | HydraHeads, directory: str | Path, *, base_model: str) -> None:
    """Write `medusa_lm_head.safetensors` or `hydra_lm_head.safetensors`, and config.json beside it.

    Each file is replaced atomically. `base_model`: the backbone's Hub name or path, kept in config.json.
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
    """Write a safetensors file and config.json, each replaced atomically."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share storage, as those of a stacked parameter or tied ones do.
    own = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    replace_file(folder / name, lambda path: save_file(own, path, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)


def medusa_tensors(
    weights: MedusaWeights, naming: Naming = PLAIN, *, has_bias: bool = True
) -> dict[str, Tensor]:
    """The weights under a layout's keys; a bias they lack is written as zeros."""
    layout = HeadLayout(naming, weights.num_heads, weights.num_layers, len(weights.outputs))
    tensors = {layout.output_key(head): output.weight for head, output in enumerate(weights.outputs)}
    for head, blocks in enumerate(weights.blocks):
        for layer, block in enumerate(blocks):
            tensors[layout.block_key(head, layer, "weight")] = block.weight
            if has_bias:
                bias = block.weight.new_zeros(len(block.weight)) if block.bias is None else block.bias
                tensors[layout.block_key(head, layer, "bias")] = bias
    return tensors if weights.token_map is None else tensors | {naming.token_map: weights.token_map}


def _hydra_tensors(weights: HydraWeights) -> dict[str, Tensor]:
    """The weights under format F's keys."""
    layout = written_layout(weights)
    modules: dict[str, Linear] = {}
    for head, blocks in enumerate(weights.blocks):
        modules[layout.block_key(head, 0)] = weights.linear[head]
        modules[layout.block_key(head, 0, "res_connection")] = weights.residual[head]
        for layer, block in enumerate(blocks, start=1):
            modules[layout.block_key(head, layer)] = block
        if weights.outputs:
            modules[layout.output_key(head)] = weights.outputs[head]
    tensors = {f"{module}.weight": linear.weight for module, linear in modules.items()}
    tensors |= {
        f"{module}.bias": linear.bias for module, linear in modules.items() if linear.bias is not None
    }
    tensors |= {PREFIX + key: tensor for key, tensor in (weights.prefix or {}).items()}
    return tensors if weights.token_map is None else tensors | {TOKEN_MAP: weights.token_map}


DEFAULT_SHARD_SIZE = "5GB"


def save_full_model(
    model: PreTrainedModel,
    heads: MedusaHeads,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> Path:
    """Save a tuned backbone and its heads as one model that transformers, our loader and the reference read.

    Heads are `medusa_head.*` keys in the same (sharded) safetensors as the backbone's, in their own dtype;
    config.json gains `medusa_num_heads` and `medusa_num_layers`. Adapters must have been merged into `model`.
    `load_parts(directory, None, ...)` then finds model and heads. Heads of other kinds have no such layout:
    save them beside the model, with `save_heads`. Returns the directory.
    """
    folder = Path(directory)
    head_tensors = {
        key: tensor.detach().clone()
        for key, tensor in medusa_tensors(medusa_weights(heads), IN_MODEL).items()
    }
    model.save_pretrained(
        folder, state_dict=dict(model.state_dict()) | head_tensors, max_shard_size=max_shard_size
    )
    _remove_stale(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config_path = folder / "config.json"
    config = read_json(config_path)
    config |= {"medusa_num_heads": heads.num_heads, "medusa_num_layers": heads.num_layers}
    write_json(config_path, config)
    return folder


def _remove_stale(folder: Path) -> None:
    """Remove an earlier save's single file or index: transformers removes old shards, but not these."""
    name = MODEL_FILES[0]
    is_sharded = any(folder.glob("model-*-of-*.safetensors"))
    (folder / (name if is_sharded else name + INDEX_SUFFIX)).unlink(missing_ok=True)
