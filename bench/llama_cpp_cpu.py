"""llama.cpp as a process: reads a number of streams a line, writes tokens/s a line. Sleeps in between.

    PYTHON bench/llama_cpp_cpu.py FILE.gguf [--threads 2] [--requantize q8_0 OUT.gguf]

PYTHON is one of an environment of its own with llama-cpp-python; nothing of Octavo is imported. 64 random tokens in, 64 out, greedy,
all streams in one batch; the same work as bench.engine_cpu.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

PROMPT_TOKENS = OUTPUT_TOKENS = 64
TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


class Runner:
    """One model with room for so many streams."""

    def __init__(self, file: Path, threads: int, streams: int) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = (
            False  # with AMX version 0.3.36 dies at its first product on this project's machines
        )
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = streams * 256
        params.n_batch = params.n_ubatch = streams * PROMPT_TOKENS
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(streams * PROMPT_TOKENS, 0, 1)

    def tokens_per_second(self, streams: int) -> float:
        """Output tokens per second, prefill included."""
        source = random.Random(0)
        prompts = [[source.randrange(self._vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(streams)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        begin = time.perf_counter()
        entries = [
            (token, position, stream, position == PROMPT_TOKENS - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + OUTPUT_TOKENS):
            tokens = self._decode(entries)
            entries = [(token, position, stream, True) for stream, token in enumerate(tokens)]
        return streams * OUTPUT_TOKENS / (time.perf_counter() - begin)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, stream, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = stream, wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        chosen = []
        for i in (i for i, entry in enumerate(entries) if entry[3]):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, i), shape=(self._vocab_size,))
            chosen.append(int(logits.argmax()))
        return chosen


def requantize(source: Path, kind: str, target: Path) -> None:
    """Write a GGUF file of another quantization, every matrix of it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = TYPES[kind], True, True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status:
        raise RuntimeError(f"llama_model_quantize: {status}")


def main(arguments: list[str]) -> None:
    """Serve lines until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16, help="streams at most")
    parser.add_argument("--requantize", nargs=2, metavar=("TYPE", "FILE"), help="write FILE and end")
    options = parser.parse_args(arguments)
    if options.requantize:
        requantize(options.file, options.requantize[0], Path(options.requantize[1]))
        return
    runner = Runner(options.file, options.threads, options.streams)
    print(f"llama-cpp-python {llama_cpp.__version__}", flush=True)
    for line in sys.stdin:
        print(runner.tokens_per_second(int(line)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
