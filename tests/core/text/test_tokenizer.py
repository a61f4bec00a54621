"""Loading tokenizers and templates from the layouts that repositories have."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.errors import TokenizerError
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.sentencepiece import convert_sentencepiece
from medusa_core.text.tokenizer import builtin_templates, load_chat_tokenizer

TURNS = [
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "How may I help?"},
    {"role": "user", "content": "Book a table."},
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture
def copy_of(tmp_path: Path):
    """A writable copy of a model directory without its weights, under a name of one's choice."""

    def copy(source: Path, name: str = "model") -> Path:
        return shutil.copytree(
            source, tmp_path / name, ignore=shutil.ignore_patterns("*.bin", "*.safetensors")
        )

    return copy


def write_json(path: Path, **values: object) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def test_loading_and_rendering_import_no_torch(tiny_model_dir, vicuna_layout_dir):
    code = (
        "import sys; from medusa_core.text.tokenizer import load_chat_tokenizer\n"
        "import medusa_core.text.detokenizer\n"
        "for path in sys.argv[1:]: load_chat_tokenizer(path).render([{'role': 'user', 'content': 'hi'}])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tiny_model_dir), str(vicuna_layout_dir)], check=True, timeout=120
    )


def test_render_uses_the_models_own_template(tiny_model_dir):
    chat = load_chat_tokenizer(tiny_model_dir)
    ids = chat.render(TURNS)
    assert chat.tokenizer.convert_ids_to_tokens([ids[0], ids[-2], ids[-1]]) == [
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
    ]
    assert chat.decode(ids) == "HelloHow may I help?Book a table."


def test_facts_of_the_tiny_model(tiny_model_dir):
    chat = load_chat_tokenizer(str(tiny_model_dir))
    assert chat.eos_token_ids == {0, 4}
    assert chat.vocab_size == 320
    assert chat.default_params == SamplingParams(temperature=0.3, top_p=0.95)


def test_template_refusal_carries_its_message(tiny_model_dir):
    chat = load_chat_tokenizer(tiny_model_dir)
    with pytest.raises(TokenizerError, match="unknown role: tool"):
        chat.render([{"role": "tool", "content": "x"}])
    with pytest.raises(TokenizerError, match="refuses"):
        chat.render([{"content": "no role"}])


def test_half_a_surrogate_pair_is_refused(tiny_model_dir):
    chat = load_chat_tokenizer(tiny_model_dir)
    with pytest.raises(TokenizerError, match="surrogate"):
        chat.render([{"role": "user", "content": "\ud800"}])


def test_template_by_path_and_by_name(tiny_model_dir, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    chat = load_chat_tokenizer(tiny_model_dir, str(template))
    assert chat.decode(chat.render(TURNS[:1])) == "[ Hello ]"
    vicuna = load_chat_tokenizer(tiny_model_dir, "vicuna")
    assert vicuna.decode(vicuna.render(TURNS[:1])).endswith("USER: Hello ASSISTANT:")


def test_unknown_template_is_refused(tiny_model_dir):
    with pytest.raises(TokenizerError, match="'chatmlx' is neither built in .*vicuna"):
        load_chat_tokenizer(tiny_model_dir, "chatmlx")


def test_templates_cannot_leave_the_sandbox(tiny_model_dir, tmp_path):
    template = tmp_path / "evil.jinja"
    template.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TokenizerError, match="refuses"):
        load_chat_tokenizer(tiny_model_dir, str(template)).render(TURNS)


def test_vicuna_prompt_is_fastchats(vicuna_layout_dir):
    chat = load_chat_tokenizer(vicuna_layout_dir)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(vicuna_layout_dir / "tokenizer.model"))
    first = f"{VICUNA_SYSTEM} USER: Hello ASSISTANT: How may I help?"
    second = "USER: Book a table. ASSISTANT:"
    assert chat.render(TURNS) == [1, *reference.encode(first), 2, *reference.encode(second)]


def test_vicuna_system_message_and_refusals(vicuna_layout_dir):
    chat = load_chat_tokenizer(vicuna_layout_dir)
    system = {"role": "system", "content": "Be brief."}
    assert chat.decode(chat.render([system, TURNS[0]])) == "Be brief. USER: Hello ASSISTANT:"
    with pytest.raises(TokenizerError, match="must come first"):
        chat.render([TURNS[0], system])
    with pytest.raises(TokenizerError, match="unknown role: tool"):
        chat.render([{"role": "tool", "content": "x"}])


