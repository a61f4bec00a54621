"""What a training run is told: one field per option of `medusa train` and key of its YAML file.

The defaults are those of recipe medusa-1; `medusa_core.training.recipes` has what other recipes change.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from medusa_core.config import DTYPES
from medusa_core.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
DATA_PANEL, HEADS_PANEL, JOINT_PANEL = "Data", "Heads", "Backbone (medusa-2)"
OPTIMISER_PANEL, RUN_PANEL = "Optimiser", "Run"


class Recipe(StrEnum):
    """A published way to train; medusa-2 alone changes the backbone."""

    MEDUSA_1 = "medusa-1"
    MEDUSA_2 = "medusa-2"
    HYDRA = "hydra"
    HYDRA_PLUS = "hydra++"


class LossKind(StrEnum):
    """Cross-entropy against the backbone's distribution at T = 1 (teacher) or the data's tokens (hard)."""

    TEACHER = "teacher"
    HARD = "hard"


class JointMode(StrEnum):
    """How heads and backbone are brought together (Medusa paper §2.2.2, and what it warns of: direct)."""

    TWO_STAGE = "two-stage"
    SINE = "sine"
    DIRECT = "direct"


class Tune(StrEnum):
    """Which weights of the backbone medusa-2 trains."""

    LORA = "lora"
    FULL = "full"


class Quantization(StrEnum):
    """What a frozen backbone's linear layers are stored in."""

    INT8 = "8bit"
    INT4 = "4bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a number must be: `least` <= number <= `most`, `above` < number < `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allow(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        texts = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{text} {value:g}" for text, value in texts.items() if math.isfinite(value))


