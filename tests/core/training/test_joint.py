"""Medusa-2: the joint loss by definition, what learns and what does not, and the files it leaves."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from medusa_core.checkpoints.head_files import find_heads
from medusa_core.checkpoints.reading import load_heads
from medusa_core.checkpoints.writing import save_heads
from medusa_core.config import EngineConfig
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.engine.engine import Engine
from medusa_core.errors import ConfigError
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.sampling_params import SamplingParams
from medusa_core.training.adapters import prepare
from medusa_core.training.config import JointMode, LossKind, Recipe, TrainConfig, Tune
from medusa_core.training.data import NO_TARGET
from medusa_core.training.joint import JointModule
from medusa_core.training.report import TrainReport
from medusa_core.training.trainer import train_heads


@pytest.fixture(scope="module")
def dialogues(write_dialogues: Callable[..., Path]) -> Path:
    return write_dialogues(40, lambda _: 0)


@pytest.fixture
def config(tiny_model_dir: Path, dialogues: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(tiny_model_dir),
        data=(dialogues,),
        out=tmp_path / "model",
        recipe=Recipe.MEDUSA_2,
        num_heads=2,
        max_steps=10,
        batch_size=4,
        val_fraction=0.1,
        learning_rate=2e-3,
        lora_rank=4,
        dtype="float32",
        device="cpu",
        log_steps=1,
    )


@pytest.fixture
def backbone(tiny_model_dir: Path) -> Backbone:
    return load_backbone(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))


def new_module(backbone: Backbone, *, is_distilled: bool = False, **settings: object) -> JointModule:
    """Full tuning, or LoRA with adapters that already do something."""
    config = TrainConfig(
        model="-",
        data=("-",),
        out=Path("-"),
        recipe=Recipe.MEDUSA_2,
        tune=Tune.LORA if is_distilled else Tune.FULL,
        lora_rank=4,
        lora_dropout=0.0,
        self_distill=is_distilled,
    )
    tuned = prepare(backbone.model, config)
    generator = torch.Generator().manual_seed(5)
    heads = MedusaHeads.new(
        hidden_size=64,
        vocab_size=320,
        num_heads=2,
        num_layers=1,
        lm_head_weight=backbone.lm_head_weight.detach(),
    )
    moved = [p for name, p in backbone.model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for parameter in [*heads.parameters(), *moved]:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    settings = {"loss": LossKind.TEACHER, "decay": 0.5, "heads_weight": 0.2} | settings
    return JointModule(backbone, heads, original=tuned.original if is_distilled else None, **settings)  # type: ignore[arg-type]


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 8 and 5 tokens; indices 4, 5, 6 and 3, 4 are the assistant's."""
    ids, labels = torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), NO_TARGET)
    ids[0], ids[1, :5] = torch.arange(5, 13), torch.arange(13, 18)
    labels[0, 4:7], labels[1, 3:5] = ids[0, 4:7], ids[1, 3:5]
    return ids, labels


