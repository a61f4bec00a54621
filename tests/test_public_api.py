"""The names that the library exports, and that importing it loads nothing heavy."""

import subprocess
import sys

import pytest

import medusa_core

EXPORTED = {
    *("Engine", "EngineConfig", "ModelInfo", "Request"),
    *("SamplingParams", "SpeculationParams", "SpeculationMode", "DraftSourceName"),
    *("Answer", "AnswerStats", "AnswerStream", "StepOutput", "StepStats", "FinishReason"),
    *("MedusaError", "ConfigError", "CheckpointError", "TokenizerError", "TreeError", "DataError"),
    *("RequestError", "CapacityError", "__version__"),
}


def test_exported_names() -> None:
    assert set(medusa_core.__all__) == set(dir(medusa_core)) == EXPORTED
    for name in EXPORTED:
        assert getattr(medusa_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        medusa_core.Enigne  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, medusa_core; medusa_core.SamplingParams(); medusa_core.Request; medusa_core.StepOutput; "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
