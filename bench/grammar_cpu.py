"""What grammars cost: 64 rows of the torch backend, none or half of them under a JSON schema, in one run.

    python -m bench.grammar_cpu MODEL_DIR [--rows 64] [--tokens 64] [--repeats 5] [--threads 2] [--json FILE]

The two alternate, and the ratio of each pair counts, so that a noisy neighbour hits both; their median is the answer. The
rows sample alike (temperature 0.8, top_p 0.95, or greedy); no row ends before its last token, and prompts are computed outside of
the measured time.
"""

from __future__ import annotations

from worker.backends.torch_threads import quiet_threads

quiet_threads()  # before torch is imported

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from llguidance import get_version  # noqa: E402
from octavo.cli.load_report import machine  # noqa: E402

from service.grammar import Grammar  # noqa: E402
from worker.backend import BackendInfo  # noqa: E402
from worker.backends.torch_backend import TorchBackend, TorchSettings  # noqa: E402
from worker.grammar.load import load_runner  # noqa: E402
from worker.grammar.runner import GrammarRunner  # noqa: E402
from worker.offline import OfflineEngine, OfflineRequest  # noqa: E402
from worker.step import SamplingParams  # noqa: E402

PROMPT_TOKENS = 8
_ASSETS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
_ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0},
        "name": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "price": {"type": "number"},
        "parent": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$"}]},
    },
    "required": ["id", "name", "price"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps({"type": "array", "items": _ITEM, "minItems": 100}))
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95),
}


def make_requests(
    rows: int, constrained: int, tokens: int, sampling: SamplingParams, vocab: int
) -> list[OfflineRequest]:
    """`constrained` of the rows under the schema, every other one from the start."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocab, (rows, PROMPT_TOKENS), generator=generator).tolist()
    every = rows // constrained if constrained else rows + 1
    return [
        OfflineRequest(prompt, tokens, sampling, seed=row, grammar=SCHEMA if row % every == 0 else None)
        for row, prompt in enumerate(prompts)
    ]


class _Clock:
    """A backend that notes when each decode step began; everything else is the torch backend's."""

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = backend
        self.first = self.last = 0.0
        self.cpu_first = self.cpu_last = 0.0
        self.steps = 0

    def start(self) -> None:
        self.first, self.steps = 0.0, 0

    def collect(self) -> Any:
        output = self._backend.collect()
        self.last, self.cpu_last = time.perf_counter(), time.process_time()
        if not self.first:  # the end of the prompts' step
            self.first, self.cpu_first = self.last, self.cpu_last
        self.steps += 1
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def step_ms(engine: OfflineEngine, clock: _Clock, requests: list[OfflineRequest]) -> tuple[float, float]:
    """Milliseconds of a decode step, on average, and of processor time in it: what a neighbour's load does not change."""
    clock.start()
    results = engine.generate(requests)
    assert all(len(result.token_ids) == requests[0].max_tokens for result in results), "a row ended early"
    steps = clock.steps - 1
    return (clock.last - clock.first) / steps * 1e3, (clock.cpu_last - clock.cpu_first) / steps * 1e3


def main(arguments: list[str]) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    folder: Path = options.model_dir
    settings = TorchSettings(
        max_model_len=256, max_rows=options.rows, num_blocks=options.rows * 16, threads=options.threads
    )
    clock = _Clock(TorchBackend(folder, settings))

    def runner(info: BackendInfo) -> GrammarRunner:
        made = load_runner(
            {name: (folder / name).read_bytes() for name in _ASSETS if (folder / name).exists()}, info.vocab_size
        )
        if made is None:
            raise SystemExit("this model can't decode under grammars")
        return made

    engine = OfflineEngine(clock, grammars=runner)
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench.grammar_cpu MODEL_DIR", *(a for a in arguments if a != str(folder))]),
        "machine": machine(),
        "numerics": engine.info.numerics,
        "llguidance": get_version(),
        "rows": options.rows,
        "constrained": options.rows // 2,
    }
    for name, sampling in SAMPLING.items():
        pairs = []
        for repeat in range(options.repeats + 1):  # the first warms up
            pair = [
                step_ms(
                    engine, clock, make_requests(options.rows, half, options.tokens, sampling, engine.info.vocab_size)
                )
                for half in (0, options.rows // 2)
            ]
            (free, free_cpu), (masked, masked_cpu) = pair
            print(
                f"{name} {repeat}: {free:.1f} ms a step ({free_cpu:.1f} ms of CPU), with grammars {masked:.1f} ms ({masked_cpu:.1f})",
                flush=True,
            )
            pairs.append(pair)
        ratios = [free[0] / masked[0] for free, masked in pairs[1:]]
        cpu_ratios = [free[1] / masked[1] for free, masked in pairs[1:]]
        ratio, cpu_ratio = statistics.median(ratios), statistics.median(cpu_ratios)
        report[name] = {
            "throughput_ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "ratios": ratios,
            "cpu_ratios": cpu_ratios,
            "step_ms_and_cpu_ms": pairs[1:],
        }
        print(
            f"{name}: throughput with half of the rows under a grammar is {ratio:.3f} of that without, in CPU time {cpu_ratio:.3f}",
            flush=True,
        )
    engine.close()
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
