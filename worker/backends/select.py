"""Which backend runs the model, and what this worker says of itself. Imports a backend's heavy libraries only when it is chosen."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from octavo.models import cache as model_cache
from octavo.models.errors import ModelError
from octavo.v1 import scheduler_pb2

from service.settings import SettingsError
from worker.backend import Backend, BackendInfo
from worker.backends.mock import MockBackend, MockSettings
from worker.backends.mock_assets import mock_assets
from worker.checkpoint.digest import (
    DigestError,
    assets_digest,
    model_digest,
    quantized_digest,
    read_assets,
    tokenizer_digest,
)
from worker.session import GRAMMAR, HASH_VERSION, PROTOCOL, Identity
from worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Selection:
    """A backend that is not loaded yet, and the model that it will serve."""

    backend: Backend
    kind: str
    model: str  # name under which requests ask for it
    assets: dict[str, bytes]
    model_digest: bytes
    quantization: str = ""  # as the Hello says it


def select(settings: WorkerSettings) -> Selection:
    """The backend that the settings name. Raises SettingsError in words."""
    if settings.backend == "mock" or settings.model == "mock" or settings.model.startswith("mock:"):
        _refuse_quantization(settings, "mock")
        return _select_mock(settings)
    try:
        model_dir = model_cache.resolve(settings.model)
        assets = read_assets(model_dir)
        digest = model_digest(model_dir, assets, model_cache.cache_dir())
    except (ModelError, DigestError) as error:
        raise SettingsError(f"--model {settings.model}: {error}") from None
    kind = _device_kind(settings)
    if kind == "cuda":
        _refuse_quantization(settings, "cuda")
    if settings.quantization != "none":
        digest = quantized_digest(digest, settings.quantization)
    backend = _cuda_backend(settings, model_dir) if kind == "cuda" else _torch_backend(settings, model_dir)
    name = settings.served_name or (model_dir.name if Path(settings.model).is_dir() else settings.model)
    quantization = "" if settings.quantization == "none" else settings.quantization
    return Selection(backend, kind, name, assets, digest, quantization)


def identity_of(
    selection: Selection, info: BackendInfo, incarnation: int, name: str, *, grammars: bool = False
) -> Identity:
    """The worker's Hello and assets, once the backend is loaded. The shell adds its own address."""
    numerics = hashlib.sha256(info.numerics.encode() + selection.model_digest).digest()
    hello = scheduler_pb2.WorkerHello(
        incarnation=incarnation,
        protocol=PROTOCOL,
        model=selection.model,
        model_digest=selection.model_digest,
        tokenizer_digest=tokenizer_digest(selection.assets),
        numerics_digest=numerics,
        hash_version=HASH_VERSION,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_rows=info.max_rows,
        max_num_batched_tokens=info.max_num_batched_tokens,
        group=scheduler_pb2.ParallelGroup(tensor_parallel=1, pipeline_parallel=1, ranks=1),
        name=name,
        backend=selection.kind,
        kv_dtype=info.kv_dtype,
        quantization=selection.quantization,
        capabilities=[GRAMMAR] if grammars else [],
    )
    for group in info.kv_groups:
        hello.kv_groups.add(
            id=group.id,
            block_size=group.block_size,
            num_blocks=group.num_blocks,
            bytes_per_block=group.bytes_per_block,
            window=group.window,
        )
    return Identity(hello, info, selection.assets)


def _select_mock(settings: WorkerSettings) -> Selection:
    mock = MockSettings(
        vocab_size=settings.mock_vocab_size,
        max_model_len=settings.max_model_len or 8_192,
        max_rows=settings.max_rows,
        max_num_batched_tokens=settings.max_num_batched_tokens or 8_192,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks or 8_192,
        step_ms=settings.mock_step_ms,
        token_us=settings.mock_token_us,
        eos_every=settings.mock_eos_every,
        die_at_step=settings.mock_die_at_step,
        hang_at_step=settings.mock_hang_at_step,
        fail_at_step=settings.mock_fail_at_step,
    )
    assets = mock_assets(mock.vocab_size, mock.max_model_len)
    name = settings.served_name or settings.model.removeprefix("mock:")
    digest = hashlib.sha256(assets_digest(assets) + f"mock eos_every={mock.eos_every}".encode()).digest()
    return Selection(MockBackend(mock), "mock", name, assets, digest)


def _device_kind(settings: WorkerSettings) -> str:
    """ "cuda" where it is asked for, or where torch sees a device and the compiler of our kernels is there; else "torch"."""
    if importlib.util.find_spec("torch") is None:
        raise SettingsError(
            f"--backend {settings.backend} needs torch, which is not installed here; --backend mock does not"
        )
    if settings.backend == "torch":
        return "torch"
    import torch

    missing = [name for name in ("cuda.core", "cuda.bindings") if _is_missing(name)]
    if settings.backend == "cuda":
        if missing:
            raise SettingsError(
                f"--backend cuda needs the packages of deploy/requirements/cuda.txt; {missing[0]} is not here"
            )
        if not torch.cuda.is_available():
            raise SettingsError("--backend cuda: torch sees no CUDA device; --backend torch runs on the CPU")
        return "cuda"
    return "cuda" if not missing and torch.cuda.is_available() else "torch"


def _refuse_quantization(settings: WorkerSettings, backend: str) -> None:
    if settings.quantization != "none":
        raise SettingsError(
            f"--quantization {settings.quantization}: the {backend} backend has none; --backend torch runs it on the CPU"
        )


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # its parent package is not there either
        return True


def _torch_backend(settings: WorkerSettings, model_dir: Path) -> Backend:
    from worker.backends.torch_backend import TorchBackend, TorchSettings

    torch_settings = TorchSettings(
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len or None,
        max_rows=settings.max_rows,
        max_num_batched_tokens=settings.max_num_batched_tokens or max(512, settings.max_rows),
        block_size=settings.block_size,
        num_blocks=settings.num_blocks or None,
        memory_fraction=settings.memory_fraction or None,
        promised_bytes=settings.promised_bytes,
        threads=settings.threads or None,
    )
    return TorchBackend(model_dir, torch_settings)


def _cuda_backend(settings: WorkerSettings, model_dir: Path) -> Backend:
    from worker.backends.cuda_backend import CudaBackend
    from worker.backends.cuda_memory import GPU_FRACTION
    from worker.backends.cuda_settings import CudaSettings

    cuda_settings = CudaSettings(
        dtype=settings.dtype,
        max_model_len=settings.max_model_len or None,
        max_rows=settings.max_rows,
        max_num_batched_tokens=settings.max_num_batched_tokens or 8_192,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks or None,
        memory_fraction=settings.memory_fraction or GPU_FRACTION,
        capture_at_start=settings.capture_at_start,
        shared_prefix=settings.shared_prefix,
    )
    return CudaBackend(model_dir, cuda_settings)