def assistant_logits(backbone: Backbone, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the model says where the next token is the assistant's [N, V], in order."""
    logits = backbone.model(input_ids=ids).logits[:, :-1]
    return logits[labels[:, 1:] != NO_TARGET]


def test_joint_loss_by_definition(backbone: Backbone) -> None:
    """L_LM over the five assistant tokens, plus 0.2 * (L_1 + 0.5 L_2); all of it trains the backbone."""
    model = new_module(backbone)
    ids, labels = padded_batch()
    output = model(ids, labels, num_items_in_batch=5)
    expected = functional.cross_entropy(
        assistant_logits(backbone, ids, labels), labels[labels != NO_TARGET], reduction="sum"
    )
    torch.testing.assert_close(output["lm_loss"], expected.detach() / 5, rtol=1e-5, atol=1e-5)
    heads_loss = output["head_losses"] @ torch.tensor([1.0, 0.5])
    torch.testing.assert_close(output["loss"].detach(), output["lm_loss"] + 0.2 * heads_loss)
    output["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert any(name.startswith("model.lm_head") for name in gradients)


def test_heads_gradient_reaches_the_backbone_and_the_teacher_does_not(backbone: Backbone) -> None:
    """Head loss alone: its gradient for the backbone is that of the features, teacher held constant."""
    model = new_module(backbone, heads_weight=1.0)
    ids, labels = padded_batch()
    (model(ids, labels)["loss"] - model.backbone_loss(model.hidden(ids), labels) / 3).backward()
    found = backbone.model.model.layers[0].mlp.up_proj.weight.grad
    backbone.model.zero_grad()
    hidden = backbone.model.model(input_ids=ids).last_hidden_state
    teacher = (hidden @ backbone.lm_head_weight.T).softmax(-1).detach()
    total = torch.zeros(())
    for row, head, target in [(0, 0, 5), (0, 0, 6), (1, 0, 4), (0, 1, 6)]:
        source = hidden[row, target - 2 - head]
        weight, bias = model.heads.block_weights[0][head], model.heads.block_biases[0][head]
        feature = source + functional.silu(weight @ source + bias)
        drafted = (model.heads.output_KVE[head] @ feature).log_softmax(-1)
        total = total - 0.5**head * (teacher[row, target - 1] * drafted).sum() / 3
    total.backward()
    expected = backbone.model.model.layers[0].mlp.up_proj.weight.grad
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_self_distillation_is_the_divergence_from_the_model_without_adapters(
    backbone: Backbone, tiny_backbone: Backbone
) -> None:
    model = new_module(backbone, is_distilled=True).train()
    ids, labels = padded_batch()
    output = model(ids, labels, num_items_in_batch=5)
    with torch.no_grad():
        before = assistant_logits(tiny_backbone, ids, labels).log_softmax(-1)
        after = assistant_logits(backbone, ids, labels).log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum() / 5
    assert divergence > 0.01
    torch.testing.assert_close(output["lm_loss"], divergence, rtol=1e-3, atol=1e-5)
    output["loss"].backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in learning} == {"heads", "model"}
    assert all("lora_" in name for name in learning if name.startswith("model."))
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(layer in name for name in learning)
    assert not any("lm_head" in name for name in learning)


def test_untrained_adapters_diverge_by_nothing(backbone: Backbone) -> None:
    model = new_module(backbone, is_distilled=True)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert abs(float(model(*padded_batch())["lm_loss"].detach())) < 1e-5


def test_the_sine_ramp(backbone: Backbone) -> None:
    model = new_module(backbone, ramps=True)
    weights = []
    for progress in (0.0, 1 / 3, 1.0):
        model.progress = progress
        weights.append(model.lambda_0)
    assert weights == pytest.approx([0.0, 0.1, 0.2])


# peft asks transformers for an attribute by its former name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_two_stages_with_adapters(config: TrainConfig, tiny_backbone: Backbone) -> None:
    """Heads alone for half of the run, then both; the merged model is original plus adapters."""
    report = train_heads(replace(config, self_distill=True))
    stage_one = json.loads((config.out / "stage-1" / "training.json").read_text())
    assert [step for step, _ in stage_one["report"]["losses"]] == [1, 2, 3, 4, 5]
    assert stage_one["config"]["learning_rate"] == 4 * config.learning_rate
    assert report.steps == 5
    assert report.backbone_before is not None
    assert report.backbone_after is not None
    assert report.backbone_after != report.backbone_before
    written = json.loads((config.out / "training.json").read_text())
    assert (written["config"]["recipe"], written["config"]["max_steps"]) == ("medusa-2", 10)
    assert written["report"]["backbone_after"] == report.backbone_after
    merged = load_backbone(config.out, dtype=torch.float32, device=torch.device("cpu")).model
    plain = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, config.out / "adapter")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, tiny_backbone.model(ids).logits, atol=1e-3)
    inside = load_heads(config.out, hidden_size=64, vocab_size=320)
    beside = load_heads(config.out / "adapter", hidden_size=64, vocab_size=320)
    started = load_heads(config.out / "stage-1", hidden_size=64, vocab_size=320)
    assert inside.num_heads == 2
    for ours, same, before in zip(
        inside.parameters(), beside.parameters(), started.parameters(), strict=True
    ):
        assert torch.equal(ours, same)
        assert not torch.equal(ours, before)


def test_the_result_is_a_model_that_runs_with_its_heads(config: TrainConfig) -> None:
    train_heads(replace(config, max_steps=2, tune=Tune.FULL, joint=JointMode.DIRECT))
    assert not (config.out / "adapter").exists()
    engine = Engine.from_pretrained(config.out, config=EngineConfig(dtype="float32", measure=False))
    params = SamplingParams(temperature=0.0, max_tokens=5)
    outputs = list(engine.steps([{"role": "user", "content": "Hello"}], params))
    assert outputs[-1].finish_reason is not None
    assert engine.info.num_heads == 2


