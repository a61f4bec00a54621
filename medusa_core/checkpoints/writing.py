"""`MedusaHeads` into format A (B where the output layer is the backbone's), readable by other servers too."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from medusa_core.checkpoints.formats import block_key, output_key
from medusa_core.heads.medusa import MedusaHeads

WEIGHTS_FILE = "medusa_lm_head.safetensors"
SHARED_OUTPUT_VERSION = "2"  # how TGI marks format B


def save_heads(heads: MedusaHeads, directory: str | Path, *, base_model: str) -> None:
    """Write `medusa_lm_head.safetensors` and config.json; a reader sees the old file or the new one, whole.

    `base_model` is the backbone's Hub name or path, for readers that start from the heads.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": base_model,
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
    }
    if heads.is_shared:
        config["version"] = SHARED_OUTPUT_VERSION
    tensors = _tensors(heads)
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / "config.json", lambda path: _write_text(path, json.dumps(config, indent=2) + "\n"))


def _tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    """The heads under format A's keys."""
    tensors = {}
    for head in range(heads.num_heads):
        for layer in range(heads.num_layers):
            tensors[block_key(head, layer, "weight")] = heads.block_weights[layer][head]
            tensors[block_key(head, layer, "bias")] = heads.block_biases[layer][head]
        if heads.output_KVE is not None:
            tensors[output_key(head, heads.num_layers)] = heads.output_KVE[head]
    # Copies: safetensors refuses tensors that share the storage of a stacked parameter.
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


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
