"""An inflated model computes what the small one does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from medusa_core.benchmark.inflate import InflatedShape, inflate_model
from medusa_core.benchmark.inflated import inflate_heads
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.errors import ConfigError

SMALL = InflatedShape(
    hidden_size=128, num_layers=4, num_query_heads=8, head_dim=16, intermediate_size=192, vocab_size=400
)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inflated(tiny: LlamaForCausalLM) -> LlamaForCausalLM:
    return inflate_model(tiny, SMALL)


def random_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def assert_same_logits(expected: Tensor, got: Tensor, own_rows: int) -> None:
    assert (got[..., :own_rows] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(got[..., own_rows:], torch.zeros_like(got[..., own_rows:]))


@torch.inference_mode()
def check_prefill_and_cache(own: LlamaForCausalLM, big: LlamaForCausalLM) -> None:
    rows = own.config.vocab_size
    tokens = torch.randint(0, rows, (1, 24), generator=torch.Generator().manual_seed(2))
    first, second = own(tokens[:, :20], use_cache=True), big(tokens[:, :20], use_cache=True)
    assert_same_logits(first.logits, second.logits, rows)
    for i in range(20, 24):
        step = tokens[:, i : i + 1]
        expected = own(step, past_key_values=first.past_key_values, use_cache=True).logits
        got = big(step, past_key_values=second.past_key_values, use_cache=True).logits
        assert_same_logits(expected, got, rows)


def test_inflated_model_keeps_the_logits(tiny: LlamaForCausalLM, inflated: LlamaForCausalLM) -> None:
    check_prefill_and_cache(tiny, inflated)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 0.5},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ],
    ids=["tied", "mha", "mqa", "large-eps", "scaled-rope"],
)
def test_every_variant_keeps_its_logits(changes: dict[str, object]) -> None:
    own = random_llama(**changes)
    with torch.no_grad():  # norms of ones would not show a weight in the wrong place
        for name, parameter in own.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    big = inflate_model(own, SMALL)
    group = own.config.num_attention_heads // own.config.num_key_value_heads
    assert big.config.num_key_value_heads == SMALL.num_query_heads // group
    check_prefill_and_cache(own, big)


def test_dead_weights_are_random(tiny: LlamaForCausalLM, inflated: LlamaForCausalLM) -> None:
    layer = inflated.model.layers[-1]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, inflated.lm_head.weight[:, 64:]):
        assert (weight == 0).float().mean() < 0.01
        assert weight.float().std() > 0.01
    assert not layer.self_attn.o_proj.weight.any()
    assert torch.isfinite(torch.cat([p.flatten() for p in inflated.parameters()])).all()


def test_seed_decides_the_dead_weights(tiny: LlamaForCausalLM, inflated: LlamaForCausalLM) -> None:
    again = inflate_model(tiny, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(inflated.parameters(), again.parameters(), strict=True))


def test_dtype_and_generation_settings(tiny: LlamaForCausalLM) -> None:
    big = inflate_model(tiny, SMALL, dtype=torch.bfloat16)
    assert {p.dtype for p in big.parameters()} == {torch.bfloat16}
    assert big.model.rotary_emb.inv_freq.dtype == torch.float32
    assert big.generation_config.eos_token_id == tiny.generation_config.eos_token_id
    assert not big.training


def random_heads(hidden: int, rows: int, num_layers: int) -> MedusaHeads:
    torch.manual_seed(3)
    heads = MedusaHeads(num_heads=3, num_layers=num_layers, hidden_size=hidden, vocab_size=rows)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=hidden**-0.5)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.inference_mode()
def test_inflated_heads_keep_their_logits(
    tiny: LlamaForCausalLM, inflated: LlamaForCausalLM, num_layers: int
) -> None:
    own = random_heads(64, 320, num_layers)
    big = inflate_heads(own, inflated)
    tokens = torch.arange(12)[None]
    hidden, wide = tiny.model(tokens).last_hidden_state[0], inflated.model(tokens).last_hidden_state[0]
    expected, got = own.draft_logits(hidden), big.draft_logits(wide)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert big.hidden_size == 128
    assert big.output_KVE is not None
    assert (big.output_KVE == 0).float().mean() < 0.01


@torch.inference_mode()
def test_heads_that_share_the_output_layer_keep_their_logits(
    tiny: LlamaForCausalLM, inflated: LlamaForCausalLM
) -> None:
    own = MedusaHeads.new(
        hidden_size=64,
        vocab_size=320,
        num_heads=2,
        num_layers=1,
        lm_head_weight=tiny.lm_head.weight,
        shared=True,
    )
    torch.nn.init.normal_(own.block_weights[0], std=0.1)
    big = inflate_heads(own, inflated)
    tokens = torch.arange(12)[None]
    expected = own.draft_logits(tiny.model(tokens).last_hidden_state[0])
    got = big.draft_logits(inflated.model(tokens).last_hidden_state[0])
    assert big.is_shared
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
@torch.inference_mode()
def test_inflated_hydra_heads_keep_their_logits(
    tiny: LlamaForCausalLM, inflated: LlamaForCausalLM, shared: bool, with_prefix: bool
) -> None:
    shape = HydraShape(num_heads=3, num_layers=2, hidden_size=64, vocab_size=320)
    own = HydraHeads.new(
        shape,
        lm_head_weight=tiny.lm_head.weight,
        embed=tiny.get_input_embeddings(),
        prefix=PrefixLayer(prefix_config(tiny.config)) if with_prefix else None,
        shared=shared,
    )
    for name, parameter in own.named_parameters():
        if "prefix" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    big = inflate_heads(own, inflated)
    tokens = torch.arange(12)[None]
    hidden, wide = tiny.model(tokens).last_hidden_state, inflated.model(tokens).last_hidden_state
    paths = torch.randint(0, 320, (12, 4, 3))
    expected = own.level_logits(2, own.contextualize(hidden)[0], paths)
    got = big.level_logits(2, big.contextualize(wide)[0], paths)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert big.shape.hidden_size == 128
    zeros = [(weight[:, :64] == 0).float().mean() for weight in big.first_weights]
    assert max(zeros) < 0.01  # what only meets zeros is random


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 32}, "head_dim is 32"),
        ({"hidden_size": 256}, "hidden size is 256"),
        ({"num_hidden_layers": 5}, "number of layers is 5"),
        ({"intermediate_size": 512}, "intermediate size is 512"),
        ({"vocab_size": 401}, "vocabulary is 401"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, "number of query heads is 12"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "groups of 3"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inflate_model(random_llama(**changes), SMALL)


def test_other_architectures_and_wide_heads_are_refused(inflated: LlamaForCausalLM) -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
    )
    with pytest.raises(ConfigError, match="MistralForCausalLM"):
        inflate_model(MistralForCausalLM(config), SMALL)
    with pytest.raises(ConfigError, match="hidden size 256"):
        inflate_heads(random_heads(256, 10, 1), inflated)


def test_unknown_heads_cannot_be_inflated(inflated: LlamaForCausalLM) -> None:
    class OtherHeads:
        num_heads, vocab_size = 1, 320

        def draft_logits(self, hidden_BE: Tensor) -> Tensor:
            return hidden_BE.new_zeros(len(hidden_BE), 1, 320)

    with pytest.raises(ConfigError, match="OtherHeads"):
        inflate_heads(OtherHeads(), inflated)


def test_quantized_weights_are_refused() -> None:
    own = random_llama()
    own.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantized"):
        inflate_model(own, SMALL)


@pytest.mark.slow
def test_real_shape_has_a_billion_parameters_and_the_same_logits() -> None:
    own = random_llama(
        head_dim=64, hidden_size=256, vocab_size=4096, intermediate_size=704, initializer_range=0.05
    )
    big = inflate_model(own, InflatedShape())
    assert 1.1e9 <= sum(p.numel() for p in big.parameters()) <= 1.3e9
    check_prefill_and_cache(own, big)
