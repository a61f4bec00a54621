"""Engines on the tiny model, with random heads and with heads that learnt its answers by heart."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from medusa_core.accuracy import HeadCalibration
from medusa_core.backbone import Backbone, load_backbone
from medusa_core.config import EngineConfig
from medusa_core.decoding.step import prefill_chunk
from medusa_core.engine import Engine
from medusa_core.heads.base import DraftHeads
from medusa_core.heads.medusa import MedusaHeads
from medusa_core.request import FinishReason, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.tokenizer import ChatTokenizer, load_chat_tokenizer

NUM_HEADS = 4
BuildEngine = Callable[..., Engine]


@dataclass(frozen=True)
class Decoded:
    """A whole answer: tokens, tokens of each step, and how it ended."""

    token_ids: list[int]
    runs: list[tuple[int, ...]]
    finish_reason: FinishReason | None
    stop_token_id: int | None


def decode(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> Decoded:
    outputs = list(engine.generate(prompt_ids, params))
    runs = [output.token_ids for output in outputs]
    last = outputs[-1]
    return Decoded([t for run in runs for t in run], runs, last.finish_reason, last.stop_token_id)


def speculate(mode: str = "exact", tree: str = "dynamic", **rest: float) -> SpeculationParams:
    return SpeculationParams(mode=SpeculationMode(mode), tree=tree, **rest)


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


@pytest.fixture(scope="session")
def random_heads(tiny_backbone: Backbone) -> MedusaHeads:
    heads = new_heads(tiny_backbone)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return heads


@pytest.fixture(scope="session")
def trained_heads(
    tiny_backbone: Backbone, tiny_chat: ChatTokenizer, tiny_prompts: list[list[int]]
) -> MedusaHeads:
    """Heads fitted to the model's own greedy answers, so that long runs are accepted."""
    config = EngineConfig(dtype="float32", measure=False)
    engine = Engine.from_parts(tiny_backbone.model, tiny_chat, None, config)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    rows, targets = [], []
    with torch.inference_mode():
        for prompt in tiny_prompts[:80]:
            ids = [*prompt, *decode(engine, prompt, params).token_ids]
            slot = tiny_backbone.new_cache(1, len(ids)).slots[0]
            hidden = prefill_chunk(tiny_backbone, slot, ids).hidden_BTE[0]
            for position in range(len(prompt) - 1, len(ids) - NUM_HEADS - 1):
                rows.append(hidden[position])
                targets.append(ids[position + 2 : position + 2 + NUM_HEADS])
    heads = new_heads(tiny_backbone)
    inputs = torch.stack(rows).clone().expand(NUM_HEADS, -1, -1)
    wanted_KN = torch.tensor(targets).T
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    for _ in range(120):
        logits_KNV = heads._project(heads.features(inputs))
        loss = torch.nn.functional.cross_entropy(logits_KNV.flatten(0, 1), wanted_KN.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.requires_grad_(False)


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
