"""From exec to the first token on one GPU, and how fast the weights come in, as JSON.

    python -m bench.gpu_start NAME|MODEL_DIR [--models DIR] [--out FILE]

Each start is a new process that loads the model with the cuda backend and generates one token of a prompt of 128. Cubins cached or
compiled anew; the checkpoint's pages in the page cache or dropped from it. For comparison: the checkpoint read by eight threads
that do nothing else, from the disk and from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK_BYTES = 16 << 20


def drop_pages(directory: Path) -> None:
    """Forget what the page cache holds of the checkpoint."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_speed(directory: Path) -> float:
    """GB/s of eight threads that read the whole checkpoint and drop it."""
    chunks = [
        (path, offset)
        for path in directory.glob("*.safetensors")
        for offset in range(0, path.stat().st_size, CHUNK_BYTES)
    ]

    def read(chunk: tuple[Path, int]) -> int:
        with chunk[0].open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [bytearray(CHUNK_BYTES)], chunk[1])

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(read, chunks))
    return total / 1e9 / (time.perf_counter() - began)


def child(directory: Path, cubins: Path, started: float) -> None:
    """One start; prints seconds since `started` (time.time()) at each stage."""
    from worker.checkpoint.prefetch import prefetch

    stages = {"python": time.time() - started}
    prefetch(directory)  # as worker/__main__.py does
    from bench.gpu_offline import OfflineEngine, Request
    from worker.backends.cuda_backend import CudaBackend
    from worker.backends.cuda_settings import CudaSettings

    stages["imports"] = time.time() - started
    backend = CudaBackend(directory, CudaSettings(max_model_len=8192, memory_fraction=0.8, cubin_cache=cubins))
    info = backend.load(lambda what, done, total: None)
    stages["loaded"] = time.time() - started
    backend.warm_up()
    stages["warm"] = time.time() - started
    OfflineEngine(backend, info).run([Request([7] * 128, 1)])
    stages["first_token"] = time.time() - started
    print(json.dumps(stages))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("CUBINS", "STARTED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.model), Path(arguments.child[0]), float(arguments.child[1]))
        return
    import torch

    from bench.gpu_models import SHAPES, write_model

    directory = write_model(arguments.models, arguments.model) if arguments.model in SHAPES else Path(arguments.model)
    os.sync()
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    report: dict[str, Any] = {
        "command": f"python -m bench.gpu_start {arguments.model} --out FILE",
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "checkpoint_GB": size / 1e9,
    }
    drop_pages(directory)
    report["disk_GB_per_s"] = read_speed(directory)
    report["page_cache_GB_per_s"] = read_speed(directory)
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as filled:
        # The first start fills one cubin cache; its figure is not kept, because it also pulls Python and torch from the disk.
        for name, cubins, warm in (
            ("first", filled, True),
            ("cubins cached, pages warm", filled, True),
            ("cubins cached, pages cold", filled, False),
            ("cubins compiled, pages warm", empty, True),
        ):
            if not warm:
                drop_pages(directory)
            command = [sys.executable, "-m", "bench.gpu_start", str(directory), "--child", cubins, str(time.time())]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            report[name] = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({name: report[name]}), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
