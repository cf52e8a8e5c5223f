"""How exact the cuda backend is on whole models, as JSON: against transformers, against itself under other schedules, over time.

    python -m bench.gpu_exactness MODEL_DIR|NAME [--out FILE] [--tokens 1500] [--seconds 120]

NAME is one of bench/gpu_models.py (random weights, fixed seed), written below --models.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.gpu_models import SHAPES, write_model
from bench.gpu_offline import OfflineEngine, Request
from worker.backend import Backend, BackendInfo
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings
from worker.step import NewRow, SamplingParams, Step, StepOutput

BATCH, OUTPUTS, ALONE, RESUMED_AT = 256, 64, 48, 20
_TOP_TWO = SamplingParams(temperature=0.0, logprobs=2)
_NONE = np.zeros(0, np.int32)


@contextmanager
def serving(directory: Path) -> Iterator[tuple[OfflineEngine, BackendInfo]]:
    """The backend with a cache for the batch, closed at the end."""
    backend = CudaBackend(directory, CudaSettings(max_rows=BATCH, max_model_len=4096, num_blocks=8192))
    info = backend.load(lambda what, done, total: None)
    backend.warm_up()
    try:
        yield OfflineEngine(backend, info), info
    finally:
        backend.close()
        del backend
        gc.collect()
        torch.cuda.empty_cache()


def teacher_forced(directory: Path, num_tokens: int) -> dict[str, Any]:
    """Log-probabilities of a random text: distance from transformers in float32, of ours and of transformers in bfloat16."""
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    text = random.Random(5).choices(range(vocab_size), k=num_tokens)
    exact, rounded = (_transformers_logprobs(directory, text, dtype) for dtype in (torch.float32, torch.bfloat16))
    result: dict[str, Any] = {"tokens": num_tokens, "transformers_error": _distance(rounded, exact)}
    for chunk in (None, 61):
        with serving(directory) as (engine, _):
            run = engine.run([Request(text, 1, SamplingParams(temperature=0.0, prompt_logprobs=1))], chunk=chunk)
        ours = np.full(num_tokens, np.nan)
        for _, columns in run.logprobs:
            starts = np.cumsum(columns.num_entries) - columns.num_entries
            inside = columns.position < num_tokens
            ours[columns.position[inside]] = columns.logprobs[starts[inside]]
        name = "whole" if chunk is None else f"chunks_of_{chunk}"
        result[f"error_{name}"] = _distance(ours[1:], exact)
        result[f"ratio_{name}"] = result[f"error_{name}"] / result["transformers_error"]
    return result


def _distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative error: |found - exact| / |exact|, both about their means, which a wrong constant would not move."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact - exact.mean()))


def _transformers_logprobs(directory: Path, text: list[int], dtype: torch.dtype) -> np.ndarray:
    """float64 [tokens - 1]: of each token but the first."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.cuda()
    with torch.inference_mode():
        logits = model(torch.tensor([text], device="cuda")).logits[0, :-1].double().log_softmax(-1)
        wanted: np.ndarray = logits.gather(1, torch.tensor(text[1:], device="cuda")[:, None])[:, 0].cpu().numpy()
    del model, logits
    gc.collect()
    torch.cuda.empty_cache()
    return wanted


def schedules(directory: Path) -> dict[str, Any]:
    """Greedy continuations in a batch of 256 against other schedules: how many part, at what gap between the two best tokens."""
    with serving(directory) as (engine, info):
        texts = _texts(BATCH, info.vocab_size, seed=0)
        together, gaps = _batch(engine, texts)
        again, _ = _batch(engine, texts)
        report = {"two_equal_runs": _partings(together, again, gaps)}
        alone = [_run(engine, [text])[0] for text in texts[:ALONE]]
        report["alone"] = _partings(together[:ALONE], alone, gaps)
        report["chunks_of_61"] = _partings(together, _run(engine, texts, chunk=61), gaps)
        resumed = _run(engine, [t + o[:RESUMED_AT] for t, o in zip(texts, together, strict=True)], OUTPUTS - RESUMED_AT)
        preempted = [o[:RESUMED_AT] + rest for o, rest in zip(together, resumed, strict=True)]
        report["after_preemption"] = _partings(together, preempted, gaps)
        hits = [_rows_sharing_a_prefix(engine.backend, text) for text in texts[:ALONE]]
        whole, shared = [hit[0] for hit in hits], [hit[1] for hit in hits]
        report["prefix_hit_against_whole_prompt"] = _partings(whole, shared, [hit[2] for hit in hits])
    return report


def _texts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [generator.choices(range(vocab_size), k=generator.randint(33, 256)) for _ in range(count)]


def _run(
    engine: OfflineEngine, texts: list[list[int]], outputs: int = OUTPUTS, chunk: int | None = None
) -> list[list[int]]:
    requests = [Request(text, outputs) for text in texts]
    engine.run(requests, chunk=chunk)
    return [request.outputs for request in requests]


