"""Hydra recipes, packed rows and reduced draft vocabularies: whole runs and losses by comparison."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medusa_core.checkpoints.reading import load_heads
from medusa_core.draft.heads import TrainingBatch
from medusa_core.draft.hydra import HydraHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import ConfigError
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.text.tokenizer import ChatTokenizer
from medusa_core.training.batches import Collator, ExampleDataset, pack
from medusa_core.training.builders import (
    build_backbone,
    build_heads,
    build_trainer_module,
    check_packs,
    frequent_tokens,
)
from medusa_core.training.config import LossKind, TrainConfig
from medusa_core.training.data import NO_TARGET, Example, load_examples, split_examples
from medusa_core.training.evaluation import evaluate_heads
from medusa_core.training.module import HeadModule
from medusa_core.training.recipes import resolve_config
from medusa_core.training.trainer import train_heads


@pytest.fixture(scope="module")
def dialogues(write_dialogues: Callable[..., Path]) -> Path:
    return write_dialogues(40, lambda number: number % 3 == 0)


@pytest.fixture
def flags(tiny_model_dir: Path, dialogues: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "model": str(tiny_model_dir),
        "data": [str(dialogues)],
        "out": tmp_path / "heads",
        "num_heads": 3,
        "max_steps": 10,
        "batch_size": 4,
        "val_fraction": 0.1,
        "learning_rate": 5e-3,
        "warmup": 0.1,
        "dtype": "float32",
        "device": "cpu",
        "log_steps": 1,
        "save_steps": 6,
    }


def new_module(config: TrainConfig, examples: list[Example]) -> HeadModule:
    """Heads that are no longer what they start as."""
    backbone = build_backbone(config, torch.device("cpu"), vocab_size=320)
    heads = build_heads(config, backbone, examples)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return build_trainer_module(config, backbone, heads, None).eval()


@pytest.mark.parametrize("recipe", ["hydra", "hydra++"])
def test_hydra_recipes_learn_and_resume(flags: dict[str, object], recipe: str) -> None:
    """Dropout and noise draw random numbers, so resuming must restore the generator too."""
    config = resolve_config(flags | {"recipe": recipe, "noise": 5.0})
    report = train_heads(config)
    assert report.losses[-1][1] < report.losses[0][1]
    assert report.evaluation is not None
    assert len(report.evaluation.accuracy) == 3
    assert json.loads((config.out / "training.json").read_text())["config"]["dropout"] == 0.2
    resumed = replace(config, out=config.out.with_name("resumed"), resume=True)
    shutil.copytree(config.out / "checkpoints" / "checkpoint-6", resumed.out / "checkpoints" / "checkpoint-6")
    shutil.copy(config.out / "checkpoints" / "run.json", resumed.out / "checkpoints")
    assert train_heads(resumed).losses == report.losses


def test_saved_hydra_heads_are_the_trained_ones(
    flags: dict[str, object], dialogues: Path, tiny_chat: ChatTokenizer, tiny_backbone: Backbone
) -> None:
    config = resolve_config(flags | {"recipe": "hydra++", "max_steps": 4, "num_layers": 2})
    report = train_heads(config)
    heads = load_heads(
        config.out,
        hidden_size=64,
        vocab_size=320,
        embed=tiny_backbone.embed,
        backbone_config=tiny_backbone.config,
    )
    assert isinstance(heads, HydraHeads)
    examples = load_examples([dialogues], tiny_chat, sequence_length=512)
    _, held_out = split_examples(examples, config.val_fraction, config.seed)
    module = HeadModule(tiny_backbone, heads, loss=config.loss, decay=1.0)
    assert evaluate_heads(module, held_out, batch_size=4) == report.evaluation


def test_noise_is_for_training_alone(flags: dict[str, object], tiny_backbone: Backbone) -> None:
    """uniform(-1, 1) * alpha / sqrt(S * E) on each hidden state."""
    config = resolve_config(flags | {"recipe": "hydra", "noise": 8.0})
    model = new_module(config, [])
    hidden = torch.randn(2, 16, 64)
    batch = TrainingBatch(hidden, torch.zeros(2, 16, dtype=torch.long))
    assert model.with_noise(batch) is batch
    noise = model.train().with_noise(batch).hidden_BSE - hidden
    limit = 8.0 / (16 * 64) ** 0.5
    assert noise.abs().max() <= limit * 1.001
    assert noise.abs().max() > limit * 0.95
    assert abs(float(noise.mean())) < limit * 0.1


@pytest.mark.parametrize("recipe", ["medusa-1", "hydra", "hydra++"])
def test_packed_rows_have_the_loss_of_unpacked_ones(
    flags: dict[str, object], dialogues: Path, tiny_chat: ChatTokenizer, recipe: str
) -> None:
    examples = load_examples([dialogues], tiny_chat, sequence_length=512)[:9]
    config = resolve_config(flags | {"recipe": recipe, "dropout": 0.0, "packing": True})
    model = new_module(config, examples)
    losses = []
    for dataset in (ExampleDataset(examples), ExampleDataset(examples, pack_to=150)):
        batch = Collator()([dataset[i] for i in range(len(dataset))])
        losses.append(model(**batch, num_items_in_batch=100)["head_losses"])
    assert len(dataset) < len(examples) / 2
    assert batch["position_ids"].shape == batch["input_ids"].shape
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    del batch["position_ids"]
    assert not torch.allclose(model(**batch, num_items_in_batch=100)["head_losses"], losses[0], rtol=1e-3)


def test_packs_hold_everything_once_and_no_more_than_fits() -> None:
    sizes = [1 + (i * 37) % 101 for i in range(500)]
    packs = pack(sizes, 128)
    assert sorted(i for members in packs for i in members) == list(range(500))
    assert all(sum(sizes[i] for i in members) <= 128 for members in packs)
    assert len(packs) <= 1.05 * sum(sizes) / 128


def test_a_dialogue_that_starts_with_a_target_stays_apart_when_packed() -> None:
    example = Example(torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([True, True, True]))
    row = ExampleDataset([example, example], pack_to=6)[0]
    assert row["labels"].tolist() == [NO_TARGET, 6, 7, NO_TARGET, 6, 7]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]


def test_a_model_that_mixes_packed_dialogues_is_refused(flags: dict[str, object]) -> None:
    class Mixing(torch.nn.Module):
        """A base model that does not look at positions."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, position_ids: object = None, **rest: object) -> object:
            return self.inner(input_ids=input_ids, **rest)

    config = resolve_config(flags)
    backbone = load_backbone(config.model, dtype=torch.float32, device=torch.device("cpu"))
    check_packs(backbone)
    backbone.model.model = Mixing(backbone.model.model)
    with pytest.raises(ConfigError, match="cannot tell packed dialogues apart"):
        check_packs(backbone)


