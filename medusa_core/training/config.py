"""Training configuration: one field per option of `medusa train` and key of its YAML file.

The defaults are those of recipe medusa-1; `medusa_core.training.recipes` has what other recipes change.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from medusa_core.config import DTYPES
from medusa_core.errors import ConfigError
from medusa_core.option_field import check_limits, option

DEVICES = ("auto", "cpu", "cuda")
DATA_PANEL, HEADS_PANEL, JOINT_PANEL = "Data", "Heads", "Backbone (medusa-2)"
OPTIMIZER_PANEL, RUN_PANEL = "Optimizer", "Run"


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
    """Schedule of joint training (Medusa paper §2.2.2, which advises against `direct`)."""

    TWO_STAGE = "two-stage"
    SINE = "sine"
    DIRECT = "direct"


class Tune(StrEnum):
    """Which weights of the backbone medusa-2 trains."""

    LORA = "lora"
    FULL = "full"


class Quantization(StrEnum):
    """Number format of a frozen backbone's linear layers."""

    INT8 = "8bit"
    INT4 = "4bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of `train_heads`. Each field is described by the help text of its option.

    Raises `ConfigError` for values out of range, alone or together.
    """

    model: str = option("Backbone: a directory or Hub name.")
    data: tuple[str | Path, ...] = option(
        "JSONL (.gz too), JSON or Parquet file, or a Hub dataset as name or name:split, of `messages` or "
        "ShareGPT's `conversations`; repeatable."
    )
    out: Path = option("Directory for heads, report and checkpoints.")
    recipe: Recipe = option("Sets the defaults of all that follows; see docs.", default=Recipe.MEDUSA_1)

    sequence_length: int = option("Tokens; longer dialogues are cut.", DATA_PANEL, default=512, least=3)
    packing: bool = option(
        "Several dialogues in a row, none seeing another: no padding.", DATA_PANEL, default=False
    )
    val_fraction: float = option("Share of dialogues held out.", DATA_PANEL, default=0.01, least=0, below=1)
    strict: bool = option("A bad row ends the run.", DATA_PANEL, default=False)
    chat_template: str | None = option(
        "A built-in template or a Jinja file, instead of the model's.", DATA_PANEL, default=None
    )

    heads: str | None = option(
        "Medusa heads to start from; in a two-stage run instead of stage 1.", HEADS_PANEL, default=None
    )
    num_heads: int = option("Heads: how many tokens ahead.", HEADS_PANEL, default=4, least=1)
    num_layers: int = option("Layers of a head.", HEADS_PANEL, default=1, least=1)
    shared_output: bool = option(
        "Heads use the backbone's output layer: far smaller, less accurate.", HEADS_PANEL, default=False
    )
    draft_vocab: int | None = option(
        "Draft only so many tokens, the data's most frequent ones.", HEADS_PANEL, default=None, least=1
    )
    loss: LossKind = option(
        "teacher: the backbone's own distribution; hard: the data's tokens, as in the Medusa paper.",
        HEADS_PANEL,
        default=LossKind.TEACHER,
    )
    decay: float = option("Head k's loss weighs decay^k.", HEADS_PANEL, default=0.8, above=0)
    dropout: float = option("In Hydra heads, before each layer.", HEADS_PANEL, default=0.0, least=0, below=1)
    noise: float = option(
        "Adds uniform(-1, 1) * noise / sqrt(tokens * size) to what Hydra heads see.",
        HEADS_PANEL,
        default=0.0,
        least=0,
    )

    tune: Tune = option("Adapters, or all weights.", JOINT_PANEL, default=Tune.LORA)
    joint: JointMode = option(
        "two-stage: heads alone, then both; sine: both, the heads' weight rising; direct: both from the "
        "first step.",
        JOINT_PANEL,
        default=JointMode.TWO_STAGE,
    )
    stage_one: float = option(
        "Share of a two-stage run that trains heads alone.", JOINT_PANEL, default=0.5, above=0, below=1
    )
    heads_weight: float = option(
        "Weight of the heads' loss beside the backbone's.", JOINT_PANEL, default=0.2, above=0
    )
    heads_rate: float = option(
        "The heads' learning rate over the backbone's.", JOINT_PANEL, default=4.0, above=0
    )
    self_distill: bool = option(
        "Hold the backbone to its own distribution, not to the data (LoRA only).", JOINT_PANEL, default=False
    )
    lora_rank: int = option("r.", JOINT_PANEL, default=32, least=1)
    lora_alpha: float = option("Adapters weigh alpha / r.", JOINT_PANEL, default=16.0, above=0)
    lora_dropout: float = option("Before the adapters.", JOINT_PANEL, default=0.05, least=0, below=1)
    gradient_checkpointing: bool = option(
        "Recompute the backbone backwards: less memory.", JOINT_PANEL, default=False
    )

    epochs: float = option("Passes over the data.", OPTIMIZER_PANEL, default=1.0, above=0)
    max_steps: int | None = option("Steps, instead of epochs.", OPTIMIZER_PANEL, default=None, least=1)
    batch_size: int = option("Rows at a time, per device.", OPTIMIZER_PANEL, default=16, least=1)
    accumulation: int = option("Batches to a step.", OPTIMIZER_PANEL, default=1, least=1)
    learning_rate: float = option(
        "Highest; then a cosine. In medusa-2 the backbone's.", OPTIMIZER_PANEL, default=1e-3, above=0
    )
    final_rate: float = option(
        "Where the cosine ends, over its top.", OPTIMIZER_PANEL, default=0.0, least=0, most=1
    )
    warmup: float = option(
        "Steps the rate rises over; below 1, a share of all steps.", OPTIMIZER_PANEL, default=0.03, least=0
    )
    weight_decay: float = option("AdamW's.", OPTIMIZER_PANEL, default=0.0, least=0)

    seed: int = option("Of held-out choice, order and dropout.", RUN_PANEL, default=0, least=0, below=2**32)
    dtype: str = option("What is multiplied and saved: auto, float32, bfloat16.", RUN_PANEL, default="auto")
    device: str = option("auto, cpu or cuda; several GPUs: torchrun.", RUN_PANEL, default="auto")
    quantize: Quantization | None = option("Hold the frozen backbone in fewer bits.", RUN_PANEL, default=None)
    save_steps: int = option("Steps between checkpoints.", RUN_PANEL, default=500, least=1)
    log_steps: int = option("Steps between losses.", RUN_PANEL, default=20, least=1)
    tensorboard: bool = option(
        "Write losses for TensorBoard below OUT/checkpoints.", RUN_PANEL, default=False
    )
    resume: bool = option("Go on from the newest checkpoint.", RUN_PANEL, default=False)

    @property
    def is_joint(self) -> bool:
        """Whether the backbone is trained too."""
        return self.recipe == Recipe.MEDUSA_2

    @property
    def is_hydra(self) -> bool:
        """Whether each head sees the tokens drafted before its own."""
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
        check_limits(self)
        self._check_together()

    def _check_together(self) -> None:
        joint, hydra, full = self.is_joint, self.is_hydra, self.tune == Tune.FULL
        noisy = self.noise > 0 or self.dropout > 0
        fresh = self.heads is None
        two_stages = joint and self.joint == JointMode.TWO_STAGE and fresh
        clashes = (
            (noisy and not hydra, "noise and dropout are for recipes hydra and hydra++"),
            (hydra and not fresh, "heads to start from are Medusa heads: recipes medusa-1 and medusa-2"),
            (joint and self.quantize, "quantize needs a frozen backbone: not with recipe medusa-2"),
            (
                joint and full and self.shared_output,
                "shared_output needs a frozen output layer: not with tune full",
            ),
            (self.self_distill and not joint, "self_distill is for recipe medusa-2"),
            (
                self.self_distill and full,
                "self_distill with tune full would need a second copy of the backbone: use tune lora",
            ),
            (
                self.gradient_checkpointing and not joint,
                "gradient_checkpointing is for recipe medusa-2: elsewhere the backbone runs forwards only",
            ),
            (two_stages and self.max_steps == 1, "max_steps must be at least 2 for two stages"),
        )
        for is_wrong, reason in clashes:
            if is_wrong:
                raise ConfigError(reason)
