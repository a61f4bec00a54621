"""Head files into `MedusaHeads`: find them, check them, stack them."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from medusa_core.checkpoints.formats import (
    HEAD_PREFIX,
    HeadLayout,
    block_key,
    check_tensors,
    output_key,
    parse_layout,
    strip_prefix,
)
from medusa_core.checkpoints.weight_files import Repository, model_keys, read_json, read_tensors
from medusa_core.errors import CheckpointError
from medusa_core.heads.medusa import MedusaHeads

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")  # in order of preference
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")
HEADS_FOLDER = "medusa-1"

log = logging.getLogger(__name__)


def load_heads(
    path: str | Path,
    *,
    hidden_size: int,
    vocab_size: int,
    lm_head_weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MedusaHeads:
    """Heads of any Medusa layout from a file, a directory or a Hub repository, checked against the backbone.

    `vocab_size` is the number of tokens that exist, V. `lm_head_weight` [>= V, E] is the backbone's output
    layer: needed by heads that share it, and its rows beyond V say how far the heads' own may be padded.
    Rows of padding are dropped; heads with fewer than V rows never draft the tokens beyond. Raises
    `CheckpointError`.
    """
    tensors = _read(path)
    source = str(path)
    layout = parse_layout(source, tensors)
    rows = check_tensors(source, tensors, layout, hidden_size)
    heads = MedusaHeads(
        num_heads=layout.num_heads,
        num_layers=layout.num_layers,
        hidden_size=hidden_size,
        vocab_size=_check_vocabulary(source, layout, rows, vocab_size, lm_head_weight),
        shared_output=None if layout.has_output else lm_head_weight,
        dtype=dtype,
        device=device,
    )
    _fill(heads, tensors, layout)
    return heads.eval().requires_grad_(False)


def find_heads(model_dir: Path) -> Path | None:
    """Where the heads beside a local model are: its `medusa-1` folder, or itself if it holds any."""
    for folder in (model_dir / HEADS_FOLDER, model_dir):
        if any((folder / name).is_file() for name in HEAD_FILES):
            return folder
    return model_dir if model_dir.is_dir() and head_keys(model_dir) else None


def head_keys(model_dir: str | Path) -> list[str]:
    """The `medusa_head.*` keys among a model's weights (format C), which its backbone must ignore."""
    return [key for key in model_keys(Repository.at(model_dir)) if key.startswith(HEAD_PREFIX)]


def _read(path: str | Path) -> dict[str, Tensor]:
    """All head tensors at `path`, keyed as in format A."""
    file = Path(path).expanduser()
    if file.is_file() and file.suffix in WEIGHT_SUFFIXES:
        return strip_prefix(read_tensors(file, lambda key: True))
    repository = Repository.at(path)
    for name in HEAD_FILES:
        found = repository.fetch(name)
        if found is not None:
            tensors = strip_prefix(read_tensors(found, lambda key: True))
            _compare_with_config(repository, tensors)
            return tensors
    return _read_full_model(repository)


def _read_full_model(repository: Repository) -> dict[str, Tensor]:
    """Format C: only the shards that hold heads are read (or downloaded)."""
    files = {file for key, file in model_keys(repository).items() if key.startswith(HEAD_PREFIX)}
    if not files:
        raise CheckpointError(
            f"no heads at {repository.name}: neither {' nor '.join(HEAD_FILES)}, "
            f"nor {HEAD_PREFIX}* among model weights"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        shard = repository.fetch(name)
        if shard is None:
            raise CheckpointError(f"{repository.name} lacks {name}, which its index names")
        tensors |= read_tensors(shard, lambda key: key.startswith(HEAD_PREFIX))
    return strip_prefix(tensors)


def _compare_with_config(repository: Repository, tensors: dict[str, Tensor]) -> None:
    """Say so where config.json is wrong: published ones claim 2 heads for files that hold 5."""
    path = repository.fetch("config.json")
    if path is None:
        return
    claimed = read_json(path).get("medusa_num_heads")
    held = len({key.split(".")[0] for key in tensors})
    if claimed is not None and claimed != held:
        log.info("%s: config.json says %s heads, the file holds %d", repository.name, claimed, held)


def _check_vocabulary(
    source: str, layout: HeadLayout, rows: int, vocab_size: int, lm_head_weight: Tensor | None
) -> int:
    """Output rows the heads get."""
    if not layout.has_output:
        if lm_head_weight is None:
            raise CheckpointError(
                f"{source}: these heads share the backbone's output layer, which was not given"
            )
        return min(vocab_size, len(lm_head_weight))
    limit = vocab_size if lm_head_weight is None else max(vocab_size, len(lm_head_weight))
    if not 0 < rows <= limit:
        raise CheckpointError(f"{source}: heads have a vocabulary of {rows}, the backbone's is {limit}")
    if rows < vocab_size:
        log.warning("%s: heads know only the first %d of %d tokens", source, rows, vocab_size)
    return min(rows, vocab_size)


@torch.no_grad()
def _fill(heads: MedusaHeads, tensors: dict[str, Tensor], layout: HeadLayout) -> None:
    """Copy the file's tensors into the stacked parameters, converting dtype and device."""
    for head in range(layout.num_heads):
        for layer in range(layout.num_layers):
            heads.block_weights[layer][head].copy_(tensors[block_key(head, layer, "weight")])
            heads.block_biases[layer][head].copy_(tensors[block_key(head, layer, "bias")])
        if heads.output_KVE is not None:
            output = tensors[output_key(head, layout.num_layers)]
            heads.output_KVE[head].copy_(output[: heads.vocab_size])
