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

__all__ = ["Engine", "EngineConfig", "ModelInfo", "Request", "__version__"]
__all__ += ["DraftSourceName", "SamplingParams", "SpeculationMode", "SpeculationParams"]
__all__ += ["Answer", "AnswerStats", "AnswerStream", "FinishReason", "StepOutput", "StepStats"]
__all__ += ["CapacityError", "CheckpointError", "ConfigError", "DataError", "MedusaError"]
__all__ += ["RequestError", "TokenizerError", "TreeError"]

# Searched in this order, so that a name from one without torch loads none.
_MODULES = (
    *("errors", "config", "sampling_params", "request", "model_info"),
    *("engine.outputs", "engine.answer", "engine.engine"),
)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (vars(import_module(f"{__name__}.{module}")) for module in _MODULES)
    return next(names[name] for names in modules if name in names)


def __dir__() -> list[str]:
    return __all__
