"""The step as it is served on a CPU: static programs, compiled meanwhile; and text that no tree changes."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from medusa_core.config import EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.engine.runner import EagerRunner
from medusa_core.engine.self_check import SelfCheck
from medusa_core.engine.static_runner import StaticRunner
from medusa_core.programs.program import Argument
from medusa_core.programs.sizes import padded_size
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.tokenizer import ChatTokenizer
from tests.conftest import eventually

COMPILE_SECONDS = 900.0
CONFIG = EngineConfig(dtype="bfloat16", measure=False, tree_nodes=16, compile="off")
OFF = SpeculationParams(mode=SpeculationMode.OFF)
WAYS = (
    SpeculationParams(),
    SpeculationParams(tree="static"),
    SpeculationParams(tree="mc_sim_7b_63"),
    SpeculationParams(source=DraftSourceName.NGRAM),
    SpeculationParams(source=DraftSourceName.BOTH),
)
QUESTIONS = ("I need a cheap hotel in the north", "When does the train to Ely leave?", "Find me a museum")


def texts(engine: Engine, speculation: SpeculationParams) -> list[list[int]]:
    """Token ids of greedy and of sampled answers."""
    answers = []
    for seed, question in enumerate(QUESTIONS):
        for temperature, top_p in ((0.0, 1.0), (0.7, 1.0), (1.0, 0.95)):
            params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=48)
            messages = [{"role": "user", "content": question}]
            answer = engine.stream(messages, replace(params, speculation=speculation)).read()
            answers.append(list(answer.token_ids))
    return answers


def tiny_llama() -> transformers.PreTrainedModel:
    """In bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def test_in_bfloat16_no_tree_changes_the_text() -> None:
    engine = Engine.from_pretrained(heads="medusa-1", config=CONFIG)
    expected = texts(engine, OFF)
    for way in WAYS:
        assert texts(engine, way) == expected


@pytest.mark.slow
def test_the_step_is_compiled_behind_and_taken_over_between_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("COV")]:
        monkeypatch.delenv(name)  # measuring coverage of torch's compiler would take minutes
    caplog.set_level(logging.INFO)
    config = replace(CONFIG, compile="auto")
    engine = Engine.from_pretrained(heads="medusa-1", config=config)
    engine.compile_behind()
    if "no C++ compiler" in caplog.text:
        pytest.skip("needs a C++ compiler")
    assert engine.is_compiling
    child = engine._compilation._child
    assert child is not None
    assert len(texts(engine, WAYS[0])) == 9  # meanwhile it serves
    eventually(lambda: child.poll() is not None, COMPILE_SECONDS, "the compiler did not end")
    engine.add(engine.request("Hello", SamplingParams(max_tokens=8, temperature=0.0)))
    engine.upkeep()
    assert engine.is_compiling  # a request runs
    while engine.has_work:
        engine.step()
    engine.upkeep()
    assert not engine.is_compiling
    assert "the step runs compiled from now on" in caplog.text
    runner = engine._runner
    assert isinstance(runner, StaticRunner)
    assert all(switch.compiled is not None for switch in runner.programs)
    expected = texts(engine, OFF)
    for way in WAYS:
        assert texts(engine, way) == expected
    warm = Engine.from_pretrained(heads="medusa-1", config=config)
    assert texts(warm, WAYS[0]) == expected
    warm.compile_behind()
    assert not warm.is_compiling  # there is nothing left to compile


def test_a_model_with_an_attention_of_its_own_runs_eagerly_and_says_so(
    tiny_chat: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=12,
        max_position_embeddings=256,
    )
    model = transformers.Gemma2ForCausalLM(config)
    with caplog.at_level(logging.WARNING):
        engine = Engine.from_parts(model, tiny_chat, None, replace(CONFIG, dtype="float32"))
    assert isinstance(engine._runner, EagerRunner)
    assert "the step runs eagerly, and uncompiled: its attention is 'eager', not 'sdpa'" in caplog.text
    assert engine.stream([5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0)).read().token_ids


@pytest.mark.parametrize(("nodes", "size"), [(1, 4), (4, 4), (5, 8), (16, 16), (17, 24), (63, 64)])
def test_trees_run_in_few_sizes(nodes: int, size: int) -> None:
    assert padded_size(nodes) == size


def test_reproducible_or_not_is_another_attention(tiny_chat: ChatTokenizer) -> None:
    names = []
    for reproducible in (True, False):
        model = tiny_llama()
        Engine.from_parts(model, tiny_chat, None, replace(CONFIG, reproducible=reproducible))
        names.append(model.config._attn_implementation)
    assert names == ["medusa_tree", "medusa_tree_fast"]


def test_a_compiled_step_with_other_logits_is_not_used(
    tiny_chat: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    engine = Engine.from_parts(model, tiny_chat, None, CONFIG)
    assert isinstance(engine._runner, StaticRunner)
    verify = engine._runner.programs[0]
    check = SelfCheck(verify, engine.backbone)
    assert check.rows_are_the_same_anywhere()
    right = verify.program

    def wrong(*arguments: Argument) -> tuple[torch.Tensor, ...]:
        hidden, logits = right(*arguments)
        return hidden, logits.roll(1, dims=2)

    for program, is_kept in ((right, True), (wrong, False)):
        verify.compiled = program  # type: ignore[assignment]
        check.drop_wrong_program()
        assert (verify.compiled is program) == is_kept
    assert "has other logits than the uncompiled one" in caplog.text
