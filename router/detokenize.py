"""Token ids to text, piece by piece: the pieces join to exactly what `Tokenizer.decode` gives for all tokens together.

A tokenizer's decoder is unrolled once into a table, token id to its bytes or text; then decoding costs one list look-up
a token. Two families cover the models we serve:

- *byte level* (GPT-2, Llama 3, SmolLM2, Qwen): all tokens' bytes joined are UTF-8. Python's "replace" handler and
  Rust's `from_utf8_lossy` both put one U+FFFD for each maximal ill-formed part (Unicode 16, section 3.9), so they
  agree.
- *byte fallback* (SentencePiece: Llama 2, Mistral): tokens are text, but for `<0x..>` tokens. A run of those is text if
  the whole run is valid UTF-8, else one U+FFFD for each byte (`ByteFallback::decode_chain` in huggingface/tokenizers).
  So a run is known only when it has ended.

`tokenizers.DecodeStream` is not used: it has no flush, does not say which tokens its text belongs to, and fails
("Invalid prefix") where a later byte changes the text of an earlier one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_IDS = 1 << 22


class UnsupportedDecoder(Exception):
    """A tokenizer.json whose decoder is of a kind that we can't unroll; the text names it."""


class Detokenizer(Protocol):
    """The text of one output. Stateful; owned by one sequence."""

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Append tokens. Returns the text that is now complete and how many of the oldest waiting tokens it belongs to, exactly."""
        ...

    def finish(self) -> tuple[str, int]:
        """No more tokens come: the text of those still waiting, as a full decode would end, and their number."""
        ...

    def fresh(self) -> Detokenizer:
        """One of the same kind, at the beginning of an output."""
        ...


class TokenTable(Protocol):
    """A tokenizer's decoder, unrolled."""

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A new output's detokenizer."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token alone, special ones included; empty for an id without a token."""
        ...

    @property
    def max_token_bytes(self) -> int:
        """Length of the longest token, at least 1."""
        ...


def build_table(tokenizer: Tokenizer, shown: AbstractSet[str] = frozenset()) -> TokenTable:
    """Unroll a tokenizer's decoder. About a microsecond for each token of the vocabulary. `shown`: tokens that are never left
    out, special ones too. Raises UnsupportedDecoder.
    """
    num_ids = _num_ids(tokenizer)  # before anything that walks over all of them
    if num_ids > _MAX_IDS:
        raise UnsupportedDecoder(f"tokenizer.json: a token has the id {num_ids - 1}; {_MAX_IDS} ids may be")
    spec = json.loads(tokenizer.to_str())
    steps = _decoder_steps(spec.get("decoder"))
    tokens = [tokenizer.id_to_token(i) for i in range(num_ids)]
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special} - shown
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelTable(tokens, special)
    if "ByteFallback" in kinds:
        return ByteFallbackTable(tokens, special, _FallbackRules.parse(steps))
    raise UnsupportedDecoder(f"tokenizer.json: no support for a decoder of {kinds or 'no kind'}")


class ByteLevelTable:
    """Bytes of each token of a byte-level vocabulary."""

    def __init__(self, tokens: Sequence[str | None], special: set[str]) -> None:
        byte_of = _byte_level_alphabet()
        self._all = [b"" if token is None else _byte_level_bytes(token, byte_of) for token in tokens]
        self._plain = [b"" if token in special else data for token, data in zip(tokens, self._all, strict=True)]
        self._longest = max(map(len, self._all), default=1) or 1

    @property
    def max_token_bytes(self) -> int:
        return self._longest

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return _ByteLevelDetokenizer(self._plain if skip_special_tokens else self._all)

    def token_bytes(self, token_id: int) -> bytes:
        return self._all[token_id] if token_id < len(self._all) else b""


