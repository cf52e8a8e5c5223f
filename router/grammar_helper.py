"""The process that compiles grammars for a router: `python -m router.grammar_helper`, one job after another.

A grammar is a program from elsewhere. llguidance bounds what it does, and where that fails the limits of this process do: processor
time for each job, memory beyond what it has at the start, no files. Who runs out of memory ends: earlier jobs may have used it up, so
the answer is another helper's. The router ends it where it takes too long, and starts another.

Speaks frames on standard input and output: a length of 4 bytes (little-endian), then so many bytes. A tokenizer is three frames:
"T" and its name, JSON of vocab_size and eos_token_ids, tokenizer.json. A grammar is two: "G" and the tokenizer's name, an
octavo.v1.Grammar. The answer to each is one frame: JSON of `problem`, empty if all is well.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from collections import OrderedDict
from typing import BinaryIO

from llguidance import LLTokenizer
from octavo.v1 import common_pb2

from service.grammar import GrammarError, from_message
from service.guidance import compile_grammar, load_tokenizer

CPU_SECONDS = 2  # for a job; a tokenizer has more
_TOKENIZER_CPU_SECONDS = 30
_STACK_BYTES = 1 << 20  # half of what llguidance's own threads have in a worker, an eighth of Python's there
_MEMORY_BYTES = 1 << 30  # beyond what is mapped at the start
_MAX_FRAME_BYTES = 256 << 20
_TOKENIZERS = 4


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None at the end."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    size = int.from_bytes(header, "little")
    if size > _MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes")
    data = stream.read(size)
    return data if len(data) == size else None


def frame(data: bytes) -> bytes:
    """`data` as a frame."""
    return len(data).to_bytes(4, "little") + data


def main() -> int:
    """Serve until standard input ends. On a small stack: what is nested so deeply that it would overflow a worker's is found here."""
    _bound()
    ended: list[int] = []
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=lambda: ended.append(_serve()))
    thread.start()
    thread.join()
    return ended[0] if ended else 1


def _serve() -> int:
    tokenizers: OrderedDict[bytes, LLTokenizer] = OrderedDict()
    while (head := read_frame(sys.stdin.buffer)) is not None:
        kind, name = head[:1], head[1:]
        parts = [read_frame(sys.stdin.buffer) for _ in range(2 if kind == b"T" else 1)]
        if None in parts:
            return 1
        problem = ""
        try:
            if kind == b"T":
                _allow_cpu(_TOKENIZER_CPU_SECONDS)
                shape = json.loads(parts[0] or b"")
                tokenizers[name] = load_tokenizer(parts[1] or b"", shape["vocab_size"], tuple(shape["eos_token_ids"]))
                while len(tokenizers) > _TOKENIZERS:
                    tokenizers.popitem(last=False)
            else:
                _allow_cpu(CPU_SECONDS)
                _check(parts[0] or b"", tokenizers.get(name))
        except GrammarError as error:
            problem = str(error)
        sys.stdout.buffer.write(frame(json.dumps({"problem": problem}).encode()))
        sys.stdout.buffer.flush()
    return 0


def _check(data: bytes, tokenizer: LLTokenizer | None) -> None:
    """Compile, and make the first mask: what fails there would fail at each request's first token."""
    grammar = from_message(common_pb2.Grammar.FromString(data))
    if grammar is None or tokenizer is None:
        raise GrammarError("no grammar, or of a tokenizer that is not here")
    matcher = compile_grammar(grammar, tokenizer)
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(" ".join(matcher.get_error().split())[:500])
    if not any(mask):
        raise GrammarError("no output satisfies it")


def _allow_cpu(seconds: float) -> None:
    """Of all threads, from now on; SIGPROF then ends the process. RLIMIT_CPU counts in whole seconds."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _bound() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - before any file is out of bounds
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY_BYTES, mapped + _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


if __name__ == "__main__":
    sys.exit(main())
