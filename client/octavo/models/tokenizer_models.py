"""The two kinds of BPE in the Llama family, as `tokenizers` pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import ConvertError, GGUFError

# How text is cut before merging. GPT-2's own pattern is built into ByteLevel (use_regex=True); these are the patterns of
# the models' published tokenizer.json files. {digits} is where Llama 3 and Qwen differ.
_LETTERS_AND_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """One value of `tokenizer.ggml.pre`."""

    pattern: str | None = None  # None: GPT-2's
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token as a whole is taken without merging
    add_bos: bool = False  # llama.cpp's default where the file does not say


_LLAMA3 = _Pre(_LETTERS_AND_DIGITS.format(digits=r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_PRE: Mapping[str, _Pre] = {
    "gpt-2": _Pre(),
    "default": _Pre(),
    "smollm": _Pre(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Pre(_LETTERS_AND_DIGITS.format(digits=r"\p{N}"), nfc=True),
    "tekken": _Pre(_TEKKEN, ignore_merges=True, add_bos=True),
}


def with_bos_by_default(pre: str) -> bool:
    """Whether llama.cpp puts a BOS before each text where the file is silent about it."""
    return pre in _PRE and _PRE[pre].add_bos


def byte_level_tokenizer(path: Path, vocab: Mapping[str, int], merges: Sequence[str], pre: str) -> Tokenizer:
    """GPT-2's byte-level BPE. `merges` are "left right" in order of rank; `path` is for messages.

    Raises ConvertError for an unknown `pre`, GGUFError for a merge of or into something that is no token.
    """
    if pre not in _PRE:
        known = ", ".join(sorted(_PRE))
        raise ConvertError(path, f"tokenizer.ggml.pre is {pre!r}; known are {known}")
    rules = _PRE[pre]
    pairs = [_split_merge(path, vocab, merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if rules.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _split_merge(path: Path, vocab: Mapping[str, int], merge: object) -> tuple[str, str]:
    left, found, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
    if not found or left not in vocab or right not in vocab or left + right not in vocab:
        raise GGUFError(path, f"tokenizer.ggml.merges holds {merge!r}, which does not make a token out of two")
    return left, right


def sentencepiece_tokenizer(
    vocab: Mapping[str, int], scores: Mapping[str, float], unknown: str | None, add_space_prefix: bool
) -> Tokenizer:
    """SentencePiece's BPE with byte fallback (Llama 2, Mistral 7B). `scores` has the pieces that merging may make.

    SentencePiece joins the two neighbours whose joint piece has the best score, leftmost first; ranked merges do the
    same once every way to split a piece is a merge, ordered by the piece's score. As `LlamaConverter` of transformers.
    """
    merges = [
        (score, left, right)
        for piece, score in scores.items()
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in scores and right in scores
    ]
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1] + merge[2]], len(merge[1])))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=[(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if add_space_prefix else [spaces])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