def _batch(engine: OfflineEngine, texts: list[list[int]]) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Outputs, and for each the gap at each output's index."""
    requests = [Request(text, OUTPUTS, _TOP_TWO) for text in texts]
    numbers = {id(request): i for i, request in enumerate(requests)}
    gaps: list[dict[int, float]] = [{} for _ in requests]
    for rows, columns in engine.run(requests).logprobs:
        starts = np.cumsum(columns.num_entries) - columns.num_entries
        for owner, position, start in zip(
            columns.owner.tolist(), columns.position.tolist(), starts.tolist(), strict=True
        ):
            number = numbers[id(rows[owner])]
            gap = float(columns.logprobs[start + 1] - columns.logprobs[start + 2])
            gaps[number][position - len(texts[number])] = gap
    return [request.outputs for request in requests], gaps


def _partings(left: list[list[int]], right: list[list[int]], gaps: list[dict[int, float]]) -> dict[str, Any]:
    found = []
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            found.append(gaps[number].get(at, float("nan")))
    summary = {"median_gap": float(np.median(found)), "largest_gap": max(found)} if found else {}
    return {"continuations": len(left), "parted": len(found), **summary}


def _rows_sharing_a_prefix(backend: Backend, text: list[int]) -> tuple[list[int], list[int], dict[int, float]]:
    """Continuations of a row that computes its whole prompt, and of one that starts with 32 of its tokens in the other's blocks.

    The gaps are those of the first.
    """
    needed = -(-(len(text) + OUTPUTS) // 16)
    first, second = list(range(needed)), [0, 1, *range(needed, 2 * needed - 2)]
    outputs: list[list[int]] = []
    gaps: dict[int, float] = {}
    for row, computed, blocks in ((0, 0, first), (1, 32, second)):
        new = NewRow(row, np.array(text, np.int32), len(text), computed, np.array(blocks, np.int32), 0, _TOP_TWO)
        outputs.append([])
        for step_id in range(OUTPUTS):
            count = 1 if step_id else len(text) - computed
            here, one = np.array([row], np.int32), np.ones(1, np.int32)
            started = (new,) if step_id == 0 else ()
            step = Step(step_id, _NONE, started, _NONE, _NONE, _NONE, _NONE, _NONE, here, one * count, one)
            output = _finished(backend, step)
            assert output.logprobs is not None
            outputs[-1] += output.token_ids.tolist()
            if row == 0:
                gaps[step_id] = float(output.logprobs.logprobs[1] - output.logprobs.logprobs[2])
    _finished(backend, Step(0, np.array([0, 1], np.int32), (), *([_NONE] * 8)))
    return outputs[0], outputs[1], gaps


def _finished(backend: Backend, step: Step) -> StepOutput:
    backend.begin(step)
    backend.forward(step)
    backend.sample(step)
    return backend.collect()


def random_schedules(directory: Path, seconds: float) -> dict[str, Any]:
    """Random loads with a fixed one between them, whose tokens must never change; device memory before and after."""
    generator = random.Random(11)
    with serving(directory) as (engine, info):
        probe = _texts(20, info.vocab_size, seed=12)
        first = _run(engine, probe, 30, chunk=50)
        _run(engine, _texts(BATCH, info.vocab_size, seed=13), 30)
        torch.cuda.synchronize()
        memory = torch.cuda.memory_allocated()
        rounds = wrong = tokens = failed = 0
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            texts = _texts(generator.randint(1, BATCH), info.vocab_size, seed=rounds)
            sampling = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
            loads = [Request(text, generator.randint(1, 100), sampling, seed=i) for i, text in enumerate(texts)]
            tokens += engine.run(loads, chunk=generator.choice([16, 100, 700, None])).output_tokens
            failed += sum(load.status != 0 or len(load.outputs) != load.num_outputs for load in loads)
            wrong += sum(a != b for a, b in zip(_run(engine, probe, 30, chunk=50), first, strict=True))
            rounds += 1
        torch.cuda.synchronize()
        grown = torch.cuda.memory_allocated() - memory
    return {
        "seconds": seconds, "rounds": rounds, "output_tokens": tokens, "requests_failed": failed,
        "probe_continuations_changed": wrong, "device_bytes_grown": grown,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    report: dict[str, Any] = {
        "model": arguments.model,
        "device": torch.cuda.get_device_properties(0).name,
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        },
        "command": f"python -m bench.gpu_exactness {arguments.model} --tokens {arguments.tokens} --seconds {arguments.seconds}",
    }  # fmt: skip
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "teacher_forced": lambda: teacher_forced(directory, arguments.tokens),
        "schedules": lambda: schedules(directory),
        "random_schedules": lambda: random_schedules(directory, arguments.seconds),
    }
    for name, part in parts.items():
        report[name] = part()
        print(name, json.dumps(report[name]), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