@pytest.mark.parametrize("joint", [JointMode.SINE, JointMode.DIRECT])
def test_full_tuning_learns_the_data(config: TrainConfig, joint: JointMode) -> None:
    report = train_heads(replace(config, joint=joint, tune=Tune.FULL, max_steps=12, val_fraction=0.2))
    assert report.backbone_before is not None
    assert report.backbone_after is not None
    assert report.backbone_after < report.backbone_before - 0.5
    checkpoint = load_file(config.out / "checkpoints" / "checkpoint-12" / "model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    assert {name.split(".")[0] for name in checkpoint} == {"heads", "model"}


def test_checkpoints_hold_adapters_and_heads_only(config: TrainConfig) -> None:
    train_heads(replace(config, max_steps=2))
    keys = load_file(config.out / "checkpoints" / "checkpoint-1" / "model.safetensors").keys()
    assert all("lora_" in key for key in keys if not key.startswith("heads."))
    assert any("lora_" in key for key in keys)


def test_given_heads_replace_the_first_stage(config: TrainConfig) -> None:
    first = replace(config, recipe=Recipe.MEDUSA_1, out=config.out / "first", max_steps=2)
    train_heads(first)
    report = train_heads(replace(config, heads=str(first.out), max_steps=2))
    assert report.steps == 2
    assert not (config.out / "stage-1").exists()
    with pytest.raises(ConfigError, match="have num_heads 2: set it so"):
        train_heads(replace(config, out=config.out / "x", heads=str(first.out), num_heads=3))


def test_hydra_heads_are_no_start(config: TrainConfig, tiny_backbone: Backbone, tmp_path: Path) -> None:
    shape = HydraShape(num_heads=2, num_layers=1, hidden_size=64, vocab_size=320)
    lm_head = tiny_backbone.lm_head_weight
    hydra = HydraHeads.new(shape, lm_head_weight=lm_head, embed=tiny_backbone.embed)
    save_heads(hydra, tmp_path / "hydra", base_model=config.model)
    with pytest.raises(ConfigError, match="holds Hydra heads; training starts from Medusa heads only"):
        train_heads(replace(config, heads=str(tmp_path / "hydra")))


def test_a_finished_first_stage_of_other_settings_is_not_used(config: TrainConfig) -> None:
    train_heads(config)
    shutil.rmtree(config.out / "checkpoints")  # killed before the second stage's first checkpoint
    with pytest.raises(ConfigError, match="cannot resume .*stage-1.* with another seed"):
        train_heads(replace(config, resume=True, seed=1))


def test_heads_of_an_earlier_run_do_not_hide_the_new_ones(config: TrainConfig) -> None:
    train_heads(replace(config, recipe=Recipe.MEDUSA_1, max_steps=2))
    shutil.rmtree(config.out / "checkpoints")
    train_heads(config)
    assert find_heads(config.out) == config.out
    assert not (config.out / "medusa_lm_head.safetensors").exists()


def interrupt(config: TrainConfig, step: int) -> TrainConfig:
    """Settings of a run that has only what was there after `step` steps of a finished one."""
    resumed = replace(config, out=config.out.with_name("resumed"), resume=True)
    name = f"checkpoint-{step}"
    shutil.copytree(config.out / "checkpoints" / name, resumed.out / "checkpoints" / name)
    shutil.copy(config.out / "checkpoints" / "run.json", resumed.out / "checkpoints")
    if (config.out / "stage-1").exists():
        shutil.copytree(config.out / "stage-1", resumed.out / "stage-1")
    return resumed


def same_curve(resumed: TrainReport, uninterrupted: TrainReport) -> bool:
    return resumed.losses == uninterrupted.losses and resumed.backbone_after == uninterrupted.backbone_after


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.3, "self_distill": True},
        {"joint": JointMode.SINE, "tune": Tune.FULL, "packing": True, "sequence_length": 64, "max_steps": 5},
    ],
    ids=["adapters", "full"],
)
def test_resumed_training_equals_uninterrupted(config: TrainConfig, changes: dict[str, object]) -> None:
    config = replace(config, save_steps=3, **changes)  # type: ignore[arg-type]
    uninterrupted = train_heads(config)
    resumed = train_heads(interrupt(config, 3))
    assert same_curve(resumed, uninterrupted)
    assert resumed.tokens < uninterrupted.tokens


def test_gradient_checkpointing_changes_no_loss(config: TrainConfig) -> None:
    config = replace(config, joint=JointMode.DIRECT, max_steps=3)
    plain = train_heads(config)
    checkpointed = train_heads(replace(config, out=config.out / "other", gradient_checkpointing=True))
    for (_, ours), (_, theirs) in zip(plain.losses, checkpointed.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("tune", list(Tune))
def test_bfloat16_products_with_float32_master_weights(config: TrainConfig, tune: Tune) -> None:
    report = train_heads(replace(config, tune=tune, dtype="bfloat16", joint=JointMode.DIRECT, max_steps=3))
    assert report.losses[-1][1] < report.losses[0][1]
    checkpoint = load_file(config.out / "checkpoints" / "checkpoint-3" / "model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    saved = load_file(config.out / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_without_peft_there_is_a_clear_error(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_core.training.adapters.find_spec", lambda name: None)
    config = TrainConfig(model="-", data=("-",), out=Path("-"), recipe=Recipe.MEDUSA_2)
    with pytest.raises(ConfigError, match="needs peft: pip install"):
        prepare(backbone.model, config)
    prepare(backbone.model, replace(config, tune=Tune.FULL))
