"""lm-evaluation-harness against a cluster with a real model: the log-likelihoods that it reads are those of transformers.

Both compute in float32, in other orders of addition: sums of up to 20 log-probabilities lay within 1.1e-4 of each other, and
those of a passage of 128 tokens within 1.0e-3.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.cluster import LocalCluster
from tests.clients.environments import environment

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("clients")]

HERE = Path(__file__).parent
TASKS = HERE / "lm_eval_tasks"
TOLERANCE = 1e-3
PASSAGE_TOLERANCE = 5e-3
WINDOW = 62  # tokens scored at a time where max_length is 64: one stands before them, one is generated


class Reference:
    """The model in transformers."""

    def __init__(self, model_dir: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def pair(self, context: str, continuation: str) -> tuple[float, bool]:
        """As lm-eval defines it: of the tokens of both as one text, those beyond as many as the context alone has are the
        continuation, even where a token spans the boundary. Spaces at the end of the context belong to the continuation.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        known = self._tokenizer(context)["input_ids"]
        whole = self._tokenizer(context + continuation)["input_ids"]
        return self.tokens([*known, *whole[len(known) :]], len(known))

    def rolling(self, text: str) -> float:
        """Every token once, in windows: the first after the token that ends texts, the last filled up from the left."""
        ids = [self._tokenizer.bos_token_id, *self._tokenizer(text)["input_ids"]]
        total = 0.0
        for begin in range(1, len(ids), WINDOW):
            end = min(begin + WINDOW, len(ids))
            first = max(0, end - WINDOW - 1)
            total += self.tokens(ids[first:end], begin - first)[0]
        return total

    def tokens(self, ids: list[int], known: int) -> tuple[float, bool]:
        """The log-likelihood of ids[known:], and whether each is the likeliest."""
        with torch.inference_mode():
            logprobs = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows, wanted = logprobs[known - 1 : len(ids) - 1], torch.tensor(ids[known:])
        chosen = rows.gather(1, wanted[:, None])
        return chosen.double().sum().item(), bool((rows.argmax(-1) == wanted).all())


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
    flags: dict[str, dict[str, Any]] = {"scheduler": lease, "router": lease, "worker": worker}
    with LocalCluster(redis=False, backend="torch", model=str(smollm2_dir), flags=flags, timeout=120) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def found(cluster: LocalCluster, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval found, without a network: its own cache is empty."""
    scratch = tmp_path_factory.mktemp("lm-eval")
    results = scratch / "results.json"
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [
            environment("lm_eval") / "bin" / "python",
            HERE / "drive_lm_eval.py",
            f"http://{cluster.gateways[0]}/v1",
            smollm2_dir,
            results,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=TASKS,
        env={
            **kept,
            "HF_HOME": str(scratch),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_EVALUATE_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Traceback" not in cluster.members["router-1"].log_text()
    whole: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return whole


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> Reference:
    return Reference(smollm2_dir)


@pytest.mark.parametrize("way", ["batched", "side by side"])
def test_log_likelihoods_are_those_of_transformers(found: dict[str, Any], reference: Reference, way: str) -> None:
    documents = [json.loads(line) for line in (TASKS / "choices.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(found[way]["documents"]) == len(documents)
    right = 0
    for document, scored in zip(documents, found[way]["documents"], strict=True):
        assert scored["requests"] == [[document["question"], choice] for choice in document["choices"]]
        wanted = [reference.pair(*request) for request in scored["requests"]]
        assert [value for value, _ in scored["answers"]] == pytest.approx([value for value, _ in wanted], abs=TOLERANCE)
        assert [greedy for _, greedy in scored["answers"]] == [greedy for _, greedy in wanted], document
        right += max(range(len(wanted)), key=lambda index: wanted[index][0]) == document["answer"]
    assert found[way]["metrics"]["acc"] == right / len(documents)
    assert 0.5 < right / len(documents) < 1


def test_rolling_log_likelihoods_are_those_of_transformers(found: dict[str, Any], reference: Reference) -> None:
    texts = [json.loads(line)["text"] for line in (TASKS / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = [reference.rolling(text) for text in texts]
    got = [document["answers"][0] for document in found["rolling"]["documents"]]
    assert got == pytest.approx(wanted, abs=PASSAGE_TOLERANCE)
    size = sum(len(text.encode()) for text in texts)
    assert found["rolling"]["metrics"]["byte_perplexity"] == pytest.approx(math.exp(-sum(wanted) / size), rel=1e-5)
