"""Converts a sentencepiece `tokenizer.model` to a `tokenizers.Tokenizer` that gives the same ids.

Supported are BPE and unigram, with or without byte fallback. Anything else is refused, since a tokenizer
that is nearly right silently makes a model worse.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from medusa_core.errors import TokenizerError

SPACE = "\u2581"  # sentencepiece's visible space
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def convert_sentencepiece(path: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizer.model`; `config` is the merged tokenizer configuration beside it.

    `add_bos_token` (default true, as for Llama), `add_eos_token` (false), `legacy` (true: a space goes before
    the text after every special token too, as sentencepiece applied piecewise does) and the special tokens'
    names are taken from it, and from the file where it has none.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise TokenizerError(f"{path} is not a sentencepiece model") from None
    _check_supported(path, proto)
    tokenizer = Tokenizer(_build_model(proto))
    _add_special_pieces(tokenizer, proto)
    _add_extra_tokens(tokenizer, path, config)
    legacy = config.get("legacy") is not False
    tokenizer.normalizer = _build_normalizer(proto, legacy)
    if not legacy and proto.normalizer_spec.add_dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = _build_decoder(proto)
    names = _special_names(proto, config)
    tokenizer.post_processor = _build_post_processor(tokenizer, names, config)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _check_supported(path: Path, proto: Any) -> None:
    if not proto.pieces:
        raise TokenizerError(f"{path} is not a sentencepiece model")
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise TokenizerError(f"{path} is a word or character model; only BPE and unigram ones can be used")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise TokenizerError(f"{path} puts spaces behind words, which is not supported")


def _build_model(proto: Any) -> models.Model:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == UNIGRAM:
        return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    return models.BPE(
        vocab={piece: i for i, (piece, _) in enumerate(pieces)},
        merges=_merges(proto),
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=fallback,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first: sentencepiece merges by score."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    splits = ((piece, i) for piece in ranked for i in range(1, len(piece)))
    return [(p[:i], p[i:]) for p, i in splits if p[:i] in scores and p[i:] in scores]


def _add_special_pieces(tokenizer: Tokenizer, proto: Any) -> None:
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    marked = [
        AddedToken(p.piece, normalized=False, special=kinds[p.type]) for p in proto.pieces if p.type in kinds
    ]
    tokenizer.add_tokens(marked)


def _add_extra_tokens(tokenizer: Tokenizer, path: Path, config: Mapping[str, Any]) -> None:
    """Tokens beyond the sentencepiece vocabulary, from `added_tokens_decoder` and `added_tokens.json`."""
    extra = {
        int(i): AddedToken(
            t["content"], normalized=t.get("normalized", False), special=t.get("special", False)
        )
        for i, t in config.get("added_tokens_decoder", {}).items()
    }
    added = path.parent / "added_tokens.json"
    if added.exists():
        names = json.loads(added.read_text(encoding="utf-8"))
        extra = {i: AddedToken(name, normalized=False) for name, i in names.items()} | extra
    for token_id, token in sorted(extra.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise TokenizerError(f"added token {token.content!r} cannot have id {token_id} behind {path}")


def _build_normalizer(proto: Any, legacy: bool) -> normalizers.Normalizer | None:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if legacy and spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if legacy or not spec.add_dummy_prefix:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps) if steps else None


def _build_decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def _special_names(proto: Any, config: Mapping[str, Any]) -> dict[str, str]:
    spec = proto.trainer_spec
    names = {}
    for name in SPECIAL_NAMES:
        kind, value = name.removesuffix("_token"), config.get(name)
        own = getattr(spec, f"{kind}_piece") if getattr(spec, f"{kind}_id") >= 0 else None
        names[name] = (value["content"] if isinstance(value, Mapping) else value) or own
    return {name: value for name, value in names.items() if value}


def _build_post_processor(
    tokenizer: Tokenizer, names: Mapping[str, str], config: Mapping[str, Any]
) -> processors.PostProcessor | None:
    """Puts BOS before and EOS behind the text where the configuration says so."""
    before = names.get("bos_token") if config.get("add_bos_token", True) else None
    behind = names.get("eos_token") if config.get("add_eos_token", False) else None
    used = [name for name in (before, behind) if name]
    for name in used:
        if tokenizer.token_to_id(name) is None:
            raise TokenizerError(f"special token {name!r} is not in the vocabulary")
    single = f"{before or ''} $A {behind or ''}".split()
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in used]
    )
