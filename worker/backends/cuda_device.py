"""One GPU of this process: its stream, which threads it is current for, and what its errors mean."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cuda.core import Device, Stream

from kernels.launcher import LaunchError
from worker.backend import BackendError, FatalBackendError


class CudaDevice:
    """Owns the stream that all work is enqueued on."""

    def __init__(self, number: int) -> None:
        """Raises BackendError where there is no such device."""
        if not torch.cuda.is_available():
            raise BackendError(
                "backend cuda: torch sees no CUDA device here (no GPU, no driver, or a CPU build of torch)"
            )
        count = torch.cuda.device_count()
        if number >= count:
            raise BackendError(f"device: {number} was asked for, {count} CUDA devices are there")
        self.number = number
        self.torch = torch.device("cuda", number)
        torch.cuda.set_device(number)
        Device(number).set_current()
        self.stream = torch.cuda.Stream(number)  # type: ignore[no-untyped-call]
        self.core_stream = Stream.from_handle(self.stream.cuda_stream)
        self._launching = self._collecting = 0  # threads

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Work of this thread goes to the stream, also behind this block: entering it anew for each step cost 0.1 ms."""
        thread = threading.get_ident()
        with self.fatal_errors():
            # Context and stream are current for each thread by itself, and the one that launches may not be the one that loaded. Who
            # calls may have made another stream current since: torch's part of a step would not wait for ours.
            if thread != self._launching or torch.cuda.current_stream(self.torch) != self.stream:
                Device(self.number).set_current()
                torch.cuda.set_stream(self.stream)
                self._launching = thread
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """This thread waits for events, and enqueues nothing."""
        thread = threading.get_ident()
        with self.fatal_errors():
            if thread not in (self._launching, self._collecting):
                Device(self.number).set_current()
                self._collecting = thread
            yield

    def leave(self) -> None:
        """Wait for all work; this thread's goes to the default stream again."""
        with self.fatal_errors():
            torch.cuda.synchronize(self.torch)
        torch.cuda.set_stream(torch.cuda.default_stream(self.torch))
        self._launching = self._collecting = 0

    @contextmanager
    def fatal_errors(self) -> Iterator[None]:
        """A CUDA error leaves the context unusable: the process must end. Running out of memory does not."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (torch.AcceleratorError, LaunchError) as error:
            raise FatalBackendError(f"GPU {self.number}: {error}") from error
        except RuntimeError as error:
            if "CUDA error" not in str(error) and "CUBLAS" not in str(error):
                raise
            raise FatalBackendError(f"GPU {self.number}: {error}") from error
