"""True sentences from a real model through all services: the goldens over gRPC, the prefix cache, seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from octavo.client import Client
from octavo.v1 import common_pb2

from deploy.cluster import LocalCluster

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text(encoding="utf-8"))
NEAR_TIE = 1e-3

pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(scope="module")
def cluster(smollm2_dir: Path) -> Iterator[LocalCluster]:
    lease = {"lease-ms": 5000}
    worker = {
        **lease,
        "dtype": "float32",
        "max-model-len": 1024,
        "num-blocks": 256,
        "served-name": "smollm2",
        "threads": 1,
    }
    flags = {"scheduler": lease, "router": lease, "worker": worker}
    with LocalCluster(redis=False, backend="torch", model=str(smollm2_dir), flags=flags, timeout=120) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.routers[0]) as client:
        yield client


def test_a_schema_holds_beside_penalties_logprobs_and_siblings(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.complete(
        messages=[{"role": "user", "content": "Describe a person in JSON."}],
        json_schema=json.dumps(schema),
        n=2,
        seed=5,
        max_tokens=120,
        presence_penalty=0.4,
        logit_bias={30: -5.0},
        logprobs=2,
    )
    for output in answer.outputs:
        assert output.finish_reason == common_pb2.FINISH_REASON_STOP
        jsonschema.validate(json.loads(output.text), schema)
        assert len(output.logprobs) == len(output.token_ids)


def test_rows_under_grammars_leave_their_neighbours_as_they_are(client: Client) -> None:
    plain: list[dict[str, Any]] = [
        {"prompt": "The capital of France is", "temperature": 0.0, "max_tokens": 24},
        {"prompt": "Once upon a time", "temperature": 0.8, "seed": 4, "max_tokens": 24},
    ]
    masked: list[dict[str, Any]] = [
        {"prompt": "Numbers:", "regex": "[0-9]{1,3}(, [0-9]{1,3}){5}", "seed": 1, "max_tokens": 60},
        {"prompt": "JSON:", "json_schema": "{}", "seed": 2, "max_tokens": 20},
        {"prompt": "Yes or no?", "choice": ["yes", "no"], "seed": 3, "max_tokens": 9},
    ]

    def run(options: dict[str, Any]) -> list[int]:
        return list(client.complete(**options).outputs[0].token_ids)

    alone = [run(options) for options in (*plain, *masked)]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(run, (*plain, *masked)))
    assert together == alone


def test_a_chat_gives_the_goldens_tokens_and_text(client: Client) -> None:
    case = GOLDEN["cases"][0]
    question = case["prompt"].partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    answer = client.complete(
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        max_tokens=len(case["output_token_ids"]),
        logprobs=0,
    )
    (output,) = answer.outputs
    assert output.usage.prompt_tokens == len(case["prompt_token_ids"])
    got = [entry.token.token_id for entry in output.logprobs]
    parting = next(
        (i for i, (want, have) in enumerate(zip(case["output_token_ids"], got, strict=False)) if want != have), None
    )
    assert parting is None or case["top1_minus_top2"][parting] < NEAR_TIE
    if parting is None:
        assert output.text == case["output_text"]
        assert [entry.token.logprob for entry in output.logprobs] == pytest.approx(
            case["logprobs"][: len(got)], abs=1e-3
        )


def test_a_second_request_with_the_same_prefix_finds_it_in_the_cache(client: Client) -> None:
    prompt = "Once upon a time, in a small town by the sea, there lived an old clockmaker who " * 4
    first = client.complete(prompt + "slept", temperature=0.0, max_tokens=4).outputs[0]
    second = client.complete(prompt + "sang", temperature=0.0, max_tokens=4).outputs[0]
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= 48
    again = client.complete(prompt + "slept", temperature=0.0, max_tokens=4).outputs[0]
    assert again.token_ids == first.token_ids


def test_the_same_seed_gives_the_same_text_and_n_outputs_differ(client: Client) -> None:
    options: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 1.0,
        "max_tokens": 12,
        "seed": 7,
        "n": 3,
        "ignore_eos": True,
    }
    one = client.complete("The weather today is", **options)
    two = client.complete("The weather today is", **options)
    texts = [output.text for output in one.outputs]
    assert texts == [output.text for output in two.outputs]
    assert len(set(texts)) == 3
