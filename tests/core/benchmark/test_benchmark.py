"""`medusa bench` on a tiny model: the report, its arithmetic, and that identity is really compared."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from medusa_core.benchmark import report
from medusa_core.benchmark.bench import run_bench
from medusa_core.benchmark.compare import Variant, compare_tokens, decision_margin, interleave
from medusa_core.benchmark.inflate import InflatedShape, inflate_model
from medusa_core.benchmark.inflated import SHAPES, inflate_heads, inflated_engine
from medusa_core.benchmark.runs import Run, engine_runner, hf_runner
from medusa_core.benchmark.settings import BenchSettings
from medusa_core.checkpoints.writing import save_heads
from medusa_core.cli.bench import bench
from medusa_core.config import EngineConfig
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.engine.engine import Engine
from medusa_core.engine.outputs import StepStats
from medusa_core.errors import ConfigError, DataError, RequestError
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import Prompt, load_prompts
from medusa_core.text.tokenizer import load_chat_tokenizer

CONFIG = EngineConfig(dtype="float32", device="cpu", measure=False, tree_nodes=6)
SMALL = InflatedShape(
    hidden_size=128, num_layers=3, num_query_heads=8, head_dim=16, intermediate_size=192, vocab_size=400
)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, seed=0)


@pytest.fixture(scope="module")
def heads_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    heads = MedusaHeads.new(
        hidden_size=64, vocab_size=320, num_heads=3, num_layers=1, lm_head_weight=model.lm_head.weight
    )
    path = tmp_path_factory.mktemp("heads")
    save_heads(heads, path, base_model=str(tiny_model_dir))
    return path


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path, heads_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_model_dir, heads=heads_dir, config=CONFIG)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return load_prompts(limit=3)


def refuse_warning(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def measure(engine: Engine, prompts: Sequence[Prompt], **settings: Any) -> dict[str, Any]:
    return run_bench(engine, prompts, BenchSettings(max_tokens=10, **settings), warn=refuse_warning)


def test_report_has_the_documented_shape(engine: Engine, prompts: list[Prompt]) -> None:
    done: list[int] = []
    settings = BenchSettings(max_tokens=10, compare_hf=True, repeats=2)
    result = run_bench(engine, prompts, settings, warn=refuse_warning, on_prompt=lambda: done.append(1))
    assert len(done) == 3
    assert {
        "baseline",
        "medusa",
        "hf_generate",
        "speedup",
        "identical",
        "prompts",
        "tokens",
        "config",
    } <= set(result)
    assert {"tokens_per_second", "step_seconds"} <= set(result["baseline"])
    medusa = result["medusa"]
    assert {"tokens_per_second", "step_seconds", "acceptance_length", "phases", "tree_nodes"} <= set(medusa)
    assert set(medusa["phases"]) == {"propose", "verify", "commit", "other"}
    assert len(medusa["acceptance_by_head"]) == 3
    assert all(0.0 <= share <= 1.0 for share in medusa["acceptance_by_head"])
    assert 1.0 <= medusa["acceptance_length"] <= 4.0
    assert medusa["tree_nodes"] == 6
    assert result["speedup"] == pytest.approx(
        medusa["tokens_per_second"] / result["baseline"]["tokens_per_second"]
    )
    assert result["identical"] == {"same": 3, "of": 3, "first_divergence_margin": None}
    assert result["hf_generate"]["identical"] == {"same": 3, "of": 3, "first_divergence_margin": None}
    assert result["prompts"] == 3
    assert 3 < result["tokens"] <= 30
    assert result["config"]["dtype"] == "float32"
    assert result["config"]["repeats"] == 2
    json.dumps(result, allow_nan=False)


def test_sampled_runs_agree_too(engine: Engine, prompts: list[Prompt]) -> None:
    result = measure(engine, prompts, temperature=0.8, top_p=0.95, seed=7, compare_hf=True, tree="static")
    assert result["identical"]["same"] == 3
    assert result["hf_generate"]["identical"] is None
    assert result["hf_generate"]["tokens_per_second"] > 0


def test_baseline_runs_without_speculation_and_medusa_with(engine: Engine, prompts: list[Prompt]) -> None:
    run = engine_runner(engine)
    ids = engine.chat_tokenizer.render(prompts[0].messages)
    off = run(
        ids,
        SamplingParams(
            max_tokens=6, temperature=0.0, speculation=SpeculationParams(mode=SpeculationMode.OFF)
        ),
    )
    on = run(ids, SamplingParams(max_tokens=6, temperature=0.0, seed=0))
    assert off.token_ids == on.token_ids
    assert [step.tree_nodes for step in off.steps] == [1] * off.decoded_tokens
    assert {step.mode for step in off.steps} == {SpeculationMode.OFF}
    assert SpeculationMode.EXACT in {step.mode for step in on.steps}


def test_the_stop_token_counts_as_decoded(engine: Engine, prompts: list[Prompt]) -> None:
    run = engine_runner(engine)
    ids = engine.chat_tokenizer.render(prompts[0].messages)
    free = run(ids, GREEDY)
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    stopped = run(ids, SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=(stop,), seed=0))
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.decoded_tokens == first


def test_a_failing_request_ends_the_benchmark(engine: Engine) -> None:
    with pytest.raises(RequestError):
        engine_runner(engine)([999_999], GREEDY)


def test_prompts_too_long_are_skipped_with_a_warning(engine: Engine, prompts: list[Prompt]) -> None:
    long = Prompt(({"role": "user", "content": "a long story " * 300},), "stories.jsonl, line 9")
    warnings: list[str] = []
    settings = BenchSettings(max_tokens=4)
    result = run_bench(engine, [long, prompts[0]], settings, warn=warnings.append)
    assert result["prompts"] == result["skipped_prompts"] == 1
    assert len(warnings) == 1
    assert warnings[0].startswith("stories.jsonl, line 9: skipped")
    with pytest.raises(DataError, match="no prompt leaves room"):
        run_bench(engine, [long], settings, warn=warnings.append)


def test_a_prompt_the_template_refuses_is_named(engine: Engine) -> None:
    odd = Prompt(({"role": "narrator", "content": "Once"},), "p.jsonl, line 4")
    with pytest.raises(DataError, match="p.jsonl, line 4: .*unknown role: narrator"):
        measure(engine, [odd])


def test_settings_that_measure_nothing_are_refused(tiny_model_dir: Path, prompts: list[Prompt]) -> None:
    bare = Engine.from_pretrained(tiny_model_dir, heads="none", config=CONFIG)
    with pytest.raises(ConfigError, match="--heads"):
        measure(bare, prompts)
    with pytest.raises(ConfigError, match="mode"):
        BenchSettings(mode=SpeculationMode.OFF)
    with pytest.raises(ConfigError, match="repeats"):
        BenchSettings(repeats=0)
    with pytest.raises(ConfigError, match="temperature"):
        BenchSettings(temperature=-1.0)


def test_order_rotates_and_every_prompt_has_its_seed() -> None:
    calls: list[tuple[str, int, int]] = []

    def runner(name: str) -> Variant:
        def run(prompt_ids: Sequence[int], params: SamplingParams) -> Run:
            calls.append((name, prompt_ids[0], params.seed))
            return Run((1, 2), 0.1, 0.1)

        return Variant(name, run)

    params = SamplingParams(max_tokens=20, temperature=1.0, seed=2**64 - 1)
    runs = interleave([runner("a"), runner("b")], [[10], [11]], params, repeats=2)
    assert calls[:2] == [("a", 10, 2**64 - 1), ("b", 10, 2**64 - 1)]  # the uncounted warm-up
    last = 2**64 - 1
    assert calls[2:6] == [("a", 10, last), ("b", 10, last), ("b", 10, last), ("a", 10, last)]
    assert calls[6:] == [("a", 11, 0), ("b", 11, 0), ("b", 11, 0), ("a", 11, 0)]
    assert [[len(repeats) for repeats in runs[name]] for name in "ab"] == [[2, 2], [2, 2]]


def test_divergence_is_found_and_its_margin_is_the_models(engine: Engine) -> None:
    prompt = [5, 6, 7]
    reference = [[Run((8, 9, 10), 0.1, 0.1)], [Run((8, 9), 0.1, 0.1)], [Run((8, 9), 0.1, 0.1)]]
    other = [[Run((8, 11, 10), 0.1, 0.1)], [Run((8, 9, 4), 0.1, 0.1)], [Run((8, 9), 0.1, 0.1)]]
    identity = compare_tokens(reference, other, [prompt] * 3, GREEDY, engine.backbone)
    assert (identity.same, identity.of) == (1, 3)
    logits = engine.backbone.model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
    expected = [float(best[0] - best[1]) for best in (logits[i].topk(2).values for i in (3, 4))]
    assert identity.margins == pytest.approx(expected, rel=1e-4)
    assert report.identity_figures(identity)["first_divergence_margin"] == pytest.approx(
        max(expected), rel=1e-4
    )


def test_margin_of_a_draw_includes_its_noise(engine: Engine) -> None:
    ids = [5, 6, 7]
    hot = decision_margin(engine.backbone, ids, SamplingParams(temperature=1.0, seed=1))
    other = decision_margin(engine.backbone, ids, SamplingParams(temperature=1.0, seed=2))
    assert hot != other
    only_one = decision_margin(engine.backbone, ids, SamplingParams(temperature=1.0, top_k=1, seed=0))
    assert only_one == pytest.approx(decision_margin(engine.backbone, ids, GREEDY))


def stats(
    seconds: float, *, nodes: int = 4, accepted: tuple[int, ...] = (), drafted: tuple[int, ...] = ()
) -> StepStats:
    return StepStats(
        mode=SpeculationMode.EXACT if nodes > 1 else SpeculationMode.OFF,
        is_prefill=False,
        seconds=seconds,
        propose_seconds=seconds / 4,
        verify_seconds=seconds / 2,
        commit_seconds=seconds / 8,
        tree_nodes=nodes,
        drafted=drafted,
        accepted=accepted,
    )


def test_figures_by_hand() -> None:
    runs = [
        [Run((1, 2, 3, 4, 5), 0.5, 2.0, (stats(0.8, accepted=(1, 0), drafted=(2, 1)), stats(0.8, nodes=1)))],
        [Run((1, 2, 3), 0.1, 0.5, (stats(0.4, accepted=(0, 0), drafted=(3, 0)),))],
        [Run((1,), 0.3, 0.0)],
    ]
    figures = report.rates(runs, [10, 10, 10])
    assert figures["tokens_per_second"] == pytest.approx((2.0 + 4.0) / 2)
    assert figures["overall_tokens_per_second"] == pytest.approx(6 / 2.5)
    assert figures["prefill_seconds"] == 0.3
    assert figures["prefill_tokens_per_second"] == pytest.approx(10 / 0.3)
    assert report.step_seconds(runs) == pytest.approx((1.0 + 0.5) / 2)
    gained = report.speculation_figures(runs)
    assert gained["acceptance_length"] == 6 / 3
    assert gained["acceptance_by_head"] == [0.5, 0.0]
    assert gained["tree_nodes"] == 4
    assert gained["speculating_share"] == pytest.approx(2 / 3)
    assert gained["phases"]["verify"] == pytest.approx((0.4 + 0.2) / 2)
    assert gained["phases"]["other"] == pytest.approx((1.0 - 0.7 + 0.5 - 0.35) / 2)


def test_nothing_decoded_gives_no_rates() -> None:
    runs = [[Run((1,), 0.3, 0.0)]]
    figures = report.rates(runs, [5])
    assert figures["tokens_per_second"] is None
    assert figures["overall_tokens_per_second"] is None
    assert report.ratio(figures, figures) is None
    assert report.step_seconds(runs) is None
    assert report.speculation_figures(runs)["acceptance_length"] is None


def test_table_tells_the_result(engine: Engine, prompts: list[Prompt]) -> None:
    result = measure(engine, prompts[:1], compare_hf=True)
    result["speedup"] = 2.5
    result["identical"] = {"same": 0, "of": 1, "first_divergence_margin": 0.0123}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.make_table(result))
    text = console.export_text()
    assert "speedup over the baseline: 2.50x" in text
    assert "0 of 1, widest margin where they part 0.0123" in text
    assert "hf generate" in text


def test_inflated_engine_writes_the_same_text(
    tiny_model_dir: Path, heads_dir: Path, engine: Engine, prompts: list[Prompt]
) -> None:
    big = inflated_engine(tiny_model_dir, heads_dir, CONFIG, SMALL)
    assert big.info.parameters > engine.info.parameters
    assert big.info.num_heads == 3
    for prompt in prompts:
        ids = engine.chat_tokenizer.render(prompt.messages)
        own, wide = engine_runner(engine)(ids, GREEDY), engine_runner(big)(ids, GREEDY)
        assert own.token_ids == wide.token_ids
        assert [step.accepted for step in own.steps] == [step.accepted for step in wide.steps]
    result = measure(big, prompts, compare_hf=True)
    assert result["identical"]["same"] == result["hf_generate"]["identical"]["same"] == 3


def test_inflated_engine_without_heads_is_a_plain_model(tiny_model_dir: Path) -> None:
    assert inflated_engine(tiny_model_dir, "none", CONFIG, SMALL).info.num_heads == 0


def test_padding_rows_are_never_drawn(tiny_model_dir: Path, prompts: list[Prompt]) -> None:
    """At a high temperature the 80 padding rows, whose logits are 0, would be drawn by `generate` soon."""
    small = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    chat = load_chat_tokenizer(tiny_model_dir)
    heads = MedusaHeads.new(
        hidden_size=64, vocab_size=320, num_heads=1, num_layers=1, lm_head_weight=small.lm_head.weight
    )
    big = inflate_model(small, SMALL)
    padded = Engine.from_parts(big, chat, inflate_heads(heads, big), CONFIG)
    ids = chat.render(prompts[0].messages)
    params = SamplingParams(max_tokens=60, temperature=50.0, ignore_eos=True, seed=0)
    for runner in (engine_runner(padded), hf_runner(padded)):
        tokens = runner(ids, params).token_ids
        assert len(tokens) == 60
        assert max(tokens) < 320


def test_the_1b_shape_is_the_issues() -> None:
    shape = SHAPES["1b"]
    assert (shape.hidden_size, shape.num_layers, shape.num_query_heads) == (2048, 22, 32)
    assert (shape.intermediate_size, shape.vocab_size, shape.head_dim) == (5632, 32000, 64)


@pytest.fixture(scope="module")
def bench_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(bench)
    return app


def test_command_prints_a_table_and_writes_json(
    bench_app: typer.Typer, tiny_model_dir: Path, heads_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "report.json"
    options = [
        "--model",
        str(tiny_model_dir),
        "--heads",
        str(heads_dir),
        "--dtype",
        "float32",
        "--limit",
        "2",
    ]
    options += ["--max-tokens", "5", "--tree-nodes", "4", "--mode", "typical", "--json", str(target)]
    result = CliRunner().invoke(bench_app, options)
    assert result.exit_code == 0, result.output
    assert "decode tokens/s" in result.stdout
    written = json.loads(target.read_text())
    assert written["hf_generate"] is None
    assert written["config"]["mode"] == "typical"
    assert written["config"]["inflate"] is None


def test_command_inflates(
    bench_app: typer.Typer,
    tiny_model_dir: Path,
    heads_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    target = tmp_path / "report.json"
    options = [
        "--model",
        str(tiny_model_dir),
        "--heads",
        str(heads_dir),
        "--dtype",
        "float32",
        "--limit",
        "1",
    ]
    options += ["--max-tokens", "3", "--tree-nodes", "4", "--inflate", "small", "--json", str(target)]
    result = CliRunner().invoke(bench_app, options)
    assert result.exit_code == 0, result.output
    config = json.loads(target.read_text())["config"]
    assert config["inflate"] == "small"
    assert config["parameters"] > 200_000


def test_command_says_that_it_cannot_write(
    bench_app: typer.Typer, tiny_model_dir: Path, heads_dir: Path, tmp_path: Path
) -> None:
    options = [
        "--model",
        str(tiny_model_dir),
        "--heads",
        str(heads_dir),
        "--dtype",
        "float32",
        "--limit",
        "1",
    ]
    options += ["--max-tokens", "2", "--tree-nodes", "4", "--json", str(tmp_path / ("x" * 300))]
    result = CliRunner().invoke(bench_app, options)
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--json", "/nowhere/at/all.json"], ConfigError),
        (["--inflate", "7b"], ConfigError),
        (["--prompts", "/nowhere/p.jsonl"], DataError),
        (["--dtype", "int4"], ConfigError),
        (["--mode", "off"], ConfigError),
    ],
)
def test_command_refuses_before_it_loads_a_model(
    bench_app: typer.Typer, tiny_model_dir: Path, options: list[str], error: type[Exception]
) -> None:
    result = CliRunner().invoke(bench_app, ["--model", str(tiny_model_dir), *options])
    assert isinstance(result.exception, error)
