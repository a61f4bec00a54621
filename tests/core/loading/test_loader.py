"""From names and settings to an engine's parts."""

import shutil
from pathlib import Path

import pytest
import torch

from medusa_core.checkpoints.writing import save_heads
from medusa_core.config import EngineConfig, resolve_context_length
from medusa_core.draft.accuracy import default_calibration, save_calibration
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.engine.engine import Engine
from medusa_core.errors import CheckpointError, ConfigError, MedusaError
from medusa_core.loading.devices import cpu_has_native_bfloat16, resolve_device, resolve_dtype
from medusa_core.loading.loader import load_parts

CPU = torch.device("cpu")
FLOAT32 = EngineConfig(dtype="float32", device="cpu", measure=False)


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path, random_heads: MedusaHeads) -> Path:
    """The tiny model with heads in its `medusa-1` folder."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    save_heads(random_heads, folder / "medusa-1", base_model="tiny")
    return folder


def test_heads_beside_the_model_are_found(model_dir: Path, random_heads: MedusaHeads) -> None:
    parts = load_parts(model_dir, None, FLOAT32)
    assert (parts.model_name, parts.heads_name) == (str(model_dir), str(model_dir / "medusa-1"))
    assert isinstance(parts.heads, MedusaHeads)
    assert parts.calibration is None
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parts.heads.draft_logits(hidden), random_heads.draft_logits(hidden))


def test_a_set_beside_the_model_goes_by_its_folders_name(
    model_dir: Path, random_heads: MedusaHeads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_heads(random_heads, model_dir / "heads", base_model="tiny")
    assert load_parts(model_dir, None, FLOAT32).heads_name == str(model_dir / "heads")
    assert load_parts(model_dir, "medusa-1", FLOAT32).heads_name == str(model_dir / "medusa-1")
    with pytest.raises(CheckpointError, match="hydra is no directory, and no Hub download"):
        load_parts(model_dir, "hydra", FLOAT32)
    monkeypatch.chdir(tmp_path)
    save_heads(random_heads, Path("medusa-1"), base_model="tiny")  # a path that exists is that path
    assert load_parts(model_dir, "medusa-1", FLOAT32).heads_name == "medusa-1"


def test_hydra_heads_beside_the_model(model_dir: Path) -> None:
    """They get the backbone's embedding and the shape of its layers."""
    backbone = load_parts(model_dir, "none", FLOAT32).backbone
    shape = HydraShape(num_heads=2, num_layers=2, hidden_size=64, vocab_size=320)
    prefix = PrefixLayer(prefix_config(backbone.config))
    heads = HydraHeads.new(shape, lm_head_weight=backbone.lm_head_weight, embed=backbone.embed, prefix=prefix)
    save_heads(heads, model_dir / "hydra++", base_model="tiny")
    parts = load_parts(model_dir, None, FLOAT32)
    assert parts.heads_name == str(model_dir / "hydra++")
    assert isinstance(parts.heads, HydraHeads)
    hidden, path = torch.randn(1, 64), torch.tensor([[[3, 5]]])
    assert torch.equal(parts.heads.level_logits(1, hidden, path), heads.level_logits(1, hidden, path))
    context = torch.randn(1, 5, 64)
    assert torch.equal(parts.heads.contextualize(context), heads.contextualize(context))


