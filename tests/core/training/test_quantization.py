"""A frozen backbone in 8 or 4 bits, where the packages are; what is said where they are not."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from medusa_core.errors import ConfigError
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.training.config import Quantization
from medusa_core.training.quantization import PACKAGES, quantize

ERRORS = {Quantization.INT8: 0.1, Quantization.INT4: 0.6}  # relative; random weights are the hardest


@pytest.fixture
def backbone(tiny_model_dir: Path) -> Backbone:
    return load_backbone(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", list(Quantization))
def test_missing_packages_are_named(
    backbone: Backbone, kind: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_core.training.quantization.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=f"quantize {kind} needs .*torchao.*: pip install {PACKAGES[kind][0]}"
    ):
        quantize(backbone.model, kind)


@pytest.mark.parametrize(
    ("kind", "package"), [(k, p) for k in Quantization for p in PACKAGES[k] if (k, p) != ("4bit", "torchao")]
)
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
def test_hidden_states_stay_close(
    backbone: Backbone, kind: Quantization, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setitem(PACKAGES, kind, (package,))
    ids = torch.arange(5, 60)[None]
    head = backbone.lm_head_weight.clone()
    with torch.no_grad():
        exact = backbone.model.base_model(input_ids=ids).last_hidden_state
        quantize(backbone.model, kind)
        found = backbone.model.base_model(input_ids=ids).last_hidden_state
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < ERRORS[kind]
    assert not math.isnan(error)
    assert torch.equal(backbone.lm_head_weight, head)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
