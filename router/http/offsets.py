"""Where tokens begin in a text, in characters: a character may be made of several tokens, and a token may hold pieces of two."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

_REPLACEMENT = "\ufffd"


def text_offsets(tokens: Iterable[tuple[str, bytes]], text: str) -> list[int]:
    """Of each token, given as its own text and its bytes, the place of the character that its first byte belongs to.

    `text` is what the tokens made together. Special tokens have no text there: they stand where the next one does.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[int] = []
    at, inside = 0, False  # the next character, and whether some of its bytes have been seen
    for own, data in tokens:
        if not inside and _REPLACEMENT not in own and text.startswith(own, at):  # whole characters, as nearly all are
            offsets.append(at)
            at += len(own)
            continue
        before = decoder.getstate()
        first = decoder.decode(data[:1])
        begin = at + len(first) - (bool(first) and not decoder.getstate()[0])
        made = first + decoder.decode(data[1:])
        if text.startswith(made, at):
            offsets.append(begin)
            at += len(made)
        else:
            offsets.append(at)
            decoder.reset()
            alone = decoder.decode(data)
            found = _stands(text, at, alone)
            if found is None:
                decoder.setstate(before)
            else:
                offsets[-1] = found[0]
                at = found[1]
        inside = bool(decoder.getstate()[0])
    return offsets


def _stands(text: str, at: int, piece: str) -> tuple[int, int] | None:
    """From where to where `piece` stands in a text that was decoded otherwise, or not at all: the space before the first word is
    left out by some tokenizers, and bytes that are no character have one replacement each, or one together, or two where a
    prompt ended among them.
    """
    if at == 0 and piece.startswith(" ") and text.startswith(piece[1:]):
        return 0, len(piece) - 1
    after = at
    while text.startswith(_REPLACEMENT, after):
        after += 1
    return (after, after + len(piece)) if after > at and piece and text.startswith(piece, after) else None
