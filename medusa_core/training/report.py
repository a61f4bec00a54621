"""Writes the result of a run: heads or a whole model, and a report beside them."""

from dataclasses import asdict, dataclass

from medusa_core.checkpoints.head_files import HEAD_FILES, HYDRA_FILES
from medusa_core.checkpoints.writing import save_full_model, save_heads
from medusa_core.draft.accuracy import FILE_NAME as CALIBRATION_FILE
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.files import write_json
from medusa_core.model.backbone import quiet_transformers
from medusa_core.text.tokenizer import ChatTokenizer
from medusa_core.training.adapters import ADAPTER_FOLDER, Tuned
from medusa_core.training.builders import training_dtype
from medusa_core.training.config import TrainConfig
from medusa_core.training.evaluation import HeadEvaluation
from medusa_core.training.module import HeadModule
from medusa_core.training.run_folder import REPORT_FILE, as_json


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Figures of a run. `seconds`, `tokens` (without padding) and their rate are this process and session's.

    `losses`: (step, training loss) as logged. `evaluation` is None where nothing was held out, and in
    processes other than the first; so are `backbone_before` and `backbone_after`, the held-out loss in nats
    per assistant token of a backbone that was trained too.
    """

    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    losses: tuple[tuple[int, float], ...]
    evaluation: HeadEvaluation | None
    backbone_before: float | None = None
    backbone_after: float | None = None


def save_result(
    config: TrainConfig, model: HeadModule, tuned: Tuned | None, chat: ChatTokenizer, report: TrainReport
) -> None:
    """Heads in `config.out`, or the tuned backbone with the heads inside (format C); training.json last."""
    dtype = training_dtype(config, model.backbone.device)
    heads = model.heads.to(dtype)
    assert isinstance(heads, MedusaHeads | HydraHeads)
    config.out.mkdir(parents=True, exist_ok=True)
    if report.tokens:  # else nothing was left to learn, and these are the heads that were calibrated
        _remove_stale(config)
    if tuned is None:
        save_heads(heads, config.out, base_model=config.model)
    else:
        assert isinstance(heads, MedusaHeads)
        if tuned.save_adapter is not None:
            tuned.save_adapter(config.out / ADAPTER_FOLDER)
            save_heads(heads, config.out / ADAPTER_FOLDER, base_model=config.model)
        with quiet_transformers():
            save_full_model(tuned.merged(dtype), heads, config.out, tokenizer=chat.tokenizer)
    write_json(config.out / REPORT_FILE, {"config": as_json(config), "report": asdict(report)})


def _remove_stale(config: TrainConfig) -> None:
    """Remove files of an earlier run that a reader would take for part of the new result."""
    names = (CALIBRATION_FILE, *HEAD_FILES, *HYDRA_FILES) if config.is_joint else (CALIBRATION_FILE,)
    for name in names:  # a file of heads would hide those among the model's weights
        (config.out / name).unlink(missing_ok=True)
