"""Medusa tree decoding: draft heads, one verifying forward pass over a tree of drafts, exact acceptance.

    from medusa_core import Engine, SamplingParams

    engine = Engine.from_pretrained()
    answer = engine.chat([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0.0))
    print(answer.text, answer.stats.tokens_per_step)

Names are imported when they are first used: importing this package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_core.config import EngineConfig
    from medusa_core.engine.answer import Answer, AnswerStats, AnswerStream
    from medusa_core.engine.engine import Engine
    from medusa_core.engine.outputs import FinishReason, StepOutput, StepStats
    from medusa_core.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DataError,
        MedusaError,
        RequestError,
        TokenizerError,
        TreeError,
    )
    from medusa_core.model_info import ModelInfo
    from medusa_core.request import Request
    from medusa_core.sampling_params import (
        DraftSourceName,
        SamplingParams,
        SpeculationMode,
        SpeculationParams,
    )

__version__ = "0.2.0"

_MODULES = {
    "config": ("EngineConfig",),
    "engine.answer": ("Answer", "AnswerStats", "AnswerStream"),
    "engine.engine": ("Engine",),
    "engine.outputs": ("FinishReason", "StepOutput", "StepStats"),
    "errors": (
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "MedusaError",
        "RequestError",
        "TokenizerError",
        "TreeError",
    ),
    "model_info": ("ModelInfo",),
    "request": ("Request",),
    "sampling_params": ("DraftSourceName", "SamplingParams", "SpeculationMode", "SpeculationParams"),
}
_MODULE_OF = {name: f"medusa_core.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "Answer",
    "AnswerStats",
    "AnswerStream",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DraftSourceName",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "MedusaError",
    "ModelInfo",
    "Request",
    "RequestError",
    "SamplingParams",
    "SpeculationMode",
    "SpeculationParams",
    "StepOutput",
    "StepStats",
    "TokenizerError",
    "TreeError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