def _option(text: str, panel: str | None = None, **limits: float) -> Mapping[str, Any]:
    """Help, panel and limits of the command's option."""
    return {"help": text, "panel": panel, "limits": Limits(**limits) if limits else None}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of `train_heads`, every value settled. Each field's meaning is its option's help, below.

    Raises `ConfigError` for values out of range, alone or together.
    """

    model: str = field(metadata=_option("Backbone: a directory or Hub name."))
    data: tuple[str | Path, ...] = field(
        metadata=_option(
            "JSONL (.gz too), JSON or Parquet file, or a Hub dataset as name or name:split, of `messages` or "
            "ShareGPT's `conversations`; repeatable."
        )
    )
    out: Path = field(metadata=_option("Directory for heads, report and checkpoints."))
    recipe: Recipe = field(
        default=Recipe.MEDUSA_1, metadata=_option("Sets the defaults of all that follows; see docs.")
    )

    sequence_length: int = field(
        default=512, metadata=_option("Tokens; longer dialogues are cut.", DATA_PANEL, least=3)
    )
    packing: bool = field(
        default=False,
        metadata=_option("Several dialogues in a row, none seeing another: no padding.", DATA_PANEL),
    )
    val_fraction: float = field(
        default=0.01, metadata=_option("Share of dialogues held out.", DATA_PANEL, least=0, below=1)
    )
    strict: bool = field(default=False, metadata=_option("A bad row ends the run.", DATA_PANEL))
    chat_template: str | None = field(
        default=None,
        metadata=_option("A built-in template or a Jinja file, instead of the model's.", DATA_PANEL),
    )

    heads: str | None = field(
        default=None,
        metadata=_option("Medusa heads to start from; in a two-stage run instead of stage 1.", HEADS_PANEL),
    )
    num_heads: int = field(default=4, metadata=_option("Heads: how many tokens ahead.", HEADS_PANEL, least=1))
    num_layers: int = field(default=1, metadata=_option("Layers of a head.", HEADS_PANEL, least=1))
    shared_output: bool = field(
        default=False,
        metadata=_option("Heads use the backbone's output layer: far smaller, less accurate.", HEADS_PANEL),
    )
    draft_vocab: int | None = field(
        default=None,
        metadata=_option("Draft only so many tokens, the data's most frequent ones.", HEADS_PANEL, least=1),
    )
    loss: LossKind = field(
        default=LossKind.TEACHER,
        metadata=_option(
            "teacher: the backbone's own distribution; hard: the data's tokens, as in the Medusa paper.",
            HEADS_PANEL,
        ),
    )
    decay: float = field(default=0.8, metadata=_option("Head k's loss weighs decay^k.", HEADS_PANEL, above=0))
    dropout: float = field(
        default=0.0, metadata=_option("In Hydra heads, before each layer.", HEADS_PANEL, least=0, below=1)
    )
    noise: float = field(
        default=0.0,
        metadata=_option(
            "Adds uniform(-1, 1) * noise / sqrt(tokens * size) to what Hydra heads see.", HEADS_PANEL, least=0
        ),
    )

    tune: Tune = field(default=Tune.LORA, metadata=_option("Adapters, or all weights.", JOINT_PANEL))
    joint: JointMode = field(
        default=JointMode.TWO_STAGE,
        metadata=_option(
            "two-stage: heads alone, then both; sine: both, the heads' weight rising; direct: both from the "
            "first step.",
            JOINT_PANEL,
        ),
    )
    stage_one: float = field(
        default=0.5,
        metadata=_option("Share of a two-stage run that trains heads alone.", JOINT_PANEL, above=0, below=1),
    )
    heads_weight: float = field(
        default=0.2,
        metadata=_option("Weight of the heads' loss beside the backbone's.", JOINT_PANEL, above=0),
    )
    heads_rate: float = field(
        default=4.0, metadata=_option("The heads' learning rate over the backbone's.", JOINT_PANEL, above=0)
    )
    self_distill: bool = field(
        default=False,
        metadata=_option(
            "Hold the backbone to its own distribution, not to the data (LoRA only).", JOINT_PANEL
        ),
    )
    lora_rank: int = field(default=32, metadata=_option("r.", JOINT_PANEL, least=1))
    lora_alpha: float = field(
        default=16.0, metadata=_option("Adapters weigh alpha / r.", JOINT_PANEL, above=0)
    )
    lora_dropout: float = field(
        default=0.05, metadata=_option("Before the adapters.", JOINT_PANEL, least=0, below=1)
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_option("Recompute the backbone backwards: less memory.", JOINT_PANEL)
    )

    epochs: float = field(default=1.0, metadata=_option("Passes over the data.", OPTIMISER_PANEL, above=0))
    max_steps: int | None = field(
        default=None, metadata=_option("Steps, instead of epochs.", OPTIMISER_PANEL, least=1)
    )
    batch_size: int = field(
        default=16, metadata=_option("Rows at a time, per device.", OPTIMISER_PANEL, least=1)
    )
    accumulation: int = field(default=1, metadata=_option("Batches to a step.", OPTIMISER_PANEL, least=1))
    learning_rate: float = field(
        default=1e-3,
        metadata=_option("Highest; then a cosine. In medusa-2 the backbone's.", OPTIMISER_PANEL, above=0),
    )
    final_rate: float = field(
        default=0.0,
        metadata=_option("Where the cosine ends, over its top.", OPTIMISER_PANEL, least=0, most=1),
    )
    warmup: float = field(
        default=0.03,
        metadata=_option(
            "Steps the rate rises over; below 1, a share of all steps.", OPTIMISER_PANEL, least=0
        ),
    )
    weight_decay: float = field(default=0.0, metadata=_option("AdamW's.", OPTIMISER_PANEL, least=0))

    seed: int = field(
        default=0, metadata=_option("Of held-out choice, order and dropout.", RUN_PANEL, least=0, below=2**32)
    )
    dtype: str = field(
        default="auto", metadata=_option("What is multiplied and saved: auto, float32, bfloat16.", RUN_PANEL)
    )
    device: str = field(
        default="auto", metadata=_option("auto, cpu or cuda; several GPUs: torchrun.", RUN_PANEL)
    )
    quantize: Quantization | None = field(
        default=None, metadata=_option("Hold the frozen backbone in fewer bits.", RUN_PANEL)
    )
    save_steps: int = field(default=500, metadata=_option("Steps between checkpoints.", RUN_PANEL, least=1))
    log_steps: int = field(default=20, metadata=_option("Steps between losses.", RUN_PANEL, least=1))
    tensorboard: bool = field(
        default=False, metadata=_option("Write losses for TensorBoard below OUT/checkpoints.", RUN_PANEL)
    )
    resume: bool = field(default=False, metadata=_option("Go on from the newest checkpoint.", RUN_PANEL))

    @property
    def is_joint(self) -> bool:
        """Whether the backbone learns too."""
        return self.recipe == Recipe.MEDUSA_2

    @property
    def is_hydra(self) -> bool:
        """Whether the heads see the drafted tokens before theirs."""
        return self.recipe in (Recipe.HYDRA, Recipe.HYDRA_PLUS)

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data names no file")
        if self.dtype not in DTYPES or self.dtype == "float16":
            raise ConfigError(f"dtype must be auto, float32 or bfloat16, not {self.dtype!r}")
        if self.device not in DEVICES:
            raise ConfigError(
                f"device must be {', '.join(DEVICES)}, not {self.device!r} (CUDA_VISIBLE_DEVICES picks)"
            )
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        for spec in fields(self):
            value, limits = getattr(self, spec.name), spec.metadata["limits"]
            if value is not None and limits is not None and not limits.allow(value):
                raise ConfigError(f"{spec.name} must be {limits}, not {value}")

    def _check_together(self) -> None:
        clashes = {
            "noise and dropout are for recipes hydra and hydra++": not self.is_hydra
            and (self.noise > 0 or self.dropout > 0),
            "heads to start from are Medusa heads: recipes medusa-1 and medusa-2": self.is_hydra
            and self.heads is not None,
            "quantize needs a frozen backbone: not with recipe medusa-2": self.is_joint
            and self.quantize is not None,
            "shared_output needs a frozen output layer: not with tune full": (
                self.is_joint and self.tune == Tune.FULL and self.shared_output
            ),
            "self_distill is for recipe medusa-2": self.self_distill and not self.is_joint,
            "self_distill with tune full would need a second copy of the backbone: use tune lora": (
                self.self_distill and self.tune == Tune.FULL
            ),
            "gradient_checkpointing is for recipe medusa-2: elsewhere the backbone runs forwards only": (
                self.gradient_checkpointing and not self.is_joint
            ),
            "max_steps must be at least 2 for two stages": self.is_joint
            and self.joint == JointMode.TWO_STAGE
            and self.heads is None
            and self.max_steps == 1,
        }
        for reason, is_wrong in clashes.items():
            if is_wrong:
                raise ConfigError(reason)
