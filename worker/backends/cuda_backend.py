"""The cuda backend: our kernels for all but the large matrix products, rows and tokens on the device, no waiting inside a step.

The launch thread enqueues on one stream: a copy of the plan's columns, the forward pass, sampling, a copy of the tokens to a
pinned slot. Step n + 1 may be enqueued before step n has run, because its input token is looked up on the device. A step whose rows
have one token each is two CUDA graphs, and so is a short one with chunks; a longer one is launched kernel by kernel. Rows behind a
shared prefix read it together.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cuda.core import Device, Stream

from kernels.cache import CubinCache, default_directory
from kernels.compiler import CompileError, Compiler, architecture_of, sources_digest
from kernels.launcher import KernelLibrary, LaunchError
from kernels.operands import SharedPrefixes
from kernels.ops import KernelOps
from kernels.shapes import PARTS_ROWS, KernelShape, ShapeError, decode_split, kernel_specs
from worker.backend import BackendError, BackendInfo, FatalBackendError, KVGroup, Masks, Progress
from worker.backends.cuda_columns import MixedShape, MixedShapes, StepColumns, fill_columns, pad_decode, pad_mixed
from worker.backends.cuda_graphs import GraphCache, bucket_for, buckets
from worker.backends.cuda_memory import MemoryPlan
from worker.backends.cuda_model import CudaDecoder, Workspace, allocate_workspace, prefill_tiles
from worker.backends.cuda_prefix import PrefixPlanner
from worker.backends.cuda_prompt import PromptDescriber
from worker.backends.cuda_results import ResultRing, Slot
from worker.backends.cuda_rows import DeviceRows, upload
from worker.backends.cuda_sampler import CudaSampler
from worker.backends.shared_prefix import MOST_PARTS
from worker.checkpoint.config import ModelConfig, load_config
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.upload import Upload
from worker.checkpoint.weights import Weights, upload_weights
from worker.step import NewRow, SamplingParams, Step, StepOutput

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_RESULT_SLOTS = 8  # steps that may be launched and not collected; the scheduler's run-ahead is at most 4


@dataclass(frozen=True, slots=True)
class CudaSettings:
    """How to serve a model on one GPU. None means: decide from the model and the device."""

    dtype: str = "auto"  # auto: as stored, bfloat16 for float32 checkpoints
    max_model_len: int | None = None
    max_rows: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = 0.9  # of the memory that is free at the start
    device: int = 0
    capture_at_start: bool = False  # capture every bucket's graphs in warm_up; else each at its first use
    graphs: bool = True
    shared_prefix: bool = True  # many rows behind one prefix read it together (kernels/prefix_attention.cu)
    cubin_cache: Path | None = None
    poison: bool = False  # tests: cache and activations that nobody has written are NaN

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            raise BackendError(
                f"dtype: {self.dtype!r} is none of auto, {', '.join(_DTYPES)}, which the cuda backend computes in"
            )
        for name in ("max_model_len", "max_rows", "max_num_batched_tokens", "block_size", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BackendError(f"{name}: must be at least 1, not {value}")
        if self.max_rows > 65535:
            raise BackendError(f"max_rows: at most 65,535, not {self.max_rows}")
        if not 0 < self.memory_fraction <= 1:
            raise BackendError(f"memory_fraction: must be above 0 and at most 1, not {self.memory_fraction}")


class CudaBackend:
    """Implements worker.backend.Backend on one NVIDIA GPU of compute capability 8.0 or more."""

    def __init__(self, model_dir: Path, settings: CudaSettings) -> None:
        self._model_dir = model_dir
        self._settings = settings
        self._thread = 0  # that `begin` was last called on

    def load(self, progress: Progress) -> BackendInfo:
        settings = self._settings
        try:
            config = load_config(self._model_dir)
            with self._guarded_start(), torch.inference_mode():
                return self._load(config, progress)
        except (CompileError, LaunchError, ShapeError, CheckpointError) as error:
            raise BackendError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise BackendError(f"GPU {settings.device}: out of memory while loading: {error}") from error

    def _load(self, config: ModelConfig, progress: Progress) -> BackendInfo:
        settings = self._settings
        dtype = _DTYPES.get(config.dtype if settings.dtype == "auto" else settings.dtype, torch.bfloat16)
        limit = _longest_context(config)
        if settings.max_model_len is not None and settings.max_model_len > limit:
            raise BackendError(
                f"max_model_len: {settings.max_model_len} is more than the {limit} that the model was made for"
            )
        longest = settings.max_model_len or limit
        shape = _kernel_shape(config, dtype, settings.block_size)
        self._device = torch.device("cuda", settings.device)
        properties = torch.cuda.get_device_properties(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        depth = 8 if Device(settings.device).properties.max_shared_memory_per_block_optin >= 160 * 1024 else 4
        architecture = architecture_of(properties.major, properties.minor)
        compiler = Compiler(architecture, CubinCache(settings.cubin_cache or default_directory()))
        with Upload(self._device) as upload:
            # The disk reads while the kernels compile or load.
            weights = upload_weights(self._model_dir, config, dtype, upload)
            loaded = torch.cuda.memory_allocated(self._device)
            library = KernelLibrary(
                compiler, kernel_specs(shape, depth, architecture), settings.device, overlap=properties.major >= 9
            )
            ops = KernelOps(library, shape, self._core_stream, properties.multi_processor_count, depth)
            self._allocate(config, shape, weights, ops, longest, dtype)
            upload.wait(progress)
        plan = MemoryPlan(
            free=free,
            fraction=settings.memory_fraction,
            weights=loaded,
            workspace=torch.cuda.memory_allocated(self._device) - loaded,
            bytes_per_block=2 * config.num_layers * config.kv_size * dtype.itemsize * settings.block_size,
            block_size=settings.block_size,
        )
        num_blocks = plan.num_blocks(settings.num_blocks, settings.max_model_len or settings.block_size)
        self._attach_cache(config, num_blocks, dtype)
        windows = set(config.windows)
        window = windows.pop() if len(windows) == 1 else None
        return BackendInfo(
            name="cuda",
            numerics=f"cuda {architecture} {dtype} kernels={sources_digest()} split={shape.split} torch={torch.__version__}",
            kv_dtype=str(dtype).removeprefix("torch."),
            vocab_size=config.vocab_size,
            max_model_len=min(longest, num_blocks * settings.block_size),
            max_rows=settings.max_rows,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_groups=(KVGroup(0, settings.block_size, num_blocks, plan.bytes_per_block, window),),
        )

    def _allocate(
        self,
        config: ModelConfig,
        shape: KernelShape,
        weights: Weights,
        ops: KernelOps,
        longest: int,
        dtype: torch.dtype,
    ) -> None:
        settings, device = self._settings, self._device
        self._ops = ops
        self._group = config.num_heads // config.num_kv_heads
        shares = settings.shared_prefix and ops.shares_prefixes and 0 in {window or 0 for window in config.windows}
        # One place more for each row: where the prompt's described positions wait for their next token.
        self._tokens_limit = max(settings.max_num_batched_tokens, settings.max_rows)
        space = allocate_workspace(
            config, shape, self._tokens_limit + settings.max_rows, settings.max_rows, longest, dtype, device,
            MOST_PARTS if shares else 0,
        )  # fmt: skip
        if settings.poison:
            _poison(space)
        self._decoder = CudaDecoder(config, shape, weights, ops, space, longest)
        self._rows = DeviceRows(ops, settings.max_rows, longest, settings.block_size, config.vocab_size, device)
        self._prefixes: PrefixPlanner | None = None
        if shares:
            self._prefixes = PrefixPlanner(
                self._rows, settings.max_rows, self._group, config.num_kv_heads, ops.prefill_tile_rows,
                space.prefix_slots, device,
            )  # fmt: skip
        self._sampler = CudaSampler(ops, self._rows, settings.max_rows, config.vocab_size, device)
        self._prompts = PromptDescriber(self._rows, self._decoder, self._sampler, self._tokens_limit)
        self._mixed = MixedShapes(settings.max_rows, self._tokens_limit, self._group, ops.prefill_tile_rows)
        self._columns = StepColumns(settings.max_rows, self._mixed.max_tiles, self._rows.block_table, device)
        self._step = self._columns.step
        self._ring = ResultRing(_RESULT_SLOTS, settings.max_rows, self._columns.size)
        self._buckets = buckets(settings.max_rows)
        self._graphs = GraphCache(self._stream)
        self._slot: Slot | None = None

    def _attach_cache(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> None:
        size = (config.num_layers, 2, num_blocks, config.num_kv_heads, self._settings.block_size, config.head_dim)
        cache = torch.empty(size, dtype=dtype, device=self._device)
        if self._settings.poison:
            cache.fill_(float("nan"))
        self._decoder.attach_cache(cache)

    def warm_up(self) -> None:
        """Real steps in row 0 and block 0: a chunk, then a decode; graphs of all buckets where the settings ask for it."""
        none, row = np.zeros(0, np.int32), np.zeros(1, np.int32)
        tokens = np.zeros(min(2, self._settings.block_size - 1), np.int32)
        new = NewRow(0, tokens, len(tokens), 0, row, 0, SamplingParams(temperature=0.0))
        count = np.array([len(tokens)], np.int32)
        for step in (
            Step(0, none, (new,), none, none, none, none, none, row, count, row + 1),
            Step(1, none, (), none, none, none, none, none, row, row + 1, row + 1),
        ):
            self.begin(step)
            self.forward(step)
            self.sample(step)
            self.collect()
        if self._settings.capture_at_start and self._settings.graphs:
            with self._on_stream():
                for bucket in self._buckets:
                    self._set_nothing(bucket)
                    for shares in (False, True) if self._prefixes is not None and bucket > PARTS_ROWS else (False,):
                        self._graphs.run(("forward", bucket, shares), partial(self._decode, bucket, shares))
                    self._graphs.run(("sample", bucket, False, False), partial(self._choose, bucket, False, False))
                for shape in self._mixed:
                    self._set_nothing(shape)
                    self._graphs.run((shape, False), partial(self._decode_and_prefill, shape, False))
        torch.cuda.synchronize(self._device)
        self.reset()

    def reset(self) -> None:
        if self._slot is not None:
            self._ring.give_back(self._slot)
            self._slot = None
        self._rows.reset()
        self._prompts.reset()
        if self._prefixes is not None:
            self._prefixes.forget()

    def begin(self, step: Step) -> None:
        if self._thread != threading.get_ident():
            # The context is current for each thread by itself, and the launch thread is not the one that loaded.
            Device(self._settings.device).set_current()
            self._thread = threading.get_ident()
        with self._on_stream():
            if self._slot is None:
                self._slot = self._ring.take()
            self._slot.step_id = step.step_id
            self._slot.began.record(self._stream)
            changed = [*step.freed_rows.tolist(), *(new.row for new in step.new_rows)]
            self._prompts.forget(changed)
            if changed and self._prefixes is not None:
                self._prefixes.forget()
            self._rows.apply(step)

    def forward(self, step: Step) -> None:
        count = len(step.rows)
        if count == 0:
            return
        scheduled = step.num_scheduled.astype(np.int64)
        total = int(scheduled.sum())
        if count > self._settings.max_rows or total > self._tokens_limit:
            raise BackendError(f"step {step.step_id}: {count} rows and {total} tokens are more than this worker takes")
        q_start = (np.cumsum(scheduled) - scheduled).astype(np.int32)
        sampling = np.flatnonzero(step.num_samples)
        last = (q_start[sampling] + step.num_scheduled[sampling] - 1).astype(np.int32)
        if self._slot is None:
            raise BackendError(f"step {step.step_id}: forward without begin")
        columns = self._slot.columns.numpy()
        fill_columns(
            columns,
            step.rows,
            step.num_scheduled,
            q_start,
            step.rows[sampling],
            last,
            self._slot.result.data_ptr(),
        )
        with self._on_stream():
            shares = self._prefixes is not None and self._prefixes.plan(step, q_start, total)
            if total == count and self._settings.graphs:
                bucket = bucket_for(count, self._buckets)
                pad_decode(columns, count, bucket)
                self._ops.copy_words(
                    self._columns.without_tiles, self._slot.columns[: len(self._columns.without_tiles)]
                )
                self._graphs.run(("forward", bucket, shares), partial(self._decode, bucket, shares))
            else:
                context_lens = (self._rows.computed[step.rows] + scheduled).astype(np.int32)
                tiles = prefill_tiles(step.num_scheduled, context_lens, self._group, self._ops.prefill_tile_rows)
                shape = self._mixed.find(total, count, len(tiles)) if len(tiles) else None
                if shape is not None:
                    pad_mixed(columns, count, total, tiles, shape)
                self._ops.copy_words(self._columns.all, self._slot.columns)
                if shape is None:
                    self._prepare(count, total)
                    on_device = upload(tiles, self._device) if len(tiles) else None
                    decodes = bool((scheduled == 1).any())
                    self._decoder.forward(total, self._step, count, on_device, decodes, self._shared(shares))
                elif self._settings.graphs:
                    self._graphs.run((shape, shares), partial(self._decode_and_prefill, shape, shares))
                else:
                    self._decode_and_prefill(shape, shares)
        self._rows.computed[step.rows] += scheduled

    def sample(self, step: Step, masks: Masks | None = None) -> None:
        slot = self._slot
        if slot is None:
            raise BackendError(f"step {step.step_id}: sample without begin")
        sampling = np.flatnonzero(step.num_samples)
        rows = step.rows[sampling]
        count = len(rows)
        slot.num_samples = count
        with self._on_stream():
            if self._rows.describing and len(step.rows):
                slot.described += self._prompts.describe(step)
            if masks is not None:
                self._rows.set_masks(rows[masks.places], masks.wait())  # the device runs the model meanwhile
            if count:
                self._sample(rows, count)
                slot.described += self._prompts.describe_samples(rows, sampling)
            self._rows.known[rows] += 1
            slot.ended.record(self._stream)
        self._slot = None
        self._ring.publish(slot)

    def collect(self) -> StepOutput:
        with self._fatal_errors(), torch.cuda.device(self._device):
            return self._ring.collect()

    def close(self) -> None:
        if not hasattr(self, "_graphs"):
            return
        with self._fatal_errors():
            torch.cuda.synchronize(self._device)
        for name in (
            "_graphs",
            "_decoder",
            "_prefixes",
            "_rows",
            "_sampler",
            "_prompts",
            "_columns",
            "_step",
            "_ring",
            "_ops",
        ):
            delattr(self, name)
        gc.collect()
        torch.cuda.empty_cache()

    def _sample(self, rows: np.ndarray, count: int) -> None:
        flags = self._rows.flags[rows]
        processes, truncates = bool((flags & 1).any()), bool((flags & 2).any())
        if self._settings.graphs:
            bucket = bucket_for(count, self._buckets)
            self._graphs.run(
                ("sample", bucket, processes, truncates), partial(self._choose, bucket, processes, truncates)
            )
        else:
            self._choose(count, processes, truncates)

    def _prepare(self, rows: int, num_tokens: int) -> None:
        space, state = self._decoder.workspace, self._rows
        self._ops.prepare_tokens(
            self._step, rows, num_tokens, state.fields, state.tokens, space.token_ids, space.positions, space.slots
        )

    def _decode(self, bucket: int, shares: bool) -> None:
        self._prepare(bucket, bucket)
        self._decoder.forward(bucket, self._step, bucket, None, True, self._shared(shares))

    def _decode_and_prefill(self, shape: MixedShape, shares: bool) -> None:
        self._prepare(shape.rows, shape.tokens)
        tiles = self._columns.tiles[: shape.tiles]
        self._decoder.forward(shape.tokens, self._step, shape.rows, tiles, True, self._shared(shares))

    def _shared(self, shares: bool) -> SharedPrefixes | None:
        return self._prefixes.lists if shares and self._prefixes is not None else None

    def _choose(self, bucket: int, processes: bool, truncates: bool) -> None:
        self._decoder.logits(self._columns.last, bucket, self._sampler.logits)
        self._sampler.sample(self._columns.sample_rows, bucket, processes, truncates, self._columns.result_at)

    def _set_nothing(self, shape: int | MixedShape) -> None:
        """Columns of a step without rows, for a graph that is captured before it is needed. Waits for the device."""
        none = np.zeros(0, np.int32)
        slot = self._ring.take()
        columns = slot.columns.numpy()
        fill_columns(columns, none, none, none, none, none, slot.result.data_ptr())
        if isinstance(shape, MixedShape):
            pad_mixed(columns, 0, 0, none, shape)
        else:
            pad_decode(columns, 0, shape)
        self._ops.copy_words(self._columns.all, slot.columns)
        self._stream.synchronize()
        self._ring.give_back(slot)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with self._fatal_errors(), torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def _guarded_start(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            raise BackendError(
                "backend cuda: torch sees no CUDA device here (no GPU, no driver, or a CPU build of torch)"
            )
        count = torch.cuda.device_count()
        if self._settings.device >= count:
            raise BackendError(f"device: {self._settings.device} was asked for, {count} CUDA devices are there")
        torch.cuda.set_device(self._settings.device)
        Device(self._settings.device).set_current()
        self._stream = torch.cuda.Stream(self._settings.device)  # type: ignore[no-untyped-call]
        self._core_stream = Stream.from_handle(self._stream.cuda_stream)
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    @contextmanager
    def _fatal_errors(self) -> Iterator[None]:
        """A CUDA error leaves the context unusable: the process must end. Running out of memory does not."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (torch.AcceleratorError, LaunchError) as error:
            raise FatalBackendError(f"GPU {self._settings.device}: {error}") from error
        except RuntimeError as error:
            if "CUDA error" not in str(error) and "CUBLAS" not in str(error):
                raise
            raise FatalBackendError(f"GPU {self._settings.device}: {error}") from error


def _kernel_shape(config: ModelConfig, dtype: torch.dtype, block_size: int) -> KernelShape:
    return KernelShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        qk_norm=config.qk_norm,
        float16=dtype == torch.float16,
        split=decode_split(config.head_dim),
    )


def _longest_context(config: ModelConfig) -> int:
    """Dynamic RoPE scaling is served within the trained context only (worker/model/rope.py)."""
    if config.rope.kind == "dynamic":
        return min(config.max_position_embeddings, config.rope.original_max_position)
    return config.max_position_embeddings


def _poison(space: Workspace) -> None:
    for name in ("hidden", "spare", "normed", "qkv", "attended", "projected", "gate_up", "activated"):
        getattr(space, name).fill_(float("nan"))
    space.parts.fill_(float("nan"))
    space.scratch.partials.fill_(float("nan"))
