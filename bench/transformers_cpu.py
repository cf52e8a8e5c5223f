"""transformers' generate as a process: reads a number of streams a line, writes tokens/s a line. Sleeps in between.

64 random tokens in, 64 out, greedy, one batch; the same work as bench.serving asks of a cluster.
"""

from __future__ import annotations

import argparse
import sys

import torch
import transformers

from bench.engine_cpu import random_prompts, time_transformers


def main(arguments: list[str]) -> None:
    """Serve lines until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=dtype)
    for line in sys.stdin:
        prompts = random_prompts(int(line), 30_000)
        print(time_transformers(model, prompts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
