"""lm-evaluation-harness: `python drive_lm_eval.py BASE_URL MODEL_DIR RESULTS`, run in its own environment beside the tasks.

It scores both tasks by its model `local-completions`, which sends token ids and reads the log-probabilities of the echo, and writes
what it found as JSON: the metrics, and of each document its requests' texts with the log-likelihoods it took from the answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

BASE_URL, MODEL_DIR, RESULTS = sys.argv[1:]


def score(task: str, **options: int) -> dict:
    model = {
        "model": "smollm2",
        "base_url": f"{BASE_URL}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": MODEL_DIR,
        "max_retries": 1,
        **options,
    }
    found = simple_evaluate(
        "local-completions",
        model_args=model,
        tasks=[task],
        task_manager=TaskManager(include_path=".", include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return {
        "metrics": {name.partition(",")[0]: value for name, value in found["results"][task].items()},
        "documents": [
            {"requests": sample["arguments"], "answers": [answer[0] for answer in sample["resps"]]}
            for sample in samples
        ],
    }


Path(RESULTS).write_text(
    json.dumps(
        {
            "batched": score("choices", batch_size=8),
            "side by side": score("choices", num_concurrent=4),
            "rolling": score("passages", max_length=64),
        },
        default=str,
    ),
    encoding="utf-8",
)
