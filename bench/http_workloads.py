"""W6 through the HTTP gateway, by the client that measures other servers too (bench/peer_client.py), on a cluster of its own:

    python -m bench.http_workloads MODEL_DIR [--backend cuda] [--routers 1] [--worker NAME=VALUE …] [--repeats 3] [--out FILE]

One stream of 128 + 512 tokens, three times; 512 requests of 128 + 128, 32 a second; and the same, 256 at once, `--repeats` times. One
line of JSON each, and all of them in the file. MODEL_DIR may be `mock`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from octavo.client import Client

from bench import peer_client
from bench.running import cluster, head, only_model

OUTPUT, ALONE = 128, 512


def main(arguments: list[str]) -> int:
    """Measure, print, and write JSON if asked to; the exit code is 1 where a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--worker", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--processes", type=int, default=4, help="of the load generator")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = head("bench.http_workloads", arguments) | {"model": Path(options.model_dir).name, "runs": []}
    worker = dict(item.split("=", 1) for item in options.worker)
    with cluster(options.model_dir, options.backend, worker, routers=options.routers) as running:
        with Client(running.routers) as client:
            vocabulary = only_model(client).vocab_size
        urls = [f"http://{gateway}" for gateway in running.gateways]

        def measure(label: str, n: int, length: int, rate: float, concurrency: int, seed: int = 0) -> dict[str, Any]:
            processes = min(options.processes, concurrency)
            shape = (n, 128, length, rate, concurrency, processes, vocabulary, seed)
            results = peer_client.measure(urls, "m", *shape)
            line = {"label": label, **peer_client.summary(results, length)}
            print(json.dumps(line), flush=True)
            return line

        measure("warm-up", 512, OUTPUT, math.inf, 256)
        report["runs"].append(measure("one stream", 3, ALONE, math.inf, 1))
        report["runs"].append(measure("32 a second", 512, OUTPUT, 32.0, 256))
        report["runs"] += [
            measure("256 at once", 512, OUTPUT, math.inf, 256, seed) for seed in range(1, options.repeats + 1)
        ]
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(run["failed"] for run in report["runs"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