class _ByteLevelDetokenizer:
    """Text is given out only where a token's end is a character's end, so that tokens and text never part."""

    __slots__ = ("_decoder", "_table", "_text", "_waiting")

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        # Set while the last token ended inside a character.
        self._decoder: codecs.IncrementalDecoder | None = None
        self._text: list[str] = []
        self._waiting = 0

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        table = self._table
        try:
            pieces = [table[i] for i in token_ids]
        except IndexError:  # ids between the tokenizer's and the model's vocabulary size decode to nothing
            pieces = [table[i] if i < len(table) else b"" for i in token_ids]
        if self._decoder is None:
            try:
                return b"".join(pieces).decode(), len(pieces)
            except UnicodeDecodeError:
                pass
        return self._feed_slowly(pieces)

    def fresh(self) -> Detokenizer:
        return _ByteLevelDetokenizer(self._table)

    def finish(self) -> tuple[str, int]:
        if self._decoder is None:
            return "", 0
        self._text.append(self._decoder.decode(b"", final=True))
        return self._release()

    def _feed_slowly(self, pieces: list[bytes]) -> tuple[str, int]:
        done: list[str] = []
        count = 0
        decoder = self._decoder or codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = decoder
        for piece in pieces:
            self._text.append(decoder.decode(piece))
            self._waiting += 1
            if not decoder.getstate()[0]:
                text, released = self._release()
                self._decoder = decoder
                done.append(text)
                count += released
        if not decoder.getstate()[0]:
            self._decoder = None
        return "".join(done), count

    def _release(self) -> tuple[str, int]:
        text, count = "".join(self._text), self._waiting
        self._text, self._waiting, self._decoder = [], 0, None
        return text, count


class ByteFallbackTable:
    """Text, or byte, of each token of a SentencePiece vocabulary with byte fallback."""

    def __init__(self, tokens: Sequence[str | None], special: set[str], rules: _FallbackRules) -> None:
        self._rules = rules
        self._all = [None if token is None else rules.piece(token) for token in tokens]
        self._plain = [None if token in special else piece for token, piece in zip(tokens, self._all, strict=True)]
        self._longest = max((len(p.encode()) for p in self._all if isinstance(p, str)), default=1) or 1

    @property
    def max_token_bytes(self) -> int:
        return self._longest

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return _ByteFallbackDetokenizer(self._plain if skip_special_tokens else self._all, self._rules)

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._all[token_id] if token_id < len(self._all) else None
        if piece is None:
            return b""
        return bytes((piece,)) if isinstance(piece, int) else piece.encode()


class _ByteFallbackDetokenizer:
    __slots__ = ("_rules", "_run", "_strip", "_table", "_waiting")

    def __init__(self, table: list[str | int | None], rules: _FallbackRules) -> None:
        self._table = table
        self._rules = rules
        self._run = bytearray()
        self._waiting = 0  # tokens since the run began
        self._strip = rules.strip

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        table, size = self._table, len(self._table)
        done: list[str] = []
        count = 0
        for token_id in token_ids:
            piece = table[token_id] if token_id < size else None
            self._waiting += 1
            if isinstance(piece, int):
                self._run.append(piece)
                continue
            if piece is not None:
                done.append(self._end_run())
                done.append(piece)
            if not self._run:
                count += self._waiting
                self._waiting = 0
        return self._strip_start("".join(done)), count

    def fresh(self) -> Detokenizer:
        return _ByteFallbackDetokenizer(self._table, self._rules)

    def finish(self) -> tuple[str, int]:
        text, count = self._strip_start(self._end_run()), self._waiting
        self._waiting = 0
        return text, count

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip_start(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._rules.strip_content:
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


@dataclass(frozen=True, slots=True)
class _FallbackRules:
    """A decoder of the form Replace*, ByteFallback, Fuse, Strip?."""

    replace: tuple[tuple[str, str], ...]
    strip_content: str
    strip: int

    @classmethod
    def parse(cls, steps: list[dict[str, Any]]) -> _FallbackRules:
        kinds = [step["type"] for step in steps]
        at = kinds.index("ByteFallback")
        if any(kind != "Replace" for kind in kinds[:at]) or kinds[at + 1 :] not in (["Fuse"], ["Fuse", "Strip"]):
            raise UnsupportedDecoder(f"tokenizer.json: no support for a decoder of {kinds}")
        replace = []
        for step in steps[:at]:
            if "String" not in step["pattern"]:
                raise UnsupportedDecoder("tokenizer.json: no support for a decoder that replaces a regular expression")
            replace.append((step["pattern"]["String"], step["content"]))
        strip: dict[str, Any] = steps[-1] if kinds[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
        if strip["stop"]:
            raise UnsupportedDecoder("tokenizer.json: no support for a decoder that strips the end")
        return cls(tuple(replace), strip["content"], strip["start"])

    def piece(self, token: str) -> str | int:
        for old, new in self.replace:
            token = token.replace(old, new)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                return token
        return token


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
    return [decoder]


def _num_ids(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map of characters to bytes: printable ones stand for themselves, the others are moved to U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # an added token, kept as it is written
        return token.encode()
