"""A conversion of heads to another layout: checked weights, and what is known of their backbone."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

from medusa_core.checkpoints.head_files import HeadFile
from medusa_core.checkpoints.weight_files import Repository, model_keys, read_shards
from medusa_core.checkpoints.weights import HeadWeights, HydraWeights, MedusaWeights
from medusa_core.errors import CheckpointError, first_line
from medusa_core.model.backbone import LOADING_FAILURES

OUTPUT_KEYS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")  # of models with tied ones


@dataclass(frozen=True, slots=True)
class Base:
    """What a conversion may need of the backbone: `lm_head_weight` [V, E], padding rows included."""

    name: str
    hidden_size: int
    lm_head_weight: Tensor


@dataclass(frozen=True, slots=True)
class Conversion:
    """Checked heads on their way to another layout. `base_name`: the backbone's, None if unknown."""

    file: HeadFile
    weights: HeadWeights
    base: Base | None
    base_name: str | None

    @property
    def lm_head_weight(self) -> Tensor | None:
        return None if self.base is None else self.base.lm_head_weight

    def medusa_weights(self, target: str) -> MedusaWeights:
        """The weights; `CheckpointError` for Hydra heads, which only this project and its reference run."""
        if isinstance(self.weights, HydraWeights):
            raise CheckpointError(f"{self.file.source} holds Hydra heads, which {target} cannot run")
        return self.weights

    @property
    def rows(self) -> int | None:
        """Output rows; the backbone's if the heads share its output layer, None if unknown."""
        if self.weights.rows is None and self.base is not None:
            return len(self.base.lm_head_weight)
        return self.weights.rows


def read_base(model: str | Path) -> Base:
    """Hidden size and output layer of a backbone, without its other weights. Raises `CheckpointError`."""
    try:
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=False).get_text_config()
        hidden_size = int(config.hidden_size)
    except LOADING_FAILURES as error:
        raise CheckpointError(f"cannot read the config of {model}: {first_line(error)}") from error
    repository = Repository.at(model)
    keys = model_keys(repository)
    own = [key for key in OUTPUT_KEYS if key in keys]
    tied = [key for key in keys if key.endswith(EMBEDDING_SUFFIXES)]
    if not own and len(tied) != 1:
        raise CheckpointError(f"{model} has no output layer under a known name ({', '.join(OUTPUT_KEYS)})")
    key = (own or tied)[0]
    weight = read_shards(repository, {key: keys[key]})[key]
    if weight.ndim != 2 or weight.shape[1] != hidden_size:
        raise CheckpointError(f"{model}: {key} is not an output layer for hidden size {hidden_size}")
    return Base(str(model), hidden_size, weight)