def test_calibration_comes_with_heads_from_the_hub(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--someone--heads" / "snapshots" / "0123abcd"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
    shutil.copytree(model_dir / "medusa-1", snapshot)
    assert load_parts(model_dir, "someone/heads", FLOAT32).calibration is None
    save_calibration(default_calibration(4), snapshot)
    assert load_parts(model_dir, "someone/heads", FLOAT32).calibration == default_calibration(4)


def test_no_heads_on_request(model_dir: Path, tiny_model_dir: Path) -> None:
    for parts in (load_parts(model_dir, "none", FLOAT32), load_parts(tiny_model_dir, None, FLOAT32)):
        assert (parts.heads, parts.heads_name, parts.calibration) == (None, None, None)


def test_calibration_is_read_from_beside_the_heads(model_dir: Path) -> None:
    heads = model_dir / "medusa-1"
    save_calibration(default_calibration(4), heads)
    weights = heads / "medusa_lm_head.safetensors"
    for source in (None, heads, weights):
        assert load_parts(model_dir, source, FLOAT32).calibration == default_calibration(4)
    assert load_parts(model_dir, str(weights), FLOAT32).heads_name == str(weights)


def test_calibration_of_other_heads_is_refused(model_dir: Path) -> None:
    save_calibration(default_calibration(3), model_dir / "medusa-1")
    message = "calibration.json is for 3 heads, the file holds 4: run `medusa calibrate` again"
    with pytest.raises(CheckpointError, match=message):
        load_parts(model_dir, None, FLOAT32)


@pytest.mark.parametrize("missing", ["/nosuch/model", "./nosuch/model"])
def test_missing_models_and_heads_are_one_line(model_dir: Path, missing: str) -> None:
    for model, heads in ((missing, None), (str(model_dir), missing)):
        with pytest.raises(MedusaError, match="nosuch") as caught:
            Engine.from_pretrained(model, heads=heads, config=FLOAT32)
        assert "\n" not in str(caught.value)


def test_static_tree_of_the_settings(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text("[[0], [1], [0, 0]]")
    config = EngineConfig(dtype="float32", measure=False, static_tree=str(file))
    engine = Engine.from_pretrained(model_dir, config=config)
    assert engine.head_source is not None
    assert not engine.head_source.trees.is_adaptive("static")
    assert engine.head_source.trees.is_adaptive("dynamic")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("", "device must be auto, cpu, cuda or cuda:N, not ''"),
        ("cuda:x", "device must be auto, cpu, cuda or cuda:N, not 'cuda:x'"),
        ("mps", "device must be auto, cpu, cuda or cuda:N, not 'mps'"),
        ("meta", "device must be auto, cpu, cuda or cuda:N, not 'meta'"),
        ("cuda:99", "device cuda:99 was asked for, but"),
        ("auto:x", "device must be auto, cpu, cuda or cuda:N, not 'auto:x'"),
    ],
)
def test_devices_there_are_not(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


def test_device_names() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("auto:0").type == resolve_device("auto").type


def test_dtype_names(tiny_model_dir: Path) -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert resolve_dtype(name, CPU, tiny_model_dir) == getattr(torch, name)
    expected = torch.bfloat16 if cpu_has_native_bfloat16() else torch.float32
    assert resolve_dtype("auto", CPU, tiny_model_dir) == expected
    assert resolve_dtype("auto", CPU, tiny_model_dir / "nosuch", rows=16) == expected


def test_auto_dtype_on_cuda_is_the_checkpoints(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Decided from the config alone, so no device is needed to see it."""
    cuda = torch.device("cuda")
    assert resolve_dtype("auto", cuda, tiny_model_dir) == torch.bfloat16  # it is stored in float32
    config = (tiny_model_dir / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("float32", "float16"))
    assert resolve_dtype("auto", cuda, tmp_path) == torch.float16
    assert resolve_dtype("auto", cuda, tmp_path / "nosuch") == torch.bfloat16


@pytest.mark.parametrize(
    ("max_length", "positions", "length"),
    [(None, 512, 512), (None, 131072, 4096), (8192, 131072, 8192), (2, 2, 2)],
)
def test_context_length(max_length: int | None, positions: int, length: int) -> None:
    assert resolve_context_length(max_length, positions) == length


def test_heads_padded_like_their_backbone_load_trimmed(vicuna_layout_dir: Path, tmp_path: Path) -> None:
    """Padded vocabularies (Qwen's, say) pad the published heads too; the padding is never drafted."""
    backbone = load_parts(vicuna_layout_dir, "none", FLOAT32).backbone
    padded = backbone.model.get_output_embeddings().weight
    assert len(padded) > backbone.vocab_size
    heads = MedusaHeads.new(
        hidden_size=backbone.hidden_size,
        vocab_size=len(padded),
        num_heads=2,
        num_layers=1,
        lm_head_weight=padded,
    )
    save_heads(heads, tmp_path / "heads", base_model="padded")
    loaded = load_parts(vicuna_layout_dir, tmp_path / "heads", FLOAT32).heads
    assert loaded is not None
    assert loaded.vocab_size == backbone.vocab_size
