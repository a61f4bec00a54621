"""One engine for many architectures: speculation, ordinary decoding and transformers' `generate` agree."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from medusa_core.config import EngineConfig
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.tree import grow_tree
from medusa_core.engine.engine import Engine
from medusa_core.errors import CheckpointError, ConfigError
from medusa_core.model.backbone import Backbone, load_backbone
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from tests.core.conftest import decode, fit_heads, new_heads, one_row, speculate

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
WINDOW = 12
MIXED = ["sliding_attention", "full_attention"]
SOFT_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "llama tied": ("LlamaConfig", COMMON | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 8}),
    "qwen3 mixed": (
        "Qwen3Config",
        COMMON | {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "mistral": ("MistralConfig", COMMON | {"head_dim": 8, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", COMMON | SOFT_CAPS | {"head_dim": 8, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        COMMON | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "cohere": ("CohereConfig", COMMON | {"logit_scale": 0.5}),
    "phi": ("PhiConfig", COMMON | {"num_key_value_heads": 4}),
    "mixtral": ("MixtralConfig", COMMON | {"num_local_experts": 4}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 320,
            "n_positions": 256,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 4,
            "pad_token_id": 0,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "init_std": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 4,
            "pad_token_id": 0,
        },
    ),
}
SCALED = {"gemma2", "cohere"}  # logits are not the output layer's product alone


def build_model(name: str) -> PreTrainedModel:
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def named_model(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    return request.param, build_model(request.param)


def test_speculation_equals_baseline_and_transformers(
    named_model: tuple[str, PreTrainedModel], tiny_chat: ChatTokenizer
) -> None:
    """With a prompt and an answer that outgrow every sliding window."""
    _, model = named_model
    prompt = [5 + 11 * i % 310 for i in range(20)]
    reference = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
    )[0].tolist()
    backbone = Backbone(model)
    heads = fit_heads(new_heads(backbone), backbone, [(reference, len(prompt))], steps=60, lr=0.03)
    config = EngineConfig(dtype="float32", measure=False, tree_nodes=16, prefill_chunk=7)
    engine = Engine.from_parts(model, tiny_chat, heads, config)
    for tree in ("off", "dynamic", "static", "mc_sim_7b_63"):
        speculation = speculate("off") if tree == "off" else speculate(tree=tree)
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, speculation=speculation)
        answer = decode(engine, prompt, params)
        assert answer.token_ids == reference[len(prompt) :]
        longest = max(len(run) for run in answer.runs)
        assert longest == 1 if tree == "off" else longest >= 3


def test_tree_nodes_are_teacher_forced(named_model: tuple[str, PreTrainedModel]) -> None:
    """Each node's logits and hidden state are those of the plain sequence of its ancestors."""
    name, model = named_model
    backbone = Backbone(model)
    assert backbone.splits == (name not in SCALED)
    tree = grow_tree([[0.5, 0.2, 0.1], [0.4, 0.2], [0.3, 0.2]], 12)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 320, (1, tree.size), generator=generator)
    for cached in (3, 9, 30):  # within, across and beyond the window
        prefix = torch.randint(5, 320, (cached,), generator=generator).tolist()
        rows = one_row(backbone, 64)
        ancestors = torch.tensor(
            [[column in tree.ancestors[row] for column in range(tree.size)] for row in range(tree.size)]
        )
        with torch.inference_mode():
            backbone.prefill(prefix, rows)
            positions = torch.tensor([tree.depths]) + cached
            output = backbone.forward(tokens, positions, ancestors[None], rows)
            for node in range(tree.size):
                path = [int(tokens[0, a]) for a in sorted(tree.ancestors[node])]
                plain = model(torch.tensor([prefix + path]), output_hidden_states=True)
                torch.testing.assert_close(
                    output.logits_BTV[0, node], plain.logits[0, -1], atol=1e-5, rtol=1e-5
                )
                torch.testing.assert_close(
                    output.hidden_BTE[0, node], plain.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5
                )