def test_model_without_template_needs_one(vicuna_layout_dir, copy_of):
    plain = copy_of(vicuna_layout_dir, "llama-base")
    with pytest.raises(TokenizerError, match="MEDUSA_CHAT_TEMPLATE.*vicuna"):
        load_chat_tokenizer(plain)
    assert load_chat_tokenizer(plain, "vicuna").render(TURNS) == load_chat_tokenizer(
        vicuna_layout_dir
    ).render(TURNS)


def test_builtin_templates_are_packaged():
    assert builtin_templates() == ["vicuna"]


def test_template_beside_a_sentencepiece_model(vicuna_layout_dir, copy_of):
    path = copy_of(vicuna_layout_dir)
    template = "%s: {{ messages[0]['content'] }}"
    write_json(path / "tokenizer_config.json", chat_template=template % "config")
    assert load_chat_tokenizer(path).tokenizer.chat_template == template % "config"
    (path / "chat_template.jinja").write_text(template % "file")
    assert load_chat_tokenizer(path).tokenizer.chat_template == template % "file"


@settings(max_examples=200)
@given(
    text=st.text(st.one_of(st.sampled_from("helptown  .,12\né你"), st.characters(codec="utf-8")), max_size=60)
)
def test_sentencepiece_ids_are_sentencepieces(vicuna_layout_dir, text):
    chat, reference = _pair(vicuna_layout_dir / "tokenizer.model")
    if not any(token in text for token in ("<s>", "</s>", "<unk>")):
        assert chat.backend_tokenizer.encode(text).ids == [1, *reference.encode(text)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_with_its_default_normalizer(tmp_path, model_type):
    lines = [
        "Hello, how may I help you today?",
        "I need a cheap restaurant in the centre of town, please.",
    ] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type=model_type,
        minloglevel=2,
    )
    fast, reference = _pair(tmp_path / "tokenizer.model")
    for text in (
        "Hello",
        "  how   may I  ",
        "ｆｕｌｌ width ﬁ",
        "\u3000town é",
        "",
        "please\n\nhelp",
        "日本 x 日本語",
    ):
        assert fast.encode(text, add_special_tokens=False) == reference.encode(text), text
        assert fast.decode(reference.encode("need a cheap")) == "need a cheap"


def test_sentencepiece_without_legacy_prefix(vicuna_layout_dir, copy_of):
    path = copy_of(vicuna_layout_dir)
    write_json(path / "tokenizer_config.json", legacy=False, add_eos_token=True)
    fast = load_chat_tokenizer(path, "vicuna").tokenizer
    new = fast.convert_ids_to_tokens(fast.encode("help</s>town", add_special_tokens=False))
    old = load_chat_tokenizer(vicuna_layout_dir).tokenizer
    legacy = old.convert_ids_to_tokens(old.encode("help</s>town", add_special_tokens=False))
    behind = new.index("</s>") + 1
    assert not new[behind].startswith("\u2581")
    assert legacy[behind].startswith("\u2581")
    assert fast.encode("help")[-1] == fast.eos_token_id


def test_tokens_added_to_a_sentencepiece_model(vicuna_layout_dir, copy_of):
    path = copy_of(vicuna_layout_dir)
    (path / "added_tokens.json").write_text(json.dumps({"<pad>": 401}))
    write_json(
        path / "tokenizer_config.json",
        added_tokens_decoder={"400": {"content": "<|im_end|>", "special": True}},
    )
    chat = load_chat_tokenizer(path, "vicuna")
    assert chat.vocab_size == 402
    assert chat.encode("a<|im_end|><pad>")[-2:] == [400, 401]
    (path / "added_tokens.json").write_text(json.dumps({"<pad>": 555}))
    with pytest.raises(TokenizerError, match="'<pad>' cannot have id 555"):
        load_chat_tokenizer(path, "vicuna")


def test_unusable_sentencepiece_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    for content in (b"", b"not a protobuf \xff\xff"):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match="not a sentencepiece model"):
            convert_sentencepiece(path, {})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="char",
        minloglevel=2,
    )
    with pytest.raises(TokenizerError, match="word or character"):
        convert_sentencepiece(path, {})


