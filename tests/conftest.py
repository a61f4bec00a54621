"""Small seeded models and tokenizers shared by every test, in the layouts real repositories have."""

import atexit
import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before these libraries are imported, as they read it only then. One thread a process, since several test
# processes share two cores; and no retries of a network that is not there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing of the user's cache is read or written, by servers that tests start either; one for all processes.
os.environ.pop("MEDUSA_CACHE_DIR", None)
# Servers compile nothing, unless a test says so: a dozen would do so at once.
os.environ["MEDUSA_COMPILE"] = "off"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="medusa-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}{{ message['content'] | trim }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TINY_VOCAB_SIZE = 320
SENTENCEPIECE_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TRAINING_LINES = (
    "Hello, how may I help you today?",
    "I need a cheap restaurant in the centre of town, please.",
    "There are several cheap restaurants in the centre. Would you like Italian or Indian food?",
    "Italian food sounds good. Please book a table for two people at seven in the evening.",
    "Your table for two people is booked. Is there anything else I can help you with?",
    "No, thank you, that is everything. Goodbye!",
)
# Fixtures that are live servers, each shared by many tests.
SERVERS = ("shared_server", "logged", "collected", "strict", "monitoring")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a server run in one process; all others in whichever has time (`--dist=loadgroup`)."""
    for item in items:
        for server in SERVERS:
            if server in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(server))


def eventually(
    condition: Callable[[], Any],
    timeout: float = 30.0,
    problem: str | Callable[[], str] = "timed out waiting",
) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, problem() if callable(problem) else problem
        time.sleep(0.02)
    return value


def free_ports(count: int) -> list[int]:
    """Different ones that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="session")
def dialogue_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `TINY_VOCAB_SIZE` entries, specials and template as in the demo model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    assert len(fast) == TINY_VOCAB_SIZE
    return fast


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, dialogue_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A saved random float32 Llama (2 layers, 4 query / 2 KV heads of 16, context 512), `dialogue_tokenizer`.

    Weights are wider than usual, so that its greedy text varies instead of repeating one token.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TINY_VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.15,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=4,
            pad_token_id=0,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.95, bos_token_id=0, eos_token_id=[4, 0], pad_token_id=0
    )
    path = tmp_path_factory.mktemp("tiny_model")
    model.save_pretrained(path)
    dialogue_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def vicuna_layout_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with exactly the files of `lmsys/vicuna-7b-v1.3`.

    Sharded `.bin` weights with an index, `tokenizer.model` alone (sentencepiece BPE, byte fallback, dummy
    prefix) and no chat template; 32 rows of padding beyond the tokenizer's ids.
    """
    path = tmp_path_factory.mktemp("hub") / "vicuna-tiny-v1.3"
    path.mkdir()
    vocab_size = _train_sentencepiece(path)
    _save_sharded_llama(path, vocab_size + 32)
    special = {
        name: {"__type": "AddedToken", "content": text} for name, text in SENTENCEPIECE_SPECIALS.items()
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config | special), encoding="utf-8")
    (path / "special_tokens_map.json").write_text(json.dumps(SENTENCEPIECE_SPECIALS), encoding="utf-8")
    return path


def _train_sentencepiece(path: Path) -> int:
    """Write `tokenizer.model` as Llama's was trained: identity normalizer, spaces kept. Returns its size."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_LINES),
        model_prefix=str(path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).vocab_size()


def _save_sharded_llama(path: Path, vocab_size: int) -> None:
    """Two `.bin` shards written by `torch.save`, as transformers 5 itself no longer writes them."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.15,
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.save_pretrained(path)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(path)
    state = LlamaForCausalLM(config).state_dict()
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, keys in shards.items():
        torch.save({key: state[key] for key in keys}, path / file)
    index = {
        "metadata": {"total_size": sum(tensor.numel() * tensor.element_size() for tensor in state.values())},
        "weight_map": {key: file for file, keys in shards.items() for key in keys},
    }
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
