"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, processors

from .errors import ConvertError, GGUFError
from .gguf_file import GGUFFile
from .tokenizer_models import byte_level_tokenizer, sentencepiece_tokenizer, with_bos_by_default

_MAX_TOKEN_CHARACTERS = 4096  # every way to split one is looked at


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says. Index of a token = its id."""

    kind: str  # "gpt2": byte-level BPE; "llama": SentencePiece BPE
    pre: str  # name of the pre-tokenizer, for "gpt2"
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]  # for "gpt2"
    scores: tuple[float, ...]  # for "llama"
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    bos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    end_token_ids: tuple[int, ...]  # EOS, end of turn, end of message: those that are named, without repeats

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text: control tokens and the unknown token."""
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        return frozenset(i for i, kind in enumerate(self.token_types) if kind in special)


def read_vocabulary(file: GGUFFile, vocab_size: int) -> Vocabulary:
    """Raises GGUFError where keys are missing or contradict each other, ConvertError for other kinds of tokenizer."""
    kind = file.string("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ConvertError(file.path, f"tokenizer.ggml.model is {kind!r}; gpt2 and llama can be converted")
    tokens = tuple(file.array("tokenizer.ggml.tokens"))
    if not 0 < len(tokens) <= vocab_size or not all(isinstance(token, str) for token in tokens):
        raise GGUFError(file.path, f"tokenizer.ggml.tokens holds {len(tokens)} tokens for {vocab_size} embeddings")
    types = tuple(file.array("tokenizer.ggml.token_type"))
    if len(types) != len(tokens):
        raise GGUFError(file.path, f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    scores = tuple(file.array("tokenizer.ggml.scores")) if kind == "llama" else ()
    if not all(type(score) is float for score in scores) or not all(type(number) is int for number in types):
        raise GGUFError(file.path, "tokenizer.ggml.scores or token_type holds something else than numbers")
    if max(map(len, tokens)) > _MAX_TOKEN_CHARACTERS:
        raise GGUFError(
            file.path, f"tokenizer.ggml.tokens holds a token of more than {_MAX_TOKEN_CHARACTERS} characters"
        )
    if kind == "llama" and len(scores) != len(tokens):
        raise GGUFError(file.path, f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    pre = file.string("tokenizer.ggml.pre") if kind == "gpt2" else ""
    ends = (_token_id(file, name, len(tokens)) for name in ("eos", "eot", "eom"))
    vocabulary = Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        token_types=types,
        merges=tuple(file.array("tokenizer.ggml.merges")) if kind == "gpt2" else (),
        scores=scores,
        add_bos=file.boolean("tokenizer.ggml.add_bos_token", kind == "llama" or with_bos_by_default(pre)),
        add_eos=file.boolean("tokenizer.ggml.add_eos_token", False),
        add_space_prefix=file.boolean("tokenizer.ggml.add_space_prefix", kind == "llama"),
        bos_token_id=_token_id(file, "bos", len(tokens)),
        unk_token_id=_token_id(file, "unknown", len(tokens)),
        pad_token_id=_token_id(file, "padding", len(tokens)),
        end_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
    )
    _check(file, vocabulary)
    return vocabulary


def _token_id(file: GGUFFile, name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.fields:
        return None
    if not 0 <= (token_id := file.integer(key)) < n_tokens:
        raise GGUFError(file.path, f"{key} is {token_id}, outside the {n_tokens} tokens")
    return token_id


def _check(file: GGUFFile, vocabulary: Vocabulary) -> None:
    if vocabulary.add_bos and vocabulary.bos_token_id is None:
        raise GGUFError(file.path, "wants a BOS before each text, but has no tokenizer.ggml.bos_token_id")
    if vocabulary.add_eos and not vocabulary.end_token_ids:
        raise GGUFError(file.path, "wants an EOS after each text, but has no tokenizer.ggml.eos_token_id")
    first_ids: dict[str, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        if first_ids.setdefault(token, i) != i:
            raise GGUFError(file.path, f"tokenizer.ggml.tokens holds {token!r} twice, as {first_ids[token]} and {i}")
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if file.fields.get(key):
            raise ConvertError(file.path, f"{key} asks for a text normalisation that is not supported")


def build_tokenizer(path: Path, vocabulary: Vocabulary) -> Tokenizer:
    """The `tokenizers` tokenizer. `path` is for messages. Raises GGUFError and ConvertError as `read_vocabulary` does."""
    vocab = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
        if kind != TokenType.UNUSED  # padding up to the size of the embedding matrix
    }
    if vocabulary.kind == "gpt2":
        tokenizer = byte_level_tokenizer(path, vocab, vocabulary.merges, vocabulary.pre)
    else:
        normal = {token for token, i in vocab.items() if vocabulary.token_types[i] == TokenType.NORMAL}
        scores = {token: vocabulary.scores[i] for token, i in vocab.items() if token in normal}
        unknown = None if vocabulary.unk_token_id is None else vocabulary.tokens[vocabulary.unk_token_id]
        tokenizer = sentencepiece_tokenizer(vocab, scores, unknown, vocabulary.add_space_prefix)
    for i, kind in enumerate(vocabulary.token_types):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = kind != TokenType.USER_DEFINED
            # Already in the vocabulary, so it keeps its id; this makes it atomic.
            tokenizer.add_tokens([AddedToken(vocabulary.tokens[i], special=special, normalized=False)])
    if vocabulary.add_bos or vocabulary.add_eos:
        tokenizer.post_processor = _template(vocabulary)
    return tokenizer


def _template(vocabulary: Vocabulary) -> Any:
    """Adds BOS and EOS where the file says so. Whoever encodes a filled-in chat template, which writes its own BOS,
    must therefore encode with add_special_tokens=False."""
    ids = {}
    if vocabulary.add_bos and vocabulary.bos_token_id is not None:
        ids["bos"] = vocabulary.bos_token_id
    if vocabulary.add_eos:
        ids["eos"] = vocabulary.end_token_ids[0]

    def pattern(sequence: str, type_id: int) -> list[str]:
        return [f"{part}:{type_id}" for part in ("bos", f"${sequence}", "eos") if part in ids or part[0] == "$"]

    return processors.TemplateProcessing(
        single=pattern("A", 0),
        pair=pattern("A", 0) + pattern("B", 1),
        special_tokens=[{"id": name, "ids": [i], "tokens": [vocabulary.tokens[i]]} for name, i in ids.items()],
    )


def tokenizer_config(file: GGUFFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by role, BOS and EOS behaviour, and the chat template if there is one."""
    arch = file.string("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.integer(f"{arch}.context_length"),
    }
    roles = {
        "bos_token": vocabulary.bos_token_id,
        "eos_token": next(iter(vocabulary.end_token_ids), None),
        "unk_token": vocabulary.unk_token_id,
        "pad_token": vocabulary.pad_token_id,
    }
    config |= {role: vocabulary.tokens[i] for role, i in roles.items() if i is not None}
    if "tokenizer.chat_template" in file.fields:
        config["chat_template"] = file.string("tokenizer.chat_template")
    return config
