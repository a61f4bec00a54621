"""Writes layout C: a whole model whose weight files include its heads, for jointly trained ones."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_core.checkpoints.keys import IN_MODEL
from medusa_core.checkpoints.parameters import medusa_weights
from medusa_core.checkpoints.weight_files import INDEX_SUFFIX, MODEL_FILES, read_json
from medusa_core.checkpoints.writing import medusa_tensors, write_json
from medusa_core.draft.medusa import MedusaHeads

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