def test_bos_outside_the_vocabulary_is_refused(vicuna_layout_dir, copy_of):
    path = copy_of(vicuna_layout_dir)
    write_json(path / "tokenizer_config.json", bos_token="<begin>")
    with pytest.raises(TokenizerError, match="<begin>"):
        load_chat_tokenizer(path, "vicuna")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "min_p": 0.1},
            SamplingParams(temperature=0.6, top_k=20, min_p=0.1),
        ),
        ({"do_sample": True}, SamplingParams()),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.0)),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingParams()),
    ],
)
def test_generation_defaults(tiny_model_dir, copy_of, values, expected):
    path = copy_of(tiny_model_dir)
    (path / "generation_config.json").write_text(json.dumps(values))
    assert load_chat_tokenizer(path).default_params == expected


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("temperature", -3, "temperature must be between 0 and 100, not -3"),
        ("top_p", 0, "top_p must be above 0"),
        ("min_p", 2, "min_p must be between"),
        ("top_k", 50.0, "top_k must be a whole number, not 50.0"),
    ],
)
def test_generation_defaults_out_of_range_are_refused(tiny_model_dir, copy_of, name, value, problem):
    path = copy_of(tiny_model_dir)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    with pytest.raises(TokenizerError, match=f"generation_config.json: {problem}"):
        load_chat_tokenizer(path)


def test_a_template_that_does_not_compile_is_refused_at_once(tiny_model_dir, tmp_path):
    template = tmp_path / "broken.jinja"
    template.write_text("{{ bos_token }}\n{% for %}")
    with pytest.raises(TokenizerError, match="chat template is broken in line 2"):
        load_chat_tokenizer(tiny_model_dir, str(template))


def test_a_template_without_the_messages_is_refused_at_once(tiny_model_dir, tmp_path):
    """A wrong name for the messages renders as nothing in Jinja: every prompt would be the same."""
    template = tmp_path / "deaf.jinja"
    template.write_text("{% for turn in conversation %}{{ turn['content'] }}{% endfor %}assistant:")
    with pytest.raises(TokenizerError, match="renders no message.*MEDUSA_CHAT_TEMPLATE.*vicuna"):
        load_chat_tokenizer(tiny_model_dir, str(template))


def test_a_template_that_refuses_some_messages_is_none_of_the_loaders_business(tiny_model_dir, tmp_path):
    template = tmp_path / "picky.jinja"
    template.write_text("{{ raise_exception('a system message must come first') }}")
    chat = load_chat_tokenizer(tiny_model_dir, str(template))
    with pytest.raises(TokenizerError, match="a system message must come first"):
        chat.render(TURNS)


def test_eos_comes_from_the_model_config_without_a_generation_config(tiny_model_dir, copy_of):
    path = copy_of(tiny_model_dir)
    (path / "generation_config.json").unlink()
    write_json(path / "config.json", eos_token_id=7)
    assert load_chat_tokenizer(path).eos_token_ids == {4, 7}
    write_json(path / "config.json", eos_token_id=[[7]])  # what is no id is none, not a crash
    assert load_chat_tokenizer(path).eos_token_ids == {4}


def test_broken_files_are_named(tiny_model_dir, copy_of, tmp_path):
    path = copy_of(tiny_model_dir)
    write_json(path / "generation_config.json", do_sample=True, temperature="warm")
    with pytest.raises(TokenizerError, match="temperature must be a number, not 'warm'"):
        load_chat_tokenizer(path)
    (path / "generation_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="generation_config.json is not a JSON object"):
        load_chat_tokenizer(path)
    (path / "generation_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"cannot read .*generation_config.json"):
        load_chat_tokenizer(path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read"):
        load_chat_tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_chat_tokenizer(path)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(TokenizerError, match="no model directory"):
        load_chat_tokenizer(tmp_path / "missing")
    with pytest.raises(TokenizerError, match="no model directory"):
        load_chat_tokenizer("./missing")
    with pytest.raises(TokenizerError, match="neither a local directory nor"):
        load_chat_tokenizer("nobody/has-this-model")  # HF_HUB_OFFLINE is set: answered without a network


def _pair(path: Path):
    return convert_sentencepiece(path, {}), sentencepiece.SentencePieceProcessor(model_file=str(path))
