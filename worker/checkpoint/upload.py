"""From Safetensors to the GPU at the speed of the disk: readers fill pinned buffers, each copied on a stream of its own.

One reader waits for the disk or copies out of the page cache at a few GB/s; several together keep a fast disk, or the bus, busy.
They need no interpreter lock while they read or wait, so the rest of a start goes on beside them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from worker.backend import Progress
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.safetensors import TensorEntry

_READERS = 8
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Chunk:
    file: Path
    tensor: str
    offset: int
    num_bytes: int
    dtype: torch.dtype  # in the file
    target: torch.Tensor  # flat


class Upload:
    """Copies that run in the background. Use as a context: leaving it early stops them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._chunks: deque[_Chunk] = deque()
        self._total = 0
        self._lock = threading.Lock()
        self._done = 0
        self._stopped = False
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="weights")
        self._readers: list[Future[None]] = []

    def add(self, entry: TensorEntry, dtype: torch.dtype, target: torch.Tensor) -> None:
        """Copy a tensor of `dtype` from its file to `target`, contiguous and of any dtype. Before start()."""
        flat = target.view(-1)
        step = _CHUNK_BYTES // dtype.itemsize
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            offset = entry.offset + first * dtype.itemsize
            self._chunks.append(_Chunk(entry.file, entry.name, offset, part.numel() * dtype.itemsize, dtype, part))
        self._total += entry.num_bytes

    def start(self) -> None:
        """Let the readers begin."""
        # The targets may be memory whose last use is still under way on the stream that allocated them.
        torch.cuda.current_stream(self.device).synchronize()
        self._readers = [self._pool.submit(self._run) for _ in range(min(_READERS, len(self._chunks)))]

    def wait(self, progress: Progress) -> None:
        """Return once everything is on the device. Raises CheckpointError, or what CUDA raised in a reader."""
        pending = set(self._readers)
        while pending:
            ended, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for reader in ended:
                reader.result()
            progress("weights", self._done, self._total)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._pool.shutdown()

    def _run(self) -> None:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with ExitStack() as files, torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(stream):
            staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
            opened: dict[Path, int] = {}
            while not self._stopped:
                try:
                    chunk = self._chunks.popleft()
                except IndexError:
                    return
                if chunk.file not in opened:
                    opened[chunk.file] = files.enter_context(chunk.file.open("rb", buffering=0)).fileno()
                _copy(chunk, opened[chunk.file], staging)
                stream.synchronize()
                with self._lock:
                    self._done += chunk.num_bytes


def _copy(chunk: _Chunk, descriptor: int, staging: torch.Tensor) -> None:
    read = read_fully(descriptor, staging.numpy().data[: chunk.num_bytes], chunk.offset)
    if read < chunk.num_bytes:
        raise CheckpointError(
            f"{chunk.file}: tensor {chunk.tensor} ends at byte {chunk.offset + read}: was it truncated?"
        )
    source = staging[: chunk.num_bytes].view(chunk.dtype)
    if chunk.dtype != chunk.target.dtype:
        source = source.to(chunk.target.device, non_blocking=True)  # converted there
    chunk.target.copy_(source, non_blocking=True)


def read_fully(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill the buffer from the file; fewer bytes only at its end. Raises CheckpointError where the disk fails."""
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        raise CheckpointError(f"reading weights failed: {error.strerror or error}") from error
    return done
