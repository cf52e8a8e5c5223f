"""The offline engine against `transformers` generate on the same cores, in one run.

    python -m bench.engine_cpu MODEL_DIR [--dtype bfloat16] [--threads 2] [--repeats 3] [--json FILE]

Greedy decoding of 64 tokens after prompts of 64 random tokens, for one stream and for 16 (transformers: one batch, left-padded if it
had to be). The two alternate and the best of the repeats counts, so a noisy neighbour hits both.
"""

from __future__ import annotations

from worker.backends.torch_threads import quiet_threads

quiet_threads()  # before torch is imported

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402

from worker.backends.torch_backend import TorchBackend, TorchSettings  # noqa: E402
from worker.offline import OfflineEngine, OfflineRequest  # noqa: E402

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 64


def random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of random token ids, the same at each run."""
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(0, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()
    return ids


def time_engine(engine: OfflineEngine, prompts: list[list[int]]) -> float:
    """Output tokens per second of the engine, prefill included."""
    start = time.perf_counter()
    results = engine.generate([OfflineRequest(prompt, OUTPUT_TOKENS) for prompt in prompts])
    elapsed = time.perf_counter() - start
    return sum(len(result.token_ids) for result in results) / elapsed


def time_transformers(model: Any, prompts: list[list[int]]) -> float:
    """Output tokens per second of `generate`, prefill included."""
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        output: torch.Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_TOKENS,
            min_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    elapsed = time.perf_counter() - start
    return (output.shape[1] - PROMPT_TOKENS) * len(prompts) / elapsed


def main(arguments: list[str]) -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    settings = TorchSettings(dtype=options.dtype, max_model_len=256, num_blocks=512, threads=options.threads)
    engine = OfflineEngine(TorchBackend(options.model_dir, settings))
    dtype = getattr(torch, options.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=dtype)  # in eval mode
    rows = []
    for streams in options.streams:
        prompts = random_prompts(streams, engine.info.vocab_size)
        ours, theirs = [], []
        for _ in range(options.repeats + 1):  # the first of each warms up
            ours.append(time_engine(engine, prompts))
            theirs.append(time_transformers(model, prompts))
        best_ours, best_theirs = max(ours[1:]), max(theirs[1:])
        rows.append(
            {"streams": streams, "engine": best_ours, "transformers": best_theirs, "ratio": best_ours / best_theirs}
        )
        ratio = best_ours / best_theirs
        print(
            f"{streams:3} streams, tokens/s: engine {best_ours:.1f}, transformers {best_theirs:.1f}, ratio {ratio:.2f}",
            flush=True,
        )
    if options.json is not None:
        report = {
            "command": " ".join(["python -m bench.engine_cpu", *arguments]),
            "numerics": engine.info.numerics,
            "transformers": transformers.__version__,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "results": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
