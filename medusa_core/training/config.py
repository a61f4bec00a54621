"""What a training run is told. Defaults live here; `medusa train` has an option for every field."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from medusa_core.config import DTYPES
from medusa_core.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


class LossKind(StrEnum):
    """Cross-entropy against the backbone's distribution at T = 1 (teacher) or the data's tokens (hard)."""

    TEACHER = "teacher"
    HARD = "hard"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of `train_heads`.

    `model`: directory or Hub name of the frozen backbone. `data`: JSONL files, gzipped or not, of chat
    rows. `out` gets the heads, training.json and, in `checkpoints/`, what `resume` continues from. Head k's
    loss weighs `decay`**k. `warmup` is a fraction of all optimizer steps; after it the learning rate falls
    as a cosine to zero. `max_steps` None trains for `epochs`. `sequence_length` (tokens) cuts longer
    dialogues. `dtype` is what the backbone runs in and the heads are multiplied and saved in; their master
    weights are float32. A share `val_fraction` of the dialogues is held out to measure the finished heads.
    `strict` makes a bad row an error.
    """

    model: str
    data: tuple[Path, ...]
    out: Path
    num_heads: int = 4
    num_layers: int = 1
    shared_output: bool = False
    loss: LossKind = LossKind.TEACHER
    decay: float = 0.8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.03
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    sequence_length: int = 512
    val_fraction: float = 0.01
    strict: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    chat_template: str | None = None
    save_steps: int = 500
    log_steps: int = 20
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers", "batch_size", "accumulation", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.data:
            raise ConfigError("data names no file")
        if self.sequence_length < 3:
            raise ConfigError(f"sequence_length must be at least 3, not {self.sequence_length}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, not {self.max_steps}")
        if self.dtype not in DTYPES or self.dtype == "float16":
            raise ConfigError(f"dtype must be auto, float32 or bfloat16, not {self.dtype!r}")
        if self.device not in DEVICES:
            raise ConfigError(
                f"device must be {', '.join(DEVICES)}, not {self.device!r} (CUDA_VISIBLE_DEVICES picks)"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("decay", "learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay must not be negative, but is {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must fit 32 unsigned bits, not {self.seed}")
