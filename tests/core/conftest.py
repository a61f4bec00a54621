"""Engines on the tiny model, with random heads and with heads that learned its answers by heart."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import PreTrainedModel

from medusa_core.config import EngineConfig
from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.heads import DraftHeads, TrainingBatch
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.engine.engine import Engine
from medusa_core.engine.outputs import FinishReason
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.model.kv_cache import CacheRows
from medusa_core.request import Request
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer

NUM_HEADS = 4
AnyHeads = TypeVar("AnyHeads", MedusaHeads, HydraHeads)
BuildEngine = Callable[..., Engine]


@dataclass(frozen=True)
class Decoded:
    """A whole answer: tokens, tokens of each step, and how it ended."""

    token_ids: list[int]
    runs: list[tuple[int, ...]]
    finish_reason: FinishReason | None
    stop_token_id: int | None


def decode(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> Decoded:
    outputs = list(engine.steps(prompt_ids, params))
    runs = [output.token_ids for output in outputs]
    last = outputs[-1]
    return Decoded([t for run in runs for t in run], runs, last.finish_reason, last.stop_token_id)


def add(engine: Engine, request_id: str, prompt_ids: list[int], params: SamplingParams) -> None:
    engine.add(Request(request_id=request_id, prompt_ids=prompt_ids, params=params))


def speculate(
    mode: str = "exact", tree: str = "dynamic", source: str = "heads", **rest: float
) -> SpeculationParams:
    return SpeculationParams(mode=SpeculationMode(mode), source=DraftSourceName(source), tree=tree, **rest)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_model_dir: Path) -> Backbone:
    return load_backbone(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_chat(tiny_model_dir: Path) -> ChatTokenizer:
    return load_chat_tokenizer(tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 24, (240,), generator=generator).tolist()
    return [torch.randint(5, 320, (n,), generator=generator).tolist() for n in lengths]


def new_heads(backbone: Backbone, num_heads: int = NUM_HEADS) -> MedusaHeads:
    return MedusaHeads.new(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=num_heads,
        num_layers=1,
        lm_head_weight=backbone.lm_head_weight,
    )


def new_hydra_heads(backbone: Backbone, num_layers: int, *, with_prefix: bool) -> HydraHeads:
    torch.manual_seed(5)  # the prefix layer starts from torch's own generator
    shape = HydraShape(
        num_heads=NUM_HEADS,
        num_layers=num_layers,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
    )
    prefix = PrefixLayer.new(prefix_config(backbone.config)) if with_prefix else None
    embed = backbone.model.get_input_embeddings()
    return HydraHeads.new(shape, lm_head_weight=backbone.lm_head_weight, embed=embed, prefix=prefix)


def heads_of_kind(kind: str, backbone: Backbone) -> MedusaHeads | HydraHeads:
    if kind == "medusa":
        return new_heads(backbone)
    return new_hydra_heads(backbone, num_layers=1 if kind == "hydra" else 2, with_prefix=kind == "hydra++")


@torch.no_grad()
def randomize(heads: AnyHeads) -> AnyHeads:
    generator = torch.Generator().manual_seed(3)
    for parameter in heads.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return heads.requires_grad_(False)


def one_row(backbone: Backbone, capacity: int) -> CacheRows:
    """A cache of one slot, as the backbone takes it."""
    return backbone.new_cache(1, capacity).rows((0,))


def fit_heads(
    heads: AnyHeads, backbone: Backbone, answers: list[tuple[list[int], int]], *, steps: int, lr: float
) -> AnyHeads:
    """Fit heads to answers (all token ids and where the answer starts) until they know them by heart."""
    width = max(len(ids) for ids, _ in answers)
    tokens = torch.zeros(len(answers), width, dtype=torch.long)
    hidden = torch.zeros(len(answers), width, backbone.hidden_size)
    places: list[int] = []
    with torch.inference_mode():
        for row, (ids, start) in enumerate(answers):
            tokens[row, : len(ids)] = torch.tensor(ids)
            hidden[row, : len(ids)] = backbone.prefill(ids, one_row(backbone, len(ids))).hidden_BTE[0]
            places += [row * width + place for place in range(start - 1, len(ids) - NUM_HEADS - 1)]
    batch = TrainingBatch(hidden, tokens)
    source_KN = torch.tensor(places).expand(NUM_HEADS, -1)
    wanted_KN = tokens.flatten()[source_KN + 2 + torch.arange(NUM_HEADS)[:, None]]
    optimizer = torch.optim.Adam(heads.parameters(), lr=lr)
    for _ in range(steps):
        logits_KNV = torch.bmm(heads.features(batch, source_KN), heads.output.mT)
        loss = torch.nn.functional.cross_entropy(logits_KNV.flatten(0, 1), wanted_KN.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.requires_grad_(False)


@pytest.fixture(scope="session")
def random_heads(tiny_backbone: Backbone) -> MedusaHeads:
    return randomize(new_heads(tiny_backbone))


@pytest.fixture(scope="session")
def tiny_answers(
    tiny_backbone: Backbone, tiny_chat: ChatTokenizer, tiny_prompts: list[list[int]]
) -> list[tuple[list[int], int]]:
    """The model's own greedy answers: all token ids, and how many of them are the prompt."""
    config = EngineConfig(dtype="float32", measure=False)
    engine = Engine.from_parts(tiny_backbone.model, tiny_chat, None, config)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = tiny_prompts[:80]
    return [([*prompt, *decode(engine, prompt, params).token_ids], len(prompt)) for prompt in prompts]