def test_packed_run(flags: dict[str, object]) -> None:
    config = resolve_config(flags | {"packing": True, "sequence_length": 100})
    report = train_heads(config)
    assert report.losses[-1][1] < report.losses[0][1]


def test_frequent_tokens_are_those_of_the_assistant() -> None:
    ids = torch.tensor([9, 9, 9, 3, 3, 5, 5, 4], dtype=torch.int32)
    is_target = torch.tensor([False, False, False, True, True, True, True, True])
    assert frequent_tokens([Example(ids, is_target)] * 2, 2, 12).tolist() == [3, 5]
    assert frequent_tokens([Example(ids, is_target)], 4, 12).tolist() == [0, 3, 4, 5]
    with pytest.raises(ConfigError, match="draft_vocab 13 is more than the model's 12"):
        frequent_tokens([], 13, 12)


@pytest.mark.parametrize("kind", list(LossKind))
def test_draft_vocabulary_by_definition(
    flags: dict[str, object],
    dialogues: Path,
    tiny_chat: ChatTokenizer,
    tiny_backbone: Backbone,
    kind: LossKind,
) -> None:
    """Teacher: softmax over the map's rows. Hard: targets off the map are not counted."""
    examples = load_examples([dialogues], tiny_chat, sequence_length=512)
    config = resolve_config(flags | {"draft_vocab": 12, "loss": kind})
    model = new_module(config, examples)
    assert isinstance(model.heads, MedusaHeads)
    token_map = frequent_tokens(examples, 12, 320)
    assert model.heads.token_map is not None
    assert model.heads.token_map.tolist() == token_map.tolist()
    row = ExampleDataset(examples[:1])[0]
    hidden = tiny_backbone.model.model(input_ids=row["input_ids"][None]).last_hidden_state[0]
    rows = tiny_backbone.lm_head_weight[token_map]
    expected, skipped = torch.zeros(()), 0
    for target in range(2, len(row["labels"])):
        if (row["labels"][target - 1 : target + 1] == NO_TARGET).any():
            continue
        drafted = model.heads.draft_logits(hidden[target - 2][None])[0, 0].log_softmax(-1)
        wanted = (rows @ hidden[target - 1]).softmax(-1)
        if kind == LossKind.HARD:
            wanted = (token_map == row["labels"][target]).float()
            skipped += int(wanted.sum() == 0)
        expected = expected - (wanted * drafted).sum()
    found = model(row["input_ids"][None], row["labels"][None], num_items_in_batch=1)["head_losses"][0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    assert skipped > 0 or kind == LossKind.TEACHER


def test_accuracy_of_a_draft_vocabulary_counts_tokens_it_lacks(
    flags: dict[str, object], dialogues: Path, tiny_chat: ChatTokenizer, tiny_backbone: Backbone
) -> None:
    examples = load_examples([dialogues], tiny_chat, sequence_length=512)[:6]
    model = new_module(resolve_config(flags | {"draft_vocab": 40}), examples)
    assert isinstance(model.heads, MedusaHeads)
    assert model.heads.token_map is not None
    hits, count = 0, 0
    for row in (ExampleDataset(examples)[i] for i in range(6)):
        out = tiny_backbone.model(input_ids=row["input_ids"][None], output_hidden_states=True)
        for target in range(2, len(row["labels"])):
            if (row["labels"][target - 1 : target + 1] == NO_TARGET).any():
                continue
            guess = model.heads.draft_logits(out.hidden_states[-1][0, target - 2][None])[0, 0].argmax()
            hits += int(model.heads.token_map[guess] == out.logits[0, target - 1].argmax())
            count += 1
    evaluation = evaluate_heads(model, examples, batch_size=3)
    assert evaluation is not None
    assert evaluation.accuracy[0] == pytest.approx(hits / count)


def test_run_with_a_draft_vocabulary(flags: dict[str, object]) -> None:
    config = resolve_config(flags | {"draft_vocab": 24, "max_steps": 2})
    train_heads(config)
    heads = load_heads(config.out, hidden_size=64, vocab_size=320)
    assert heads.vocab_size == 24
    assert heads.token_map is not None
    assert len(heads.token_map) == 24
