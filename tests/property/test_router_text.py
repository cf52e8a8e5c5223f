"""Properties of the router's text side: nothing is lost, nothing is said twice, whatever the tokens and however they are cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.v1 import common_pb2
from tokenizers import Tokenizer

from router.detokenize import TokenTable, build_table
from router.output import FinishRules, Output
from router.stop import StopMatcher, StopStrings
from tests.unit.router_fakes import byte_fallback_tokenizer, byte_level_tokenizer

TOKENIZERS = [byte_level_tokenizer(), byte_fallback_tokenizer()]
TABLES = [build_table(tokenizer) for tokenizer in TOKENIZERS]
KINDS = st.sampled_from([0, 1])
# Beyond the vocabulary, too: models pad theirs.
IDS = st.lists(st.integers(0, 345), max_size=60)
TEXTS = st.text(alphabet="hello 你好😀é\n.\u0301\u200d👩a�", max_size=40)


def cut(items: Sequence[int], seed: int) -> Iterator[Sequence[int]]:
    """The items in pieces of random length, empty ones among them."""
    generator = random.Random(seed)
    at = 0
    while at < len(items):
        size = generator.choice([0, 1, 1, 1, 2, 5])
        yield items[at : at + size]
        at += size


def pieces(table: TokenTable, ids: Sequence[int], skip: bool, seed: int) -> Iterator[tuple[str, Sequence[int]]]:
    """What a detokenizer says, with the tokens that each piece belongs to."""
    detokenizer = table.detokenizer(skip)
    done = 0
    for part in cut(ids, seed):
        text, count = detokenizer.feed(part)
        yield text, ids[done : done + count]
        done += count
    text, count = detokenizer.finish()
    yield text, ids[done : done + count]
    assert done + count == len(ids)


@given(KINDS, IDS, st.booleans(), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_full_decode(kind: int, ids: list[int], skip: bool, seed: int) -> None:
    whole: Tokenizer = TOKENIZERS[kind]
    assert "".join(text for text, _ in pieces(TABLES[kind], ids, skip, seed)) == whole.decode(
        ids, skip_special_tokens=skip
    )


@given(KINDS, TEXTS, st.booleans(), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_multi_byte_text_comes_back(kind: int, text: str, skip: bool, seed: int) -> None:
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
    joined = "".join(piece for piece, _ in pieces(TABLES[kind], ids, skip, seed))
    assert joined == TOKENIZERS[kind].decode(ids, skip_special_tokens=skip)
    assert joined == text or kind == 1  # the fallback tokenizer prepends a space of its own


@given(KINDS, IDS, st.booleans(), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_a_piece_is_the_text_of_its_tokens(kind: int, ids: list[int], skip: bool, seed: int) -> None:
    """The text so far is always the full decode of the tokens so far: what a resume relies on."""
    text, tokens = "", []
    for piece, belonging in pieces(TABLES[kind], ids, skip, seed):
        text += piece
        tokens += belonging
        assert text == TOKENIZERS[kind].decode(tokens, skip_special_tokens=skip)


@given(st.integers(0, 330))
def test_token_bytes_are_those_of_the_decode(token_id: int) -> None:
    assert TABLES[0].token_bytes(token_id).decode(errors="replace") == TOKENIZERS[0].decode(
        [token_id], skip_special_tokens=False
    )


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4)


@given(STOPS, st.text(alphabet="abc", max_size=30), st.integers(0, 9))
@settings(max_examples=200)
def test_stop_strings_against_brute_force(stops: list[str], text: str, seed: int) -> None:
    matcher = StopMatcher(StopStrings(stops))
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = min(ends) if ends else None
    at = 0
    for part in cut([ord(character) for character in text], seed):
        piece = "".join(map(chr, part))
        match = matcher.feed(piece, allowed=True)
        if match is not None:
            assert expected is not None and (at + match.end, match.text) == (expected[0], expected[2])
            return
        at += len(piece)
        seen = text[:at]
        prefixes = [n for n in range(1, at + 1) if any(stop.startswith(seen[-n:]) for stop in stops)]
        assert matcher.held == max(prefixes, default=0)
    assert expected is None


def run_output(
    ids: list[int], rules: FinishRules, kind: int, seed: int, replayed: int | None = None
) -> tuple[str, list[int], Output]:
    """Feed an output in pieces, taking deltas at random times; with `replayed`, as a resume after so many deltas."""
    generator = random.Random(seed)
    output = Output(0, rules, TABLES[kind].detokenizer(True))
    text, tokens, deltas = "", [], 0

    def take() -> None:
        nonlocal text, tokens, deltas
        message = output.take(None)
        if message is not None:
            delta = message.delta
            text += delta.text
            tokens += delta.token_ids
            deltas += 1
            assert delta.text_bytes == len(text.encode())

    for part in cut(ids, seed):
        output.append(part)
        if generator.random() < 0.5:
            take()
        if deltas == replayed:
            break
        if output.finish_reason:
            break
    if replayed is not None and deltas == replayed:
        output = Output(0, rules, TABLES[kind].detokenizer(True))
        output.replay(tokens, len(text.encode()))
        for part in cut(ids[len(tokens) :], seed + 1):
            output.append(part)
            take()
    take()
    return text, tokens, output


RULES = st.builds(
    FinishRules,
    max_tokens=st.integers(1, 60),
    min_tokens=st.integers(0, 10),
    stop_token_ids=st.sets(st.integers(0, 300), max_size=3).map(frozenset),
    stops=st.none()
    | st.lists(st.sampled_from(["he", "ll", "o", "你", "lo w", "�"]), min_size=1, max_size=3).map(StopStrings),
    include_stop=st.booleans(),
)


@given(KINDS, IDS, RULES, st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_deltas_do_not_depend_on_how_tokens_arrive(
    kind: int, ids: list[int], rules: FinishRules, seed: int, other: int
) -> None:
    text, tokens, output = run_output(ids, rules, kind, seed)
    again, more, second = run_output(ids, rules, kind, other)
    if output.finish_reason:
        assert (text, tokens) == (again, more)
        assert (output.finish_reason, output.stop_match) == (second.finish_reason, second.stop_match)
        assert list(output.token_ids) == tokens
        assert len(tokens) <= rules.max_tokens


@given(KINDS, IDS, RULES, st.integers(0, 9), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_a_resume_goes_on_where_it_stopped(
    kind: int, ids: list[int], rules: FinishRules, seed: int, cut_at: int
) -> None:
    ids = ([*ids, *TOKENIZERS[kind].encode("hello hello world, hello", add_special_tokens=False).ids] * 60)[:200]
    text, tokens, output = run_output(ids, rules, kind, seed)
    resumed, same, second = run_output(ids, rules, kind, seed, replayed=cut_at)
    assert output.finish_reason
    assert (resumed, same) == (text, tokens)
    assert (second.finish_reason, second.stop_match) == (output.finish_reason, output.stop_match)


@pytest.mark.parametrize("kind", [0, 1])
def test_an_output_cut_by_length_ends_as_a_full_decode(kind: int) -> None:
    ids = TOKENIZERS[kind].encode("hello 😀", add_special_tokens=False).ids
    if kind == 1:
        ids = [3 + byte for byte in "😀".encode()]
    output = Output(0, FinishRules(max_tokens=len(ids) - 1), TABLES[kind].detokenizer(True))
    output.append(ids)
    message = output.take(None)
    assert message is not None and output.finish_reason == common_pb2.FINISH_REASON_LENGTH
    text = message.delta.text
    assert text == TOKENIZERS[kind].decode(ids[:-1]) and text.endswith("\ufffd")
