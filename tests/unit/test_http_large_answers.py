"""Answers with many log-probabilities: what writing them holds beside them."""

from __future__ import annotations

import json
import tracemalloc

from octavo.v1 import common_pb2, inference_pb2

from router.http.ask import Options
from router.http.completions import CompletionView, read_completions

PROMPTS, TOKENS, TOP = 32, 64, 20


def answer_to(prompt: int) -> inference_pb2.CompleteResponse:
    answer = inference_pb2.CompleteResponse(request_id="req-1", model="m", digest="d" * 64)
    output = answer.outputs.add(text=" a" * TOKENS, finish_reason=common_pb2.FINISH_REASON_LENGTH)
    output.usage.prompt_tokens, output.usage.completion_tokens = 2, TOKENS
    for _ in range(TOKENS):
        entry = output.logprobs.add()
        entry.token.text, entry.token.logprob, entry.token.rank = " a", -0.5, 1
        for rank in range(TOP):
            entry.top.add(text=f" {prompt}-{rank}", logprob=-0.25 * rank, rank=rank + 1)
    return answer


def test_choices_are_written_one_at_a_time() -> None:
    """As objects all of them are several times their text."""
    ask = read_completions({"prompt": ["x"] * PROMPTS, "logprobs": TOP, "max_tokens": TOKENS}, Options())
    view = CompletionView(ask)
    answers = [answer_to(prompt) for prompt in range(PROMPTS)]
    view.answer(answers[:1])  # what is made once is made
    tracemalloc.start()
    try:
        text = view.answer(answers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(text)
    told = json.loads(text)
    assert [choice["index"] for choice in told["choices"]] == list(range(PROMPTS))
    assert told["choices"][7]["logprobs"]["top_logprobs"][3][" 7-5"] == -1.25
    assert told["id"] == "cmpl-1" and told["object"] == "text_completion"
    assert told["usage"]["completion_tokens"] == PROMPTS * TOKENS and told["usage"]["prompt_tokens"] == 2 * PROMPTS
