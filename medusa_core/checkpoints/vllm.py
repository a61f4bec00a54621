"""Exports Medusa heads to vLLM's layout (D)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from medusa_core.checkpoints.conversion import Conversion
from medusa_core.checkpoints.keys import VLLM
from medusa_core.checkpoints.weights import HeadWeights, Linear, MedusaWeights
from medusa_core.checkpoints.writing import medusa_tensors, write_files
from medusa_core.errors import CheckpointError

VLLM_FILE = "model.safetensors"
VLLM_DEFAULTS = {"max_paths": 64, "topk": 10}


def export_vllm(conversion: Conversion, out: Path) -> HeadWeights:
    """Layout D with the config vLLM's `MedusaConfig` reads."""
    weights = conversion.medusa_weights("vLLM")
    vocab_size = _whole_vocabulary(conversion)
    if weights.token_map is not None and len(weights.token_map) == vocab_size:
        # vLLM ignores a map that does not shorten the vocabulary.
        order = weights.token_map.argsort()
        outputs = tuple(Linear(output.weight[order]) for output in weights.outputs)
        weights = MedusaWeights(blocks=weights.blocks, outputs=outputs)
    if not weights.outputs:
        weights = replace(weights, outputs=(Linear(_shared_rows(conversion, weights)),))
    has_bias = weights.blocks[0][0].bias is not None
    config: dict[str, Any] = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": weights.hidden_size,
        "vocab_size": vocab_size,
        # Its loader takes every key with "num" and "heads" or "layers" in it for these two.
        "num_heads": weights.num_heads,
        "num_hidden_layers": weights.num_layers,
        **VLLM_DEFAULTS,
        "truncated_vocab_size": None if weights.token_map is None else len(weights.token_map),
        "original_lm_head": len(weights.outputs) < weights.num_heads,
        "medusa_fc_bias": has_bias,
        "torch_dtype": str(weights.outputs[0].weight.dtype).removeprefix("torch."),
    }
    if conversion.base_name is not None:
        config["base_model_name_or_path"] = conversion.base_name
    write_files(out, VLLM_FILE, medusa_tensors(weights, VLLM, has_bias=has_bias), config)
    return weights


def _shared_rows(conversion: Conversion, weights: MedusaWeights) -> Tensor:
    """The backbone's output rows for the heads that share them."""
    if conversion.base is None:
        raise CheckpointError(
            f"{conversion.file.source} shares the backbone's output layer, which vLLM's layout holds a copy "
            "of: give --model"
        )
    weight = conversion.base.lm_head_weight
    rows = weight if weights.token_map is None else weight[weights.token_map]
    return rows.to(weights.blocks[0][0].weight.dtype)


def _whole_vocabulary(conversion: Conversion) -> int:
    """The vocabulary of the target model, which vLLM wants beside the rows of a shortened one."""
    weights, config = conversion.weights, conversion.file.config
    if weights.token_map is None:
        return int(weights.rows or conversion.rows or 0)
    if conversion.base is not None:
        return len(conversion.base.lm_head_weight)
    if config.get("truncated_vocab_size") == len(weights.token_map) and isinstance(
        config.get("vocab_size"), int
    ):
        return int(config["vocab_size"])
    raise CheckpointError(
        f"{conversion.file.source} has a token map; vLLM must know the whole vocabulary: give --model"
    )