@pytest.fixture(scope="session")
def plain(
    tiny_backbone: Backbone, tiny_chat: ChatTokenizer
) -> Callable[[list[int], SamplingParams], Decoded]:
    """Answers of an engine without heads, each decoded once: what speculation must not change."""
    config = EngineConfig(dtype="float32", measure=False)
    engine = Engine.from_parts(tiny_backbone.model, tiny_chat, None, config)
    answers: dict[str, Decoded] = {}

    def answer(prompt_ids: list[int], params: SamplingParams) -> Decoded:
        key = repr((prompt_ids, params))
        if key not in answers:
            answers[key] = decode(engine, prompt_ids, params)
        return answers[key]

    return answer


@pytest.fixture(scope="session")
def heads_that_know(
    tiny_backbone: Backbone, tiny_answers: list[tuple[list[int], int]]
) -> Callable[[str], MedusaHeads | HydraHeads]:
    """Heads of a kind fitted to the model's own answers, so that long runs are accepted."""

    @cache
    @torch.inference_mode(False)  # whatever the test that asks for them first runs in
    @torch.enable_grad()
    def fit(kind: str) -> MedusaHeads | HydraHeads:
        steps, lr = (120, 0.02) if kind == "medusa" else (60, 0.01)
        return fit_heads(heads_of_kind(kind, tiny_backbone), tiny_backbone, tiny_answers, steps=steps, lr=lr)

    return fit


@pytest.fixture(scope="session")
def trained_heads(heads_that_know: Callable[[str], MedusaHeads | HydraHeads]) -> MedusaHeads:
    heads = heads_that_know("medusa")
    assert isinstance(heads, MedusaHeads)
    return heads


@pytest.fixture
def build_engine(tiny_backbone: Backbone, tiny_chat: ChatTokenizer) -> BuildEngine:
    def build(
        heads: DraftHeads | None,
        *,
        model: PreTrainedModel | None = None,
        calibration: HeadCalibration | None = None,
        **settings: object,
    ) -> Engine:
        config = EngineConfig(**({"dtype": "float32", "measure": False, "tree_nodes": 16} | settings))  # type: ignore[arg-type]
        return Engine.from_parts(model or tiny_backbone.model, tiny_chat, heads, config, calibration)

    return build
