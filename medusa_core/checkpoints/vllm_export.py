"""Exports Medusa heads as vLLM loads them: layout D, with a row of output for every token of the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_core.checkpoints.conversion import Conversion
from medusa_core.checkpoints.medusa_format import VLLM
from medusa_core.checkpoints.weights import HeadWeights, Linear, MedusaWeights
from medusa_core.checkpoints.writing import medusa_tensors, write_files
from medusa_core.errors import CheckpointError

VLLM_FILE = "model.safetensors"
VLLM_DEFAULTS = {"max_paths": 64, "topk": 10}


def export_vllm(conversion: Conversion, out: Path) -> HeadWeights:
    """Layout D with the config vLLM's `MedusaConfig` reads."""
    weights = conversion.medusa_weights("vLLM")
    vocab_size = _whole_vocabulary(conversion)
    if not weights.outputs:
        weights = replace(weights, outputs=(Linear(_shared_rows(conversion, weights)),))
    weights = _with_every_row(weights, vocab_size)
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
        "truncated_vocab_size": None,
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
    """The vocabulary of the target model, which vLLM's config must state."""
    weights, file = conversion.weights, conversion.file
    if conversion.base is not None:
        return len(conversion.base.lm_head_weight)
    known = weights.rows or 0 if weights.token_map is None else 1 + int(weights.token_map.max())
    stated = file.config.get("vocab_size")
    if "truncated_vocab_size" in file.config and isinstance(stated, int) and stated >= known:
        return stated  # by a config of vLLM's; in others it may be the rows
    if weights.token_map is None:
        return known
    raise CheckpointError(f"{file.source} has a token map; vLLM must know the whole vocabulary: give --model")


def _with_every_row(weights: MedusaWeights, vocab_size: int) -> MedusaWeights:
    """Output layers [V, E], for vLLM (0.32) refuses shorter ones, and token maps that would shorten them.

    Rows that were not there become the mean of the others: so does their logit, which then never is the
    highest. The token map, which vLLM ignores beside whole layers, says which rows are true: we read those.
    """
    if weights.token_map is None and weights.rows == vocab_size:
        return weights
    known = torch.arange(weights.rows or 0) if weights.token_map is None else weights.token_map
    outputs = tuple(Linear(_whole_rows(output.weight, known, vocab_size)) for output in weights.outputs)
    return replace(weights, outputs=outputs, token_map=known if len(known) < vocab_size else None)


def _whole_rows(rows: Tensor, known: Tensor, vocab_size: int) -> Tensor:
    """Output rows [V, E] by token id, of `rows` for the `known` ids."""
    mean = rows.mean(dim=0, dtype=torch.float32).to(rows.dtype)
    whole = mean.repeat(vocab_size, 1)
    whole[known] = rows
    return whole
