"""A long text is tokenized beside the event loop, not instead of it."""

from __future__ import annotations

import threading
import time

import pytest

from router.assets import ModelAssets
from service.errors import OctavoError
from worker.backends.mock_assets import mock_assets


@pytest.fixture(scope="module")
def assets() -> ModelAssets:
    return ModelAssets.load(mock_assets(32_000, 8_192))


def test_other_threads_run_while_a_long_text_is_tokenized(assets: ModelAssets) -> None:
    over = threading.Event()
    turns = 0

    def beside() -> None:
        nonlocal turns
        while not over.is_set():
            time.sleep(0.001)
            turns += 1

    thread = threading.Thread(target=beside)
    thread.start()
    began = turns
    ids = assets.encode_text("hello world " * 60_000)
    turned = turns - began
    over.set()
    thread.join()
    assert len(ids) > 60_000
    assert turned > 20  # with Python's lock held it is one, or two


def test_long_and_short_texts_get_the_same_tokens(assets: ModelAssets) -> None:
    word = "hello <s> wörld "
    long = word * 1_000
    for add in (True, False):
        assert assets.encode_text(long, add) == assets.plain_tokenizer.encode(long, add_special_tokens=add).ids
    assert assets.encode_rendered(long) == assets.tokenizer.encode(long, add_special_tokens=False).ids


@pytest.mark.parametrize("words", [3, 3_000])
def test_a_text_of_too_many_tokens_is_refused_before_they_are_listed(assets: ModelAssets, words: int) -> None:
    text = "hello " * words
    count = len(assets.encode_text(text))
    assert len(assets.encode_text(text, most=count)) == count
    with pytest.raises(OctavoError, match=f"{count} prompt tokens exceed the model's context of {count - 1} tokens"):
        assets.encode_text(text, most=count - 1)
