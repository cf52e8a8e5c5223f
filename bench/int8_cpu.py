"""`--quantization int8` against bfloat16, transformers and llama.cpp on the same cores, in one run.

    python -m bench.int8_cpu MODEL_DIR [--llama PYTHON FILE.gguf]… [--streams 1 16] [--repeats 5] [--quality GOLDENS] [--json FILE]

Greedy decoding of 64 tokens after prompts of 64 random tokens, in one process without services; transformers and llama.cpp are
processes of their own. All alternate, so that a noisy neighbour hits each: the best of the repeats counts, and the median is told.
PYTHON is one of an environment with llama-cpp-python (bench/llama_cpp_cpu.py).

--quality also asks how far int8 is from float32, and bfloat16 beside it, on the goldens' prompts and outputs.
"""

from __future__ import annotations

from worker.backends.torch_threads import quiet_threads

quiet_threads()  # before torch is imported

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from octavo.cli.load_report import machine  # noqa: E402

from bench.engine_cpu import random_prompts, time_engine  # noqa: E402
from worker.backends.torch_backend import TorchBackend, TorchSettings  # noqa: E402
from worker.offline import OfflineEngine, OfflineRequest  # noqa: E402
from worker.step import SamplingParams  # noqa: E402

Timer = Callable[[int], float]  # streams: output tokens per second
LLAMA = Path(__file__).with_name("llama_cpp_cpu.py")


def make_engine(model_dir: Path, dtype: str, quantization: str, threads: int, length: int = 256) -> OfflineEngine:
    """An engine with room for 16 streams."""
    settings = TorchSettings(
        dtype=dtype, quantization=quantization, max_model_len=length, num_blocks=512, threads=threads
    )
    return OfflineEngine(TorchBackend(model_dir, settings))


def peer(stack: ExitStack, command: Sequence[str], greeting: bool) -> tuple[str, Timer]:
    """A process that reads a number of streams and writes tokens/s, and what it says first if it does."""
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    )
    source, sink = process.stdout, process.stdin
    assert source is not None
    assert sink is not None
    stack.callback(sink.close)

    def ask(streams: int) -> float:
        sink.write(f"{streams}\n")
        sink.flush()
        return float(source.readline())

    return source.readline().strip() if greeting else "", ask


def speed(timers: dict[str, Timer], streams: int, repeats: int) -> dict[str, Any]:
    """Tokens/s of each, alternating."""
    runs: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats + 1):  # the first of each warms up
        for name, timer in timers.items():
            runs[name].append(timer(streams))
    best = {name: max(values[1:]) for name, values in runs.items()}
    median = {name: statistics.median(values[1:]) for name, values in runs.items()}
    ratios = {name: best["int8"] / value for name, value in best.items() if name != "int8"}
    told = ", ".join(f"{name} {best[name]:.1f} ({median[name]:.1f})" for name in timers)
    print(f"{streams:3} streams, tokens/s, best (median): {told}", flush=True)
    print("    int8 over " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    return {"streams": streams, "best": best, "median": median, "int8_over": ratios, "all": runs}


def quality(engines: dict[str, OfflineEngine], goldens: Path) -> dict[str, Any]:
    """How each engine describes the goldens' text, and how far its own greedy continuations go along with theirs.

    Differences are to the first engine.
    """
    cases = json.loads(goldens.read_text(encoding="utf-8"))["cases"]
    forced = [
        OfflineRequest([*case["prompt_token_ids"], *case["output_token_ids"]], 1, SamplingParams(temperature=0.0, prompt_logprobs=0))
        for case in cases
    ]  # fmt: skip
    free = [OfflineRequest(case["prompt_token_ids"], len(case["output_token_ids"])) for case in cases]
    first: list[float] = []
    report = {}
    for name, engine in engines.items():
        described = [result.logprobs for result in engine.generate(forced, max_rows=16)]
        logprobs = [entry.logprob for entries in described for entry in entries]
        first = first or logprobs
        outputs = [
            entry
            for case, entries in zip(cases, described, strict=True)
            for entry in entries[len(case["prompt_token_ids"]) - 1 :]
        ]
        differing = 0
        for case, result in zip(cases, engine.generate(free, max_rows=16), strict=True):
            pairs = zip(case["output_token_ids"], result.token_ids, strict=True)
            differing += sum(want != got for want, got in pairs)
        report[name] = {
            "perplexity": math.exp(-statistics.fmean(logprobs)),
            "mean_logprob_difference": statistics.fmean(b - a for a, b in zip(first, logprobs, strict=True)),
            "mean_absolute_logprob_difference": statistics.fmean(
                abs(b - a) for a, b in zip(first, logprobs, strict=True)
            ),
            "greedy_choices_differing": sum(entry.rank != 1 for entry in outputs),
            "greedy_tokens_differing_in_free_runs": differing,
            "output_tokens": len(outputs),
            "described_tokens": len(logprobs),
        }
        print(f"{name}: {json.dumps(report[name])}", flush=True)
    return report


def main(arguments: list[str]) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--llama", nargs=2, action="append", default=[], metavar=("PYTHON", "GGUF"))
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--quality", type=Path, metavar="GOLDENS")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"command": " ".join(["python -m bench.int8_cpu", *arguments]), "machine": machine()}
    if options.quality is not None:
        kinds = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")}
        engines = {name: make_engine(options.model_dir, *kind, options.threads, 2048) for name, kind in kinds.items()}
        report["quality"] = quality(engines, options.quality)
    with ExitStack() as stack:
        timers: dict[str, Timer] = {}
        if options.streams:
            for name, quantization in (("bfloat16", "none"), ("int8", "int8")):
                engine = make_engine(options.model_dir, "bfloat16", quantization, options.threads)
                report.setdefault("numerics", {})[name] = engine.info.numerics
                timers[name] = lambda n, e=engine: time_engine(e, random_prompts(n, e.info.vocab_size))  # type: ignore[misc]
            if not options.no_transformers:
                command = [sys.executable, "-m", "bench.transformers_cpu", str(options.model_dir)]
                _, timers["transformers"] = peer(stack, command, greeting=False)
            for python, file in options.llama:
                version, timer = peer(stack, [python, str(LLAMA), file, "--threads", str(options.threads)], True)
                timers[f"llama.cpp {Path(file).stem}"] = timer
                report["llama_cpp"] = version
        report["speed"] = []
        for streams in options.streams:
            report["speed"].append(speed(timers, streams, options.repeats))
            save(options.json, report)
    save(options.json, report)


def save(path: Path | None, report: dict[str, Any]) -> None:
    """Write what is known so far: a run that is stopped leaves the rows that it ended."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
