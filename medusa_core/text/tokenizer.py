"""Loads a model's tokenizer, chat template and generation defaults. No torch here.

`PreTrainedTokenizerFast` is imported and never `AutoTokenizer`, which would import torch: the HTTP process
tokenizes too, and it must start fast and hold no accelerator.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from medusa_core.errors import ConfigError, TokenizerError, first_line
from medusa_core.files import read_json
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.sentencepiece import convert_sentencepiece

TEMPLATES = Path(__file__).parent / "templates"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Everything but weights: enough to tokenize for a model that runs elsewhere.
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "*config.json", "*.jinja"]
# A template is the model author's code run on a user's messages: these are its ways to fail on bad ones.
TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer with its chat template, end-of-sequence ids and the model's own sampling.

    `vocab_size` is the greatest id plus one, which may be less than the model's padded vocabulary. Safe to
    share between threads.
    """

    tokenizer: PreTrainedTokenizerFast
    eos_token_ids: frozenset[int]
    vocab_size: int
    default_params: SamplingParams

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the conversation in the chat template's format, ready for the assistant's turn.

        The template alone decides about special tokens such as BOS. Raises TokenizerError with the
        template's own words if it refuses the messages.
        """
        return self._encode(self.render_text(messages), special=False)

    def render_text(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the chat template's format. Raises `TokenizerError` if it refuses it."""
        try:
            return _render_template(self.tokenizer, messages, add_generation_prompt)
        except TEMPLATE_FAILURES as error:
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the tokenizer puts around it (BOS)."""
        return self._encode(text, special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; `IncrementalDetokenizer` does the same piece by piece."""
        return self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TokenizerError("the text holds half a surrogate pair, which is not valid Unicode") from None
        # The backend itself: the wrapper changes truncation settings on every call, which threads must not.
        # As a batch of one, because only batches leave Python's lock to other threads meanwhile; a megabyte
        # takes a second.
        batch = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = batch[0].ids
        return ids


def load_chat_tokenizer(model: str | Path, chat_template: str | None = None) -> ChatTokenizer:
    """Load from a local directory, which never touches the network, or by Hub name.

    `chat_template` is the name of a built-in template or the path of a Jinja file; None takes the model's
    own, or Vicuna's for a model of that name. Raises TokenizerError if there is no usable tokenizer or
    template.
    """
    directory = _locate(model)
    names = ("special_tokens_map.json", "tokenizer_config.json")
    config = _optional_json(directory / names[0]) | _optional_json(directory / names[1])
    tokenizer = _load_tokenizer(directory, config)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    elif tokenizer.chat_template is None and "vicuna" in Path(model).resolve().name.lower():
        tokenizer.chat_template = read_template("vicuna")
    if tokenizer.chat_template is None:
        raise TokenizerError(f"{model}: the model has no chat template. {_TEMPLATE_REMEDY}")
    _check_template(tokenizer)
    generation = _optional_json(directory / "generation_config.json")
    return ChatTokenizer(
        tokenizer=tokenizer,
        eos_token_ids=_eos_ids(tokenizer, generation or _optional_json(directory / "config.json")),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        default_params=_default_params(generation),
    )


def builtin_templates() -> list[str]:
    """Names of the built-in chat templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(name: str) -> str:
    """The text of a built-in template, or of a Jinja file."""
    path = TEMPLATES / f"{name}.jinja" if name in builtin_templates() else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(builtin_templates())
        raise TokenizerError(
            f"chat template {name!r} is neither built in ({known}) nor a readable file"
        ) from error


_TEMPLATE_REMEDY = (
    f"Set MEDUSA_CHAT_TEMPLATE (--chat-template) to a built-in name ({', '.join(builtin_templates())}) "
    "or to the path of a Jinja file"
)


def _locate(model: str | Path) -> Path:
    """The local directory of a model's tokenizer files, downloaded if `model` is a Hub name."""
    path = Path(model)
    if path.is_dir():
        return path
    if isinstance(model, Path) or not HUB_NAME.fullmatch(model):
        raise TokenizerError(f"there is no model directory {model}")
    try:
        return Path(snapshot_download(model, allow_patterns=TOKENIZER_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TokenizerError(
            f"{model!r} is neither a local directory nor a model the Hub provides: {first_line(error)}"
        ) from error


def _load_tokenizer(directory: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    if (directory / "tokenizer.json").exists():
        try:
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
    if not (directory / "tokenizer.model").exists():
        raise TokenizerError(f"{directory} holds neither tokenizer.json nor tokenizer.model")
    tokenizer = convert_sentencepiece(directory / "tokenizer.model", config)
    template = directory / "chat_template.jinja"
    tokenizer.chat_template = (
        read_template(str(template)) if template.exists() else config.get("chat_template")
    )
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse at once a template that does not compile, or that leaves out what the user says.

    A template that refuses these two conversations may accept others.
    """
    texts = set()
    for content in ("Hello", "Goodbye"):
        try:
            texts.add(_render_template(tokenizer, [{"role": "user", "content": content}]))
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template is broken in line {error.lineno}: {error.message}"
            ) from error
        except TEMPLATE_FAILURES:
            return
    if len(texts) == 1:
        raise TokenizerError(
            "the chat template renders no message: its text is the same whatever the user says. "
            f"{_TEMPLATE_REMEDY}"
        )


def _render_template(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], add_prompt: bool = True
) -> str:
    """The conversation's text, up to the assistant's turn. Raises one of `TEMPLATE_FAILURES`."""
    turns = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=add_prompt, tokenize=False))


def _eos_ids(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> frozenset[int]:
    """The tokenizer's end-of-sequence id and those of the model's (generation) configuration."""
    declared = config.get("eos_token_id")
    ids = (tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared]))
    return frozenset(i for i in ids if isinstance(i, int))


def _default_params(config: Mapping[str, Any]) -> SamplingParams:
    """Sampling as `generation_config.json` recommends it.

    As in transformers, its values count only with `do_sample: true`, and an explicit `do_sample: false` is
    greedy decoding. Unlike there, a value that is not in the file has no hidden default (transformers would
    apply top-k 50).
    """
    if not config.get("do_sample"):
        return SamplingParams(temperature=0.0) if config.get("do_sample") is False else SamplingParams()
    names = ("temperature", "top_p", "top_k", "min_p")
    values = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TokenizerError(f"generation_config.json: {name} must be a number, not {value!r}")
    if isinstance(values.get("top_k"), float):
        raise TokenizerError(f"generation_config.json: top_k must be a whole number, not {values['top_k']}")
    try:
        return SamplingParams(**values)
    except ConfigError as error:
        raise TokenizerError(f"generation_config.json: {error}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError) if path.exists() else {}
