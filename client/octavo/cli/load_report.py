"""From samples to figures. Quantiles are exact: every sample is kept.

TTFT and end-to-end count from when a request was due, so a generator or server that falls behind shows in them. ITL is the gap
between two messages of a stream that carry tokens; TPOT is a stream's time per token after its first message.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octavo.cli.load_run import LoadResult
from octavo.cli.load_spec import LoadSpec
from rich.table import Table

QUANTILES = (0.5, 0.9, 0.99)
_LATENCIES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "tpot_ms": "TPOT", "e2e_ms": "end to end", "lag_ms": "sent late"}


def summarise(result: LoadResult) -> dict[str, Any]:
    """Figures of a run: counts, rates over the time from the first request to the last end, latencies in milliseconds."""
    samples = result.samples
    outcomes = Counter(sample["outcome"] for sample in samples)
    failed = [sample for sample in samples if sample["outcome"] == "failed"]
    served = [sample for sample in samples if sample["outcome"] != "failed"]
    begin = min((sample["sent"] for sample in samples), default=0.0)
    duration = max((sample["end"] for sample in samples), default=0.0) - begin
    tokens = sum(sample["tokens"] for sample in samples)
    latencies = _latencies(served) | {"lag_ms": [1e3 * (sample["sent"] - sample["due"]) for sample in samples]}
    return {
        "requests": len(samples),
        "finished": outcomes["finished"],
        "abandoned": outcomes["abandoned"],
        "failed": outcomes["failed"],
        "errors": dict(Counter(sample["reason"].partition(":")[0] for sample in failed)),
        "first_error": failed[0]["reason"] if failed else None,
        "duration_s": duration,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / duration if duration > 0 else 0.0,
        "requests_per_s": len(served) / duration if duration > 0 else 0.0,
        "token_messages": sum(len(sample["gaps_us"]) + (sample["first"] is not None) for sample in samples),
        "generator_processes": result.processes,
        "generator_cpu_share": result.cpu_seconds / (duration * result.processes) if duration > 0 else 0.0,
        **{name: describe(values) for name, values in latencies.items()},
    }


def _latencies(served: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    begun = [sample for sample in served if sample["first"] is not None]
    ended = [sample for sample in served if sample["outcome"] == "finished"]
    return {
        "ttft_ms": [1e3 * (sample["first"] - sample["due"]) for sample in begun],
        "itl_ms": [gap / 1e3 for sample in served for gap in sample["gaps_us"]],
        "tpot_ms": [
            1e3 * (sample["last"] - sample["first"]) / (sample["tokens"] - 1)
            for sample in begun
            if sample["tokens"] > 1
        ],
        "e2e_ms": [1e3 * (sample["end"] - sample["due"]) for sample in ended],
    }


def describe(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, quantiles and maximum; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    quantiles = {f"p{round(100 * share)}": quantile(ordered, share) for share in QUANTILES}
    return {"count": len(ordered), "mean": sum(ordered) / len(ordered), **quantiles, "max": ordered[-1]}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, interpolated linearly between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(summary: dict[str, Any]) -> Table:
    """The figures for people."""
    title = (
        f"{summary['finished']} finished, {summary['abandoned']} abandoned, {summary['failed']} failed in "
        f"{summary['duration_s']:.2f} s · {summary['output_tokens_per_s']:,.1f} tokens/s · {summary['requests_per_s']:.2f} requests/s"
    )
    result = Table("ms", "mean", "p50", "p90", "p99", "max", "samples", title=title, title_justify="left")
    for name, label in _LATENCIES.items():
        figures = summary[name]
        if figures is None:
            continue
        cells = (f"{figures[column]:,.2f}" for column in ("mean", "p50", "p90", "p99", "max"))
        result.add_row(label, *cells, f"{figures['count']:,}")
    return result


def document(spec: LoadSpec, summary: dict[str, Any], samples: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What --json writes: enough to run it again and to compare."""
    # `python -m bench.load` has no word "bench" of its own.
    arguments = sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench", *sys.argv[1:]]
    written = {
        "command": shlex.join(["octavo", *arguments]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "load": spec.public(),
        "results": summary,
    }
    return written if samples is None else written | {"samples": samples}


def machine() -> dict[str, Any]:
    """The machine that generates the load."""
    lines = _lines(Path("/proc/cpuinfo"))
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    gpus = [
        line.partition(":")[2].strip()
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in _lines(path)
        if line.startswith("Model:")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that the client runs on."""
    found = {"python": platform.python_version()}
    for name in ("octavo", "grpcio", "protobuf", "uvloop"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