def test_last_logits_only(named_model: tuple[str, PreTrainedModel]) -> None:
    backbone = Backbone(named_model[1], vocab_size=300)
    with torch.inference_mode():
        output = backbone.prefill([5, 6, 7, 8, 9], one_row(backbone, 16))
        whole = backbone.model(torch.tensor([[5, 6, 7, 8, 9]])).logits
    assert output.hidden_BTE.shape == (1, 5, 32)
    assert output.logits_BTV.shape == (1, 1, 300)
    torch.testing.assert_close(output.logits_BTV[0, 0], whole[0, -1, :300], atol=1e-5, rtol=1e-5)
    assert backbone.lm_head_weight.shape == (300, 32)


def test_a_cache_beyond_all_memory(tiny_backbone: Backbone) -> None:
    with pytest.raises(
        ConfigError, match=r"a cache of 3 slots of \d+ tokens needs .* GiB.*lower slots or max_length"
    ):
        tiny_backbone.new_cache(3, 2**44)


UNSUPPORTED = {
    "recurrent": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "not supported",
    ),
    "no positions": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no positions"),
    "alibi": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "takes no positions",
    ),
    "layers of two shapes": (
        "Gemma4TextConfig",
        COMMON
        | {"head_dim": 8, "global_head_dim": 16, "layer_types": MIXED, "vocab_size_per_layer_input": 320},
        "must share one key/value shape",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_architectures_are_refused(case: str) -> None:
    kind, settings, message = UNSUPPORTED[case]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, kind)(**{"vocab_size": 320} | settings)
    with pytest.raises(CheckpointError, match=message):
        Backbone(transformers.AutoModelForCausalLM.from_config(config))


def test_context_where_rotary_tables_depend_on_the_length() -> None:
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
    for rope, expected in (
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        (longrope | {"original_max_position_embeddings": 64}, 64),
    ):
        config = transformers.LlamaConfig(**COMMON, rope_parameters={"rope_theta": 10000.0} | rope)
        assert Backbone(transformers.AutoModelForCausalLM.from_config(config)).max_positions == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(tiny_model_dir: Path, tiny_chat: ChatTokenizer, dtype: torch.dtype) -> None:
    """Masks, cache, heads and noise take the model's type, and speculation still decodes."""
    backbone = load_backbone(tiny_model_dir, dtype=dtype, device=CPU)
    assert backbone.dtype == dtype
    assert backbone.new_cache(1, 4).storage_L2BHCD.dtype == dtype
    config = EngineConfig(dtype="float32", measure=True, max_length=200)
    engine = Engine.from_parts(backbone.model, tiny_chat, new_heads(backbone), config)
    for temperature in (0.0, 1.0):
        for mode in ("exact", "typical", "off"):
            params = SamplingParams(
                temperature=temperature, max_tokens=16, ignore_eos=True, speculation=speculate(mode)
            )
            assert len(decode(engine, [9, 8, 7], params).token_ids) == 16


def test_vicuna_layout_loads(vicuna_layout_dir: Path) -> None:
    chat = load_chat_tokenizer(vicuna_layout_dir)
    backbone = load_backbone(vicuna_layout_dir, dtype=torch.float32, device=CPU, vocab_size=chat.vocab_size)
    assert backbone.vocab_size == chat.vocab_size == backbone.model.config.vocab_size - 32
    state = torch.load(vicuna_layout_dir / "pytorch_model-00002-of-00002.bin", weights_only=True)
    assert torch.equal(backbone.lm_head_weight, state["lm_head.weight"][: chat.vocab_size])
    engine = Engine.from_pretrained(vicuna_layout_dir, config=EngineConfig(dtype="float32", measure=False))
    messages = [{"role": "user", "content": "Hello"}]
    outputs = list(engine.steps(messages, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))
    assert max(token for output in outputs for token in output.token_ids) < chat.vocab_size
    assert sum(len(output.token_ids) for output in outputs) == 8


Edit = Callable[[Path], object]


