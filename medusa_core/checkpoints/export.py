"""Exports heads to other layouts. What a target cannot express is refused, not dropped."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from medusa_core.checkpoints.conversion import Base, Conversion, read_base
from medusa_core.checkpoints.head_files import HeadFile, fetch_beside, read_heads
from medusa_core.checkpoints.medusa_format import HEAD_PREFIX
from medusa_core.checkpoints.reading import parse_weights, with_backbone_output
from medusa_core.checkpoints.vllm_export import export_vllm
from medusa_core.checkpoints.weights import HeadWeights, Linear, MedusaWeights
from medusa_core.checkpoints.writing import write_weights
from medusa_core.draft.accuracy import FILE_NAME as CALIBRATION_FILE
from medusa_core.errors import CheckpointError


def convert_heads(
    source: str | Path, out: str | Path, target: str, *, model: str | None = None
) -> HeadWeights:
    """Write the heads at `source` into the empty or new directory `out`; returns what was written.

    `target` is a key of `EXPORTERS`. `model` is the backbone (a directory or Hub name): needed where the
    target wants an output layer that the heads share with it, its name or its vocabulary. Tensors keep their
    dtype. Raises `CheckpointError`.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty directory: name a new one")
    file = read_heads(source)
    base = None if model is None else read_base(model)
    weights = parse_weights(file, None if base is None else base.hidden_size)
    if base is not None:
        _check_fits(file.source, weights, base)
    conversion = Conversion(file, weights, base, model or _stated_base(file, source))
    calibration = fetch_beside(source, CALIBRATION_FILE)
    try:
        written = EXPORTERS[target](conversion, folder)
        if target == "safetensors" and calibration is not None:
            shutil.copyfile(calibration, folder / CALIBRATION_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write to {folder}: {error}") from error
    return written


def export_safetensors(conversion: Conversion, out: Path) -> HeadWeights:
    """Our own layouts: A, B or F as safetensors."""
    weights = conversion.weights
    if isinstance(weights, MedusaWeights):
        weights = with_backbone_output(weights, conversion.lm_head_weight)
    write_weights(weights, out, base_model=conversion.base_name, vocab_size=conversion.rows)
    return weights


def export_tgi(conversion: Conversion, out: Path) -> HeadWeights:
    """Layout A (its "v1") or B ("v2", of one layer only). config.json must not have `architectures`."""
    weights = with_backbone_output(conversion.medusa_weights("TGI"), conversion.lm_head_weight)
    source = conversion.file.source
    if weights.token_map is not None:
        raise CheckpointError(f"{source} has a token map, which TGI does not know")
    if conversion.base_name is None:
        raise CheckpointError(f"{source} does not say which model it is for, as TGI must know: give --model")
    if not weights.outputs and weights.num_layers > 1:
        if conversion.base is None:
            raise CheckpointError(
                f"{source}: TGI takes shared output layers for heads of one layer only, these have "
                f"{weights.num_layers}: with --model, they get output layers of their own"
            )
        output = Linear(conversion.base.lm_head_weight)
        weights = replace(weights, outputs=(output,) * weights.num_heads)
    write_weights(weights, out, base_model=conversion.base_name, vocab_size=conversion.rows)
    return weights


EXPORTERS: dict[str, Callable[[Conversion, Path], HeadWeights]] = {
    "tgi": export_tgi,
    "vllm": export_vllm,
    "safetensors": export_safetensors,
}


def _check_fits(source: str, weights: HeadWeights, base: Base) -> None:
    limit = len(base.lm_head_weight)
    highest = (weights.rows or 1) - 1 if weights.token_map is None else int(weights.token_map.max())
    if highest >= limit:
        raise CheckpointError(
            f"{source}: heads have a vocabulary of {highest + 1}, that of {base.name} is {limit}"
        )


def _stated_base(file: HeadFile, source: str | Path) -> str | None:
    """The backbone's name from config.json; heads among a model's weights are for that model."""
    if any(key.startswith(HEAD_PREFIX) for key in file.tensors):
        return str(source)
    name = file.config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
