"""Whole training runs on the tiny model: they learn, they resume exactly, they say what is wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from medusa_core.checkpoints.reading import load_heads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import ConfigError, DataError, MedusaError
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.text.tokenizer import load_chat_tokenizer
from medusa_core.training.batches import ExampleDataset
from medusa_core.training.config import LossKind, TrainConfig
from medusa_core.training.data import NO_TARGET, Example, load_examples
from medusa_core.training.evaluation import evaluate_heads
from medusa_core.training.module import HeadModule
from medusa_core.training.trainer import train_heads


@pytest.fixture(scope="module")
def dialogues(write_dialogues: Callable[..., Path]) -> Path:
    return write_dialogues(60, lambda number: number % 3)


@pytest.fixture
def config(tiny_model_dir: Path, dialogues: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(tiny_model_dir),
        data=(dialogues,),
        out=tmp_path / "heads",
        num_heads=3,
        max_steps=20,
        batch_size=4,
        val_fraction=0.1,
        learning_rate=5e-3,
        dtype="float32",
        device="cpu",
        log_steps=5,
    )


@pytest.fixture
def backbone(tiny_model_dir: Path) -> Backbone:
    return load_backbone(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))


def new_trainer(backbone: Backbone, *, loss: LossKind = LossKind.TEACHER, decay: float = 0.5) -> HeadModule:
    heads = MedusaHeads.new(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=3,
        num_layers=1,
        lm_head_weight=backbone.lm_head_weight,
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.1
            )
    return HeadModule(backbone, heads, loss=loss, decay=decay)


def head_tensors(folder: Path) -> dict[str, torch.Tensor]:
    heads = load_heads(folder, hidden_size=64, vocab_size=320)
    return dict(heads.named_parameters())


@pytest.mark.parametrize("kind", list(LossKind))
def test_training_lowers_the_loss_and_teaches_the_heads(
    config: TrainConfig, backbone: Backbone, kind: LossKind
) -> None:
    report = train_heads(replace(config, loss=kind, max_steps=40))
    assert report.steps == 40
    first, last = report.losses[0][1], report.losses[-1][1]
    # A random backbone's distribution is nearly flat: most of the teacher loss is its entropy.
    assert last < (0.95 if kind == LossKind.TEACHER else 0.5) * first
    chat = load_chat_tokenizer(config.model)
    examples = load_examples(config.data, chat, sequence_length=512)
    untrained = evaluate_heads(
        HeadModule(
            backbone,
            MedusaHeads.new(
                hidden_size=64,
                vocab_size=320,
                num_heads=3,
                num_layers=1,
                lm_head_weight=backbone.lm_head_weight,
            ),
            loss=kind,
            decay=1.0,
        ),
        examples,
        batch_size=8,
    )
    assert untrained is not None
    assert report.evaluation is not None
    if kind == LossKind.TEACHER:
        assert all(a > b for a, b in zip(report.evaluation.accuracy, untrained.accuracy, strict=True))
        assert all(a < b for a, b in zip(report.evaluation.loss, untrained.loss, strict=True))


def test_result_files(config: TrainConfig) -> None:
    report = train_heads(config)
    heads = load_heads(config.out, hidden_size=64, vocab_size=320)
    assert (heads.num_heads, heads.num_layers, heads.vocab_size) == (3, 1, 320)
    content = json.loads((config.out / "training.json").read_text())
    assert content["config"]["num_heads"] == 3
    assert content["config"]["loss"] == "teacher"
    assert content["config"]["data"] == [str(config.data[0])]
    assert content["report"]["evaluation"]["accuracy"] == list(report.evaluation.accuracy)  # type: ignore[union-attr]
    assert [step for step, _ in content["report"]["losses"]] == [5, 10, 15, 20]
    assert report.tokens > 0
    assert json.loads((config.out / "config.json").read_text())["base_model_name_or_path"] == config.model


def test_checkpoints_hold_the_heads_only(config: TrainConfig) -> None:
    train_heads(replace(config, max_steps=2))
    keys = set(load_file(config.out / "checkpoints" / "checkpoint-2" / "model.safetensors"))
    assert keys == {"heads.block_weights.0", "heads.block_biases.0", "heads.output_KVE"}


def test_resumed_training_equals_uninterrupted(config: TrainConfig) -> None:
    """54 dialogues in batches of 4 x 2: 20 steps are nearly three epochs, step 11 is within the second."""
    config = replace(config, accumulation=2, save_steps=11)
    uninterrupted = train_heads(config)
    resumed_config = replace(config, out=config.out.with_name("resumed"), resume=True)
    kept = resumed_config.out / "checkpoints"
    shutil.copytree(config.out / "checkpoints" / "checkpoint-11", kept / "checkpoint-11")
    shutil.copy(config.out / "checkpoints" / "run.json", kept)
    resumed = train_heads(resumed_config)
    own, other = head_tensors(config.out), head_tensors(resumed_config.out)
    for name, tensor in own.items():
        assert torch.equal(tensor, other[name]), name
    assert resumed.losses[:2] == uninterrupted.losses[:2]
    assert resumed.losses[-1] == uninterrupted.losses[-1]
    assert resumed.tokens < uninterrupted.tokens
    assert resumed.steps == uninterrupted.steps == 20


def test_two_runs_are_equal_and_seeds_differ(config: TrainConfig) -> None:
    config = replace(config, max_steps=3)
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_heads(replace(config, out=config.out / name, seed=seed))
        results.append(head_tensors(config.out / name)["output_KVE"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_second_run_does_not_mix_with_the_first(config: TrainConfig) -> None:
    config = replace(config, max_steps=1)
    train_heads(config)
    with pytest.raises(ConfigError, match="resume it, or remove the folder"):
        train_heads(config)
    with pytest.raises(ConfigError, match="another batch_size, num_heads"):
        train_heads(replace(config, resume=True, num_heads=2, batch_size=2))


def test_a_checkpoint_that_was_cut_off_is_not_resumed(config: TrainConfig) -> None:
    uninterrupted = train_heads(replace(config, max_steps=4, save_steps=2))
    last = config.out / "checkpoints" / "checkpoint-4"
    for state, rest in (("trainer_state.json", "{"), ("optimizer.pt", "")):
        (last / state).write_text(rest, encoding="utf-8")  # as a kill in the middle of writing leaves them
    shutil.copy(config.out / "medusa_lm_head.safetensors", config.out.parent)
    resumed = train_heads(replace(config, max_steps=4, save_steps=2, resume=True))
    assert resumed.losses == uninterrupted.losses
    assert 0 < resumed.tokens < uninterrupted.tokens
    before = load_file(config.out.parent / "medusa_lm_head.safetensors")
    after = load_file(config.out / "medusa_lm_head.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_folders_that_cannot_take_the_result(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to .*file/heads: Not a directory"):
        train_heads(replace(config, out=tmp_path / "file" / "heads"))
    (tmp_path / "late" / "checkpoints").mkdir(parents=True)
    (tmp_path / "late" / "checkpoints" / "checkpoint-1").touch()
    with pytest.raises(DataError, match="cannot write to .*late: .*File exists"):
        train_heads(replace(config, out=tmp_path / "late", max_steps=1))
    assert tree(tmp_path / "late") == {"checkpoints", "checkpoints/checkpoint-1"}
    with pytest.raises(ConfigError, match="is the model's own folder"):
        train_heads(replace(config, out=Path(config.model)))
    with pytest.raises(ConfigError, match="holds a whole model"):
        train_heads(replace(config, model="another/model", out=Path(config.model)))


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "change",
    [{"data": ("missing.jsonl",)}, {"draft_vocab": 10**6}, {"heads": "missing"}],
    ids=["reading data", "making heads", "loading heads"],
)
def test_a_run_that_fails_leaves_no_folder(config: TrainConfig, change: dict[str, Any]) -> None:
    out = config.out / "new" / "heads"
    failing = replace(config, out=out, **change)
    with pytest.raises(MedusaError):
        train_heads(failing)
    assert not config.out.exists()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(MedusaError):
        train_heads(failing)
    assert tree(config.out) == {"new", "new/heads", "new/heads/mine"}


def test_a_run_that_fails_keeps_what_can_be_resumed(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    in_the_way = config.out / "medusa_lm_head.safetensors"
    in_the_way.mkdir(parents=True)
    with pytest.raises(DataError, match="cannot write to"):
        train_heads(config)
    assert (config.out / "checkpoints" / "checkpoint-2").is_dir()
    in_the_way.rmdir()
    assert train_heads(replace(config, resume=True)).steps == 2
    assert in_the_way.is_file()


def test_finished_heads_learn_no_more_and_new_ones_are_not_calibrated_yet(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    finished = train_heads(config)
    calibration = config.out / "calibration.json"
    calibration.write_text("{}", encoding="utf-8")
    again = train_heads(replace(config, resume=True))
    assert (again.steps, again.tokens, again.losses) == (2, 0, finished.losses)
    assert calibration.exists()  # of these very heads
    shutil.rmtree(config.out / "checkpoints")
    train_heads(config)
    assert not calibration.exists()


def test_resume_with_nothing_to_resume_starts(config: TrainConfig) -> None:
    assert train_heads(replace(config, max_steps=1, resume=True)).steps == 1


def test_shared_output_trains_only_the_blocks(config: TrainConfig, backbone: Backbone) -> None:
    report = train_heads(replace(config, shared_output=True, num_layers=2))
    assert report.losses[-1][1] < report.losses[0][1]
    heads = load_heads(config.out, hidden_size=64, vocab_size=320, lm_head_weight=backbone.lm_head_weight)
    assert heads.is_shared
    assert heads.num_layers == 2
    assert (heads.block_weights[1].abs().amax(dim=(1, 2)) > 0).all()


def test_bfloat16_run(config: TrainConfig) -> None:
    report = train_heads(replace(config, dtype="bfloat16"))
    assert report.losses[-1][1] < report.losses[0][1]
    tensors = load_file(config.out / "medusa_lm_head.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_nothing_held_out(config: TrainConfig) -> None:
    assert train_heads(replace(config, max_steps=1, val_fraction=0.0)).evaluation is None


def test_the_backbone_stays_as_it_is(backbone: Backbone) -> None:
    model = new_trainer(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    labels = torch.tensor([[NO_TARGET, NO_TARGET, NO_TARGET, 9, 10, 11]])
    model(labels.clamp(min=5), labels)["loss"].backward()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(list(model.parameters())) == len(list(model.heads.parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())


@pytest.mark.parametrize("kind", list(LossKind))
def test_loss_of_a_padded_batch_by_definition(backbone: Backbone, kind: LossKind) -> None:
    """Σ_k decay^k · mean over targets, head k at t predicting t + 2 + k, row by row without padding."""
    model = new_trainer(backbone, loss=kind)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17]]
    marks = [[4, 5, 6], [3, 4]]
    ids, labels = torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), NO_TARGET)
    for index, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, mark] = ids[index, mark]
    output = model(ids, labels)
    losses_K = torch.zeros(3)
    for row, mark in zip(rows, marks, strict=True):
        out = backbone.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        hidden, logits = out.hidden_states[-1][0], out.logits[0]
        for head in range(3):
            for target in mark:
                source = target - 2 - head
                if not set(range(source + 1, target)) <= set(
                    mark
                ):  # the root and all between are the model's
                    continue
                drafted = model.heads.draft_logits(hidden[source][None])[0, head].log_softmax(-1)
                wanted = logits[target - 1].softmax(-1)
                if kind == LossKind.HARD:
                    wanted = torch.nn.functional.one_hot(torch.tensor(row[target]), 320).float()
                losses_K[head] -= (wanted * drafted).sum() / 3
    torch.testing.assert_close(output["head_losses"], losses_K, rtol=1e-4, atol=1e-4)
    expected = losses_K @ torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(output["loss"].detach(), expected, rtol=1e-4, atol=1e-4)
    half = model(ids, labels, num_items_in_batch=6)["loss"].detach()
    torch.testing.assert_close(half, expected / 2, rtol=1e-4, atol=1e-4)


def test_accuracy_by_definition(backbone: Backbone) -> None:
    """A head that is the backbone, judged by hand: its guess at t is right where the greedy tokens repeat."""
    model = new_trainer(backbone)
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(5, 300, (length,), generator=generator), torch.rand(length) > 0.3)
        for length in (9, 14, 6)
    ]
    hits, counts = torch.zeros(3), torch.zeros(3)
    for item in (ExampleDataset(examples)[i] for i in range(3)):
        out = backbone.model(input_ids=item["input_ids"][None], output_hidden_states=True)
        greedy = out.logits[0].argmax(-1)
        for head in range(3):
            for target in range(2 + head, len(item["labels"])):
                if (item["labels"][target - 1 - head : target + 1] == NO_TARGET).any():
                    continue
                drafted = model.heads.draft_logits(out.hidden_states[-1][0, target - 2 - head][None])[0, head]
                hits[head] += drafted.argmax() == greedy[target - 1]
                counts[head] += 1
    evaluation = evaluate_heads(model, examples, batch_size=2)
    assert evaluation is not None
    assert evaluation.targets == counts[0]
    torch.testing.assert_close(torch.tensor(evaluation.accuracy), hits / counts)
    assert evaluate_heads(model, [], batch_size=2) is None


def test_models_that_scale_their_logits_are_refused(backbone: Backbone) -> None:
    backbone.splits = False
    with pytest.raises(ConfigError, match="caps or scales the logits"):
        new_trainer(backbone)


def test_progress_on_a_terminal(config: TrainConfig) -> None:
    text = StringIO()
    train_heads(replace(config, max_steps=5), Console(file=text, force_terminal=True, width=120))
    assert "training heads" in text.getvalue()
    assert "5/5" in text.getvalue()
    assert "steps/s" in text.getvalue()


def test_progress_in_a_log(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="medusa_core"):
        train_heads(replace(config, max_steps=5), Console(file=StringIO()))
    assert "54 dialogues to train on, 6 held out" in caplog.text
    assert "step 5 of 5 · loss" in caplog.text


def test_tensorboard_gets_the_losses(config: TrainConfig) -> None:
    train_heads(replace(config, max_steps=2, log_steps=1, tensorboard=True))
    (file,) = config.out.rglob("events.out.tfevents.*")
    assert b"train/loss" in file.read_bytes()


def test_without_tensorboard_there_is_a_clear_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_core.training.hf_trainer.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "medusa-serve\[tensorboard\]"'):
        train_heads(replace(config, tensorboard=True))