def configure(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def write_weights(change: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(change(weights.read_bytes()))

    return edit


def as_bin(content: object) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return edit


def as_index(index: object) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


class Evil:
    """Would create a file if it were unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return open, (str(self.target), "w")


BROKEN: dict[str, tuple[Edit, str]] = {
    "truncated": (write_weights(lambda data: data[:5000]), "cannot load the model .*incomplete metadata"),
    "garbage": (write_weights(lambda data: b"garbage" * 100), "cannot load the model .*header too large"),
    "empty": (write_weights(lambda data: b""), "cannot load the model .*header too small"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot load the model"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "senseless config": (configure(hidden_size="abc"), "'hidden_size'.*expected int"),
    "no heads": (configure(num_attention_heads=0), "ZeroDivisionError"),
    "other shapes": (
        configure(intermediate_size=96),
        "other shapes than its config says: model.layers.0.mlp",
    ),
    "missing": (configure(num_hidden_layers=3), r"lacks weights: model\.layers\.2\..* and 6 more"),
    "unexpected": (configure(num_hidden_layers=1), r"weights its config does not know: model\.layers\.1\."),
    "unknown type": (configure(model_type="nosuch"), "model type `nosuch`"),
    "no causal LM": (configure(model_type="t5"), "T5Config"),
    "own code": (
        configure(model_type="own", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}),
        "custom code",
    ),
    "layer types": (
        configure(model_type="qwen3", layer_types=["full_attention", "chunked_attention"]),
        "cannot load the model|lacks weights|not supported",
    ),
    "damaged bin": (as_bin(b"\x80\x02garbage"), "its .bin weights are damaged or hold more than tensors"),
    "index without a map": (as_index({}), "KeyError: 'weight_map'"),
    "index of no file": (as_index({"metadata": {}, "weight_map": {"a": "no.safetensors"}}), "no.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_refused_in_one_line(tiny_model_dir: Path, tmp_path: Path, case: str) -> None:
    edit, message = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    edit(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(folder, dtype=torch.float32, device=CPU)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_nothing_but_tensors_is_unpickled(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    as_bin({"model.norm.weight": Evil(tmp_path / "written")})(folder)
    with pytest.raises(CheckpointError, match="its .bin weights are damaged or hold more than tensors"):
        load_backbone(folder, dtype=torch.float32, device=CPU)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", ["/nosuch/model", "./nosuch", "../nosuch", "a/b/c", "~/nosuch/deep/model"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no model directory at {name}"):
        load_backbone(name, dtype=torch.float32, device=CPU)


def test_a_hub_name_without_network_or_cache() -> None:
    with pytest.raises(CheckpointError, match="cannot load the model nobody/nothing: We couldn't connect"):
        load_backbone("nobody/nothing", dtype=torch.float32, device=CPU)


def test_heads_among_the_weights_are_no_surprise(
    tiny_model_dir: Path, tmp_path: Path, random_heads: MedusaHeads
) -> None:
    """Format C: `medusa_head.*` keys in the model's own file belong to the heads."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "model.safetensors"
    extra = {
        "medusa_head.0.0.linear.bias": torch.zeros(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    assert load_backbone(folder, dtype=torch.float32, device=CPU).vocab_size == 320


class _BatchedProducts(TorchDispatchMode):
    """Shapes of what goes into batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.bmm:
            self.shapes += [tuple(operand.shape) for operand in args]
        return func(*args, **(kwargs or {}))


def test_a_prefill_multiplies_by_the_output_layer_once(tiny_backbone: Backbone) -> None:
    """As a batched product it would copy the layer's weights first, in bfloat16."""
    with (
        torch.no_grad(),
        _BatchedProducts() as products,
    ):  # inference mode would hide them in larger operations
        tiny_backbone.prefill(list(range(5, 12)), one_row(tiny_backbone, 64))
    vocab_size, hidden_size = tiny_backbone.model.get_output_embeddings().weight.shape
    assert (1, hidden_size, vocab_size) not in products.shapes
