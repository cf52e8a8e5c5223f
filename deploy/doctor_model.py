"""Whether this checkout can serve a model here: its config, how much of it fits, and whether its kernels compile.

Imports numpy by way of the worker's modules, but neither torch nor CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from octavo.doctor.findings import Finding, Run, note, ok, problem, size_of
from octavo.doctor.gpu import Gpu

from deploy.environment import ROOT
from kernels.shapes import KernelShape, ShapeError
from worker.backend import BackendError
from worker.backends.cuda_memory import GPU_FRACTION, MemoryPlan
from worker.backends.torch_memory import choose_num_blocks
from worker.checkpoint.config import ModelConfig, load_config
from worker.checkpoint.errors import CheckpointError
from worker.settings import WorkerSettings

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_GPU_TOKENS = 8_192  # of a step at most, if nothing else is set
_COMPILE_SECONDS = 300.0
_ONE_SECONDS = 60.0
_DEFAULTS = WorkerSettings(scheduler=("unused:1",))
_CUDA_REMEDY = ".venv/bin/pip install -r deploy/requirements/cuda.txt"


def check_config(directory: Path) -> tuple[list[Finding], ModelConfig | None]:
    """Whether config.json is of a kind that the workers serve."""
    try:
        config = load_config(directory)
    except CheckpointError as error:
        remedy = (
            "Choose a model of the Llama family (Llama 2 and 3, Mistral, Qwen2 and 3, SmolLM2): octavo pull ORG/NAME"
        )
        return [problem("config", f"{error}.", remedy)], None
    found = (
        f"{config.architecture}, {config.num_layers} layers of {config.hidden_size}, {config.dtype}, "
        f"{config.max_position_embeddings:,} positions: supported"
    )
    return [ok("config", found)], config


def check_fit(config: ModelConfig, stored: int, available: int | None, gpus: Sequence[Gpu]) -> list[Finding]:
    """How many KV-cache blocks a worker would get. `stored`: bytes of the weights as in the files; `available`: of main memory."""
    findings = [_fit_gpu(config, stored, gpu) for gpu in gpus]
    if available is not None:
        findings.append(_fit_cpu(config, stored, available, needed=not gpus))
    return findings


def _fit_cpu(config: ModelConfig, stored: int, available: int, needed: bool) -> Finding:
    check = "fits into memory"
    size = _block_bytes(config, _ITEM_BYTES[config.dtype])
    useful = _DEFAULTS.max_rows * -(-config.max_position_embeddings // _DEFAULTS.block_size)
    try:
        blocks = choose_num_blocks(None, None, available, size, useful, weights=stored)
    except BackendError:
        blocks = 0
    if not blocks:
        found = f"{size_of(stored)} of weights and the KV cache do not fit into the {size_of(available)} available."
        if not needed:
            return note(check, f"On the CPU: {found}")
        return problem(check, found, "Free memory, or take a smaller model: make up MODEL=smollm2")
    return _fits(check, "On the CPU", config, blocks, size)


def _fit_gpu(config: ModelConfig, stored: int, gpu: Gpu) -> Finding:
    check = f"fits into GPU {gpu.index}"
    plan = MemoryPlan(
        free=gpu.memory_free,
        fraction=GPU_FRACTION,
        weights=stored * 2 // _ITEM_BYTES[config.dtype],
        workspace=_workspace(config),
        bytes_per_block=_block_bytes(config, 2),
        block_size=_DEFAULTS.block_size,
    )
    blocks = max(0, plan.for_blocks // plan.bytes_per_block)
    if not blocks:
        remedy = "Free the GPU (nvidia-smi shows who uses it), take a smaller model, or run it on the CPU: make up BACKEND=torch"
        return problem(check, f"{gpu.name}: {plan.describe(blocks)}", remedy)
    return _fits(check, f"On GPU {gpu.index}", config, blocks, plan.bytes_per_block)


def _fits(check: str, where: str, config: ModelConfig, blocks: int, size: int) -> Finding:
    tokens = blocks * _DEFAULTS.block_size
    found = f"{where}: about {blocks:,} KV-cache blocks of {size_of(size)}, {tokens:,} tokens"
    if tokens < config.max_position_embeddings:
        found += f": less than one sequence of the model's {config.max_position_embeddings:,} positions; longer requests are refused."
        return note(check, found)
    return ok(check, found)


def _block_bytes(config: ModelConfig, item: int) -> int:
    return 2 * config.num_layers * config.kv_size * item * _DEFAULTS.block_size


def _workspace(config: ModelConfig) -> int:
    """About what the cuda backend sets aside for activations, logits and row state, in bytes."""
    per_token = 4 * config.hidden_size + 2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size
    rows = _DEFAULTS.max_rows * (8 * config.vocab_size + 8 * config.max_position_embeddings)
    return 2 * (_GPU_TOKENS + _DEFAULTS.max_rows) * per_token + rows


def check_kernels(
    architectures: Sequence[str], config: ModelConfig | None, run: Run, everything: bool
) -> list[Finding]:
    """Compile for each architecture in a process of its own: all kernels of the model, or only the smallest one."""
    extra = ["--all"] if everything else []
    if config is not None:
        try:
            extra += ["--shape", json.dumps(dataclasses.asdict(kernel_shape(config)))]
        except ShapeError as error:
            remedy = "Run this model on the CPU: make up BACKEND=torch"
            return [(problem if everything else note)("kernels", f"They do not cover this model: {error}.", remedy)]
    return [_compile(architecture, extra, run, everything) for architecture in architectures]


def _compile(architecture: str, extra: list[str], run: Run, everything: bool) -> Finding:
    argv = [sys.executable, "-m", "kernels.check", architecture, *extra]
    ran = run(argv, _COMPILE_SECONDS if everything else _ONE_SECONDS, ROOT)
    check = f"kernels ({architecture})"
    try:
        answer = json.loads(ran.out)
    except ValueError:
        return problem(check, f"NVRTC can't be used: {ran.last_words}", _CUDA_REMEDY)
    if "error" in answer:
        first = str(answer["error"]).strip().splitlines()[0]
        remedy = f"In the checkout, to see all of it: {' '.join(argv[:4])} --all"
        return problem(
            check, f"They do not compile: {first}", f"{remedy}\nInstall NVRTC as it is pinned: {_CUDA_REMEDY}"
        )
    what = "all of the model's compile" if everything else "the smallest one compiles"
    return ok(check, f"NVRTC {answer['nvrtc']}: {what} ({answer['cached']} of {answer['modules']} were in the cache)")


def kernel_shape(config: ModelConfig) -> KernelShape:
    """What the cuda backend would specialise its kernels for. Raises ShapeError."""
    return KernelShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=_DEFAULTS.block_size,
        qk_norm=config.qk_norm,
        float16=config.dtype == "float16",
    )
