"""The standard workloads: the token ids of the scripts that measured vLLM, and the table that holds us against it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from octavo.cli.load_spec import LoadSpec, body
from octavo.v1 import inference_pb2

from bench.serving_workloads import best, table
from bench.workloads import NAMES, bars, make_workload

# SHA-256 of the JSON of (prompts, output lengths), taken from those scripts.
DIGESTS = {
    ("w1", 0): "31379797c1d1bceb220995567b186b467200993c4c3536d9d08778dc60efda34",
    ("w2-64", 1): "60a5ee4d46053120da3fdc208c83abc8bcdec328db4eb178989af82677139fc8",
    ("w3", 0): "199c6f016a1bff739fe399ef430e2e67b723ccc922222a34259e5aaa10a10243",
    ("w4-8192", 2): "3c0c7ce8dc8d3dc52973c829fae0c3731531f24ef615234dc87d49c58b61b1eb",
    ("w5", 1): "d6e5fff87328cdec9faf4dd841531295f27fe968f2b93c6ab61c25a3e8661e8c",
}


@pytest.mark.parametrize(("name", "repeat"), DIGESTS)
def test_the_prompts_are_those_that_vllm_got(name: str, repeat: int) -> None:
    workload = make_workload(name, repeat)
    text = json.dumps([workload.prompts, workload.output_lens]).encode()
    assert hashlib.sha256(text).hexdigest() == DIGESTS[name, repeat]


@pytest.mark.parametrize("name", NAMES)
def test_a_repeat_has_other_tokens_of_the_same_lengths(name: str) -> None:
    first, second = (make_workload(name, repeat, vocab_size=500, shrink=8) for repeat in (0, 1))
    assert [len(prompt) for prompt in first.prompts] == [len(prompt) for prompt in second.prompts]
    assert first.output_lens == second.output_lens
    assert all(one != other for one, other in zip(first.prompts, second.prompts, strict=True))
    assert all(0 <= token < 500 for prompt in second.prompts for token in prompt)
    assert 1 <= first.concurrency <= len(first.prompts)


def test_an_unknown_workload_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="w9-1"):
        make_workload("w9-1")


def test_given_requests_are_sent_as_they_are() -> None:
    requests = [inference_pb2.GenerateRequest(model="m", text=str(number)) for number in range(5)]
    spec = LoadSpec(
        addresses=("a:1",), model="m", vocab_size=9, requests=5, concurrency=2, bodies=tuple(map(body, requests))
    )
    shares = [LoadSpec.from_json(share.to_json()) for share in spec.split(2)]
    sent = [share.request(share.first_request + index) for share in shares for index in range(share.requests)]
    assert sent == [request.SerializeToString() for request in requests]
    assert spec.request(-1) != sent[0]  # warm-up is of the spec's lengths
    assert "bodies" not in spec.public()


def _figures(**changes: Any) -> dict[str, Any]:
    names = ("seconds", "tokens_per_s", "ms_per_token", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    return dict.fromkeys(names, 1.0) | {"cpu_share": {"router-1": 0.5}} | changes


def test_the_table_says_what_was_reached() -> None:
    runs = [_figures(tokens_per_s=39_000.0), _figures(tokens_per_s=46_098.0)]
    found = {
        "w1": {"best": best("w1", [_figures(ms_per_token=1.2), _figures(ms_per_token=1.1)])},
        "w2-64": {"best": best("w2-64", runs)},
    }
    lines = table(found, bars("llama-1b")).splitlines()
    assert lines[1].split() == ["w1", "a", "token", "ms", "1.1", "0.81", "1.68", "1.53x", "1.05", "0.95", "MISSED"]
    assert lines[2].split()[-8:] == ["/s", "46,098", "60,000", "23,049", "2.00x", "40,000", "48,000", "reached"]
    assert "router-1 50%" in lines[-1]
    assert bars("another-model") == ()
    assert len(table(found, ()).splitlines()) == 3
