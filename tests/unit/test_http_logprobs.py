"""Log-probabilities as completions show them."""

from __future__ import annotations

from octavo.v1 import inference_pb2

from router.http.jsontext import completion_logprobs


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
