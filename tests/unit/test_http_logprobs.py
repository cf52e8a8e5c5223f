"""Log-probabilities as completions show them."""

from __future__ import annotations

import pytest
from octavo.v1 import inference_pb2
from tokenizers import Tokenizer

from router.detokenize import build_table
from router.http.jsontext import completion_logprobs
from tests.unit.router_fakes import byte_fallback_tokenizer, byte_level_tokenizer


def token(text: str, logprob: float, rank: int) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(text=text, logprob=logprob, rank=rank)


def test_of_tokens_with_the_same_text_the_likeliest_is_shown() -> None:
    """A scorer takes a token for the greedy one where nothing is above it: the best must not hide behind the chosen one's text."""
    entry = inference_pb2.TokenLogprobs(token=token("�", -5.0, 9), top=[token("�", -0.5, 1), token("a", -1.5, 2)])
    found = completion_logprobs([entry], "�")
    assert found["token_logprobs"] == [-5.0]
    assert found["top_logprobs"] == [{"�": -0.5, "a": -1.5}]


def test_the_chosen_token_is_shown_beside_the_best() -> None:
    entry = inference_pb2.TokenLogprobs(token=token("b", -5.0, 9), top=[token("a", -0.5, 1)])
    assert completion_logprobs([entry], "b")["top_logprobs"] == [{"b": -5.0, "a": -0.5}]


def offsets(tokenizer: Tokenizer, ids: list[int], first_offset: int = 0, text: str | None = None) -> list[int]:
    """What a completion of these tokens shows."""
    table = build_table(tokenizer)
    if text is None:
        detokenizer = table.detokenizer(skip_special_tokens=True)
        text = detokenizer.feed(ids)[0] + detokenizer.finish()[0]
    entries = []
    for token_id in ids:
        data = table.token_bytes(token_id)
        own = inference_pb2.TokenLogprob(token_id=token_id, text=data.decode(errors="replace"), bytes=data)
        entries.append(inference_pb2.TokenLogprobs(token=own))
    found: list[int] = completion_logprobs(entries, text, first_offset)["text_offset"]
    return found


def ids_of(tokenizer: Tokenizer, *pieces: bytes | str) -> list[int]:
    """A token for each byte of what is given as bytes, and one for each string."""
    names = {build_table(tokenizer).token_bytes(token_id): token_id for token_id in range(tokenizer.get_vocab_size())}
    ids: list[int] = []
    for piece in pieces:
        ids += [names[piece.encode()]] if isinstance(piece, str) else [names[bytes((byte,))] for byte in piece]
    return ids


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["level", "fallback"])
def test_the_tokens_of_one_character_share_its_offset_and_those_after_it_go_on(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a", "🦀".encode(), "a", "日本".encode(), "h", "</s>")
    assert offsets(tokenizer, ids) == [0, 1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6]
    assert offsets(tokenizer, ids, first_offset=10)[-2:] == [15, 16]


def test_a_token_with_pieces_of_two_characters_stands_at_the_first() -> None:
    pieces = ["ab\u20ac".encode()[:4], "\u20ac".encode()[2:] + b"c", b"d"]
    entries = [
        inference_pb2.TokenLogprobs(token=inference_pb2.TokenLogprob(text=p.decode(errors="replace"), bytes=p))
        for p in pieces
    ]
    assert completion_logprobs(entries, "ab\u20accd")["text_offset"] == [0, 2, 4]


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["level", "fallback"])
def test_bytes_that_are_no_character_do_not_hold_up_the_tokens_after_them(tokenizer: Tokenizer) -> None:
    """Of which the one kind makes one replacement, and the other one for each byte."""
    ids = ids_of(tokenizer, "a", "🦀".encode()[:3], "h", "e", "🦀".encode()[:2])
    shown = offsets(tokenizer, ids)
    table = build_table(tokenizer)
    text = table.detokenizer(skip_special_tokens=True).feed(ids)[0]
    assert [text[at] for at in (shown[0], shown[4], shown[5])] == ["a", "h", "e"]


def test_a_character_that_a_prompt_broke_in_two_does_not_hold_up_the_tokens_after_it() -> None:
    """Prompt and output are decoded apart, so that its pieces have replacements on both sides."""
    ids = ids_of(byte_level_tokenizer(), "🦀".encode(), "h", "e")
    assert offsets(byte_level_tokenizer(), ids, text="\ufffd\ufffd\ufffdhe")[-2:] == [3, 4]


def test_the_space_that_a_tokenizer_leaves_out_does_not_count() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert offsets(tokenizer, ids_of(tokenizer, " hello", " world", ".")) == [0, 5, 11]
